"""`atelier resume`: go on with a run that was interrupted."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Runs")
    def resume(
        run_dir: Path = typer.Argument(
            ..., metavar="RUN", help="Folder of the run, such as runs/geneval-scenes."
        ),
    ) -> None:
        """Go on with an interrupted run; the result is that of an uninterrupted one."""
        from cli import console
        from cli.train import finished
        from common.errors import UsageError
        from common.processes import is_main_process
        from recipes import load_recipe

        if not (run_dir / "recipe.yaml").is_file():
            what = "holds no recipe.yaml" if run_dir.is_dir() else "is not a folder"
            raise UsageError(
                f"{run_dir} is not a run: it {what}.\n"
                "    Fix: give the folder that `atelier train` made, such as runs/NAME."
            )

        with console.progress() as progress:
            progress.start("load", None)  # torch and its company take seconds to import
            if load_recipe(str(run_dir / "recipe.yaml")).recipe.kind == "grpo":
                from rl.run import resume as go_on
            else:
                from rl.build import resume as go_on

            progress.finish("load")
            go_on(run_dir, progress)
        if is_main_process():
            finished(run_dir)
