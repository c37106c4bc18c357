"""`atelier ls`: what there is to choose from."""

from typing import Literal

import typer

from cli import console

What = Literal["recipes", "rewards", "suites"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Recipes")
    def ls(
        what: What = typer.Argument("recipes", help="What to list."),
    ) -> None:
        """List recipes, rewards or benchmark suites."""
        {"recipes": _recipes, "rewards": _rewards, "suites": _suites}[what]()


def _recipes() -> None:
    from recipes import recipe_summary, shipped_recipes

    console.pairs([(name, recipe_summary(file)) for name, file in shipped_recipes().items()], "")


def _rewards() -> None:
    from rewards import list_rewards

    for name in list_rewards():
        console.say(name)


def _suites() -> None:
    from evals.suites import list_suites, suite_summary

    console.pairs([(name, suite_summary(name)) for name in list_suites()], "")
