"""`atelier new`: start a recipe of your own from a shipped one."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Recipes")
    def new(
        source: str = typer.Argument(..., metavar="RECIPE", help="Shipped recipe to start from."),
        file: Path = typer.Argument(..., metavar="FILE", help="File to write."),
    ) -> None:
        """Copy a shipped recipe, comments included, to a new file."""
        write_copy(source, file)


def write_copy(source: str, file: Path) -> None:
    """Write the copy, named after its file; nothing is ever overwritten."""
    from cli.console import say
    from common.errors import RecipeError, UsageError
    from recipes import load_recipe, shipped_recipes
    from recipes.shipped import relocated

    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file} does not end with .yaml.\n    Fix: write {file.stem}.yaml.")
    shipped = shipped_recipes()
    if source not in shipped and file.stem in shipped and source.endswith((".yaml", ".yml")):
        raise RecipeError(
            f"the recipe to start from comes first.\n    Fix: atelier new {file.stem} {source}"
        )
    text = relocated(load_recipe(source).files[0], name=file.stem)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{file} exists already.\n    Fix: choose another name.") from None
    say(f"wrote {file}")
    say(f"next: atelier check {file}", style="dim")
