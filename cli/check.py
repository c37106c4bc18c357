"""`atelier check`: is a recipe right, and where does each of its values come from."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from recipes import LoadedRecipe


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Recipes")
    def check(
        recipe: str = typer.Argument(
            ..., metavar="RECIPE", help="Recipe file, or the name of a shipped one."
        ),
        overrides: list[str] | None = typer.Argument(
            None, metavar="KEY=VALUE", help="Values to change, such as train.steps=40."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print JSON instead."),
    ) -> None:
        """Validate a recipe and show every value with the place it comes from."""
        from common.errors import RecipeError
        from recipes import load_recipe

        try:
            loaded = load_recipe(recipe, overrides or [])
        except RecipeError as error:
            if as_json:
                _print_problems(error)
                raise typer.Exit(error.exit_code) from None
            raise
        if as_json:
            _print_json(loaded)
        else:
            _print_tree(loaded)


def _print_problems(error: Any) -> None:
    import json
    from dataclasses import asdict

    problems = [asdict(problem) for problem in error.problems]
    typer.echo(json.dumps({"valid": False, "problems": problems}, indent=2, ensure_ascii=False))


def _print_json(loaded: "LoadedRecipe") -> None:
    import json

    facts = {
        "valid": True,
        "recipe": loaded.recipe.model_dump(mode="json"),
        "provenance": loaded.provenance,
        "files": [str(file) for file in loaded.files],
    }
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def _print_tree(loaded: "LoadedRecipe") -> None:
    from rich.text import Text

    from cli import console
    from recipes.shipped import display_path

    rows = list(_rows(loaded.recipe.model_dump(mode="json"), "", 0, loaded.provenance))
    keys = max(len(name) for name, _, _ in rows)
    screen = console.stdout()
    room = screen.width if screen.is_terminal else 10_000
    values = min(max(len(value) for _, value, _ in rows), max(room - keys - 36, 16))
    console.say(" < ".join(display_path(file) for file in loaded.files), style="bold")
    for name, value, origin in rows:
        if origin is None:
            console.say(name, style="bold")
            continue
        line = Text(name.ljust(keys) + "  ")
        pieces = _wrapped(value, values)
        line.append(pieces[0].ljust(values), style="" if origin == "default" else "cyan")
        line.append("  ")
        line.append(origin, style="bold yellow" if origin == "override" else "dim")
        console.say(line)
        for piece in pieces[1:]:
            console.say(" " * (keys + 2) + piece, style="cyan")
    console.say("ok", style="green")


def _rows(value: Any, key: str, depth: int, origins: dict[str, str]) -> Any:
    """Yield (indented name, value as text, origin); a section has neither value nor origin."""
    from recipes.explain import show

    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        full = f"{key}.{name}" if key else str(name)
        label = "  " * depth + (f"- {name}" if isinstance(value, list) else str(name))
        if full in origins:
            yield label, show(item, limit=1000).replace('"', ""), origins[full]
        else:
            yield label, "", None
            yield from _rows(item, full, depth + 1, origins)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]
