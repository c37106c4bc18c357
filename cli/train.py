"""`atelier train`: run a recipe."""

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Runs")
    def train(
        recipe: str = typer.Argument(
            ..., metavar="RECIPE", help="Recipe file, or the name of a shipped one."
        ),
        overrides: list[str] | None = typer.Argument(
            None, metavar="KEY=VALUE", help="Values to change, such as train.steps=40."
        ),
        out: Path | None = typer.Option(
            None, help="Folder of the run; it must be new. (default: runs/NAME)", show_default=False
        ),
        save_rollouts: Path | None = typer.Option(
            None,
            metavar="DIR",
            help="Keep each step's samples, with scores and pictures, in this new folder.",
            show_default=False,
        ),
        replay: Path | None = typer.Option(
            None,
            metavar="DIR",
            help="Learn from samples that --save-rollouts kept, without making any.",
            show_default=False,
        ),
    ) -> None:
        """Train a policy as a recipe says."""
        from cli import console
        from common.processes import is_main_process
        from recipes import load_recipe

        folders = {"rollout.save_to": save_rollouts, "rollout.replay": replay}
        asked = [f"{key}={json.dumps(str(f))}" for key, f in folders.items() if f is not None]
        loaded = load_recipe(recipe, [*(overrides or []), *asked])
        run_dir = out or Path("runs") / loaded.recipe.name
        if is_main_process():
            refuse_used(run_dir)

        with console.progress() as progress:
            progress.start("load", None)  # torch and its company take seconds to import
            if loaded.recipe.kind == "grpo":
                from rl.run import train as start
            else:
                from rl.build import build as start

            progress.finish("load")
            start(loaded, run_dir, progress)
        if is_main_process():
            finished(run_dir)


def refuse_used(run_dir: Path) -> None:
    """Raise UsageError if the folder holds anything, so that no run is ever written over.

    The lock alone is what a start that failed leaves behind.
    """
    from cli.free_name import free_name
    from common.errors import UsageError

    if run_dir.is_dir() and all(path.name == ".lock" for path in run_dir.iterdir()):
        return
    if not run_dir.exists():
        return
    another = f"--out {free_name(run_dir)}"
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is a file, not a folder.\n    Fix: use {another}")
    if (run_dir / "policy" / "policy.json").is_file():
        raise UsageError(f"{run_dir} holds a finished run.\n    Fix: start anew with {another}")
    if (run_dir / "recipe.yaml").is_file():
        raise UsageError(
            f"{run_dir} holds an unfinished run.\n"
            f"    Fix: go on with `atelier resume {run_dir}`, or start anew with {another}"
        )
    raise UsageError(f"{run_dir} is not empty and is no run.\n    Fix: use {another}")


def finished(run_dir: Path) -> None:
    """Say what was written and what one does next."""
    from cli import console

    console.say(f"trained {run_dir}", style="bold green")
    console.pairs(
        [
            ("policy", f"{run_dir / 'policy'}"),
            ("metrics", f"{run_dir / 'metrics.jsonl'}"),
            ("next", f"atelier eval {run_dir / 'policy'}"),
        ]
    )
