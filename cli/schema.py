"""`atelier schema`: the JSON schema of recipes, for editors."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Recipes")
    def schema(
        out: Path | None = typer.Option(None, help="File to write; otherwise it is printed."),
    ) -> None:
        """Print the JSON schema of recipe files, so that editors complete and check them."""
        import json

        from cli.console import say
        from common.atomic import write_text
        from recipes.schema import file_schema

        text = json.dumps(file_schema(), indent=2, ensure_ascii=False)
        if out is None:
            typer.echo(text)
            return
        write_text(out, text + "\n")
        say(f"wrote {out}")
        say(f"use: put `# yaml-language-server: $schema={out}` on top of a recipe", style="dim")
