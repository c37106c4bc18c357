"""`atelier report`: compare evaluations in one self-contained folder."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("report", rich_help_panel="Judging")
    def report(
        results: list[Path] = typer.Argument(
            ..., metavar="RESULTS...", help="Result folders; the first is the baseline."
        ),
        out: Path = typer.Option(Path("report"), help="Folder to write; a report is replaced."),
        run: Path | None = typer.Option(None, help="Training run whose curves are drawn."),
    ) -> None:
        """Write report.html (opens offline) and report.md with every comparison and picture."""
        from cli import console
        from evals.environment import command_line
        from evals.report import build_report

        with console.progress() as progress:
            progress.start("report", None)
            page = build_report(results, out, run, command=command_line())
            progress.finish("report")
        console.say(f"report: {page}")
