"""`atelier watch`: a training run as it goes on."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from evals.run_state import RunState

SECONDS = 2.0
"""Between two looks at the run's folder."""
PAGE_SECONDS = 30
"""Between two versions of the page, and how often a browser loads it again."""


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Runs")
    def watch(
        run_dir: Path = typer.Argument(..., metavar="RUN", help="Folder of the run."),
        report: Path | None = typer.Option(
            None, help="Folder for a report page of the training, refreshed as it goes on."
        ),
    ) -> None:
        """Show a run's curves, stage times, held-out scores and alarms until it is finished.

        The run is only read. Ctrl-C stops watching and leaves it alone.

        When piped, every new step is one plain line.
        """
        from cli import console

        out = console.stdout()
        page = Page(run_dir, report) if report is not None else None
        follow = _screen if out.is_terminal and not out.is_dumb_terminal else _lines
        try:
            follow(out, run_dir, page)
        except KeyboardInterrupt:
            console.say("stopped watching; the run goes on")


class Page:
    """The report page of a run, written again now and then while it goes on."""

    def __init__(self, run_dir: Path, out: Path) -> None:
        self._run_dir = run_dir
        self._out = out
        self._written = float("-inf")

    def update(self, state: "RunState") -> None:
        """Write the page if it is due; the last one no longer asks to be loaded again."""
        from evals.report import build_report

        finished = state.phase == "finished"
        now = time.monotonic()
        if not state.series("reward") or (now - self._written < PAGE_SECONDS and not finished):
            return
        refresh = None if finished else PAGE_SECONDS
        build_report([], self._out, self._run_dir, refresh_seconds=refresh)
        self._written = now


def _screen(out: "Console", run_dir: Path, page: Page | None) -> None:
    from rich.live import Live

    from cli.watch_screen import frame
    from evals.run_state import read_run

    state = read_run(run_dir, time.time())
    with Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(frame(state, out.width, out.height), refresh=True)
            if page is not None:
                page.update(state)
            if state.phase == "finished":
                return
            time.sleep(SECONDS)
            state = read_run(run_dir, time.time())


def _lines(out: "Console", run_dir: Path, page: Page | None) -> None:
    """Say the newest step at once, then each further step, evaluation and alarm."""
    from cli.watch_screen import held_out_line, step_line
    from evals.run_state import read_run

    state = read_run(run_dir, time.time())
    shown, evaluated = state.step - 1, len(state.held_out) - 1
    told: set[str] = set()
    while True:
        for row in state.steps:
            if row["step"] > shown:
                out.print(step_line(state, row), markup=False)
        for row in state.held_out[max(0, evaluated) :]:
            out.print(held_out_line(row), markup=False)
        shown, evaluated = max(shown, state.step), len(state.held_out)
        for kind, alarm in state.alarms.items():
            if kind not in told:
                out.print(f"alarm: {alarm}", markup=False)
        told = set(state.alarms)
        if page is not None:
            page.update(state)
        if state.phase == "finished":
            out.print(f"finished: {run_dir / 'policy'}", markup=False)
            return
        time.sleep(SECONDS)
        state = read_run(run_dir, time.time())
