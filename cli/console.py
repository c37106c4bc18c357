"""What the command line puts on the screen: results to stdout, progress and errors to stderr.

Colours and bars appear on a terminal only; `NO_COLOR` and `TERM=dumb` are honoured by rich. When
output is piped, every line is plain text and is never wrapped.
"""

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

Fact = float | int | str | None

_SILENT_SECONDS = 2.0
"""Shortest time between two plain lines of a task that has nothing but its count to say."""


def stdout() -> Console:
    """Return the console for results."""
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    """Return the console for progress and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str | Text = "", style: str = "") -> None:
    """Print one line of a result to stdout; square brackets in `text` are just brackets."""
    stdout().print(text, style=style, markup=False)


def error(message: str) -> None:
    """Print what went wrong to stderr, its fixes standing out."""
    console = stderr()
    label = "error: "
    for line in message.splitlines() or [""]:
        body = line.lstrip()
        indent = line[: len(line) - len(body)]
        style = "green" if body.startswith("Fix:") else ""
        for piece in _wrapped(body, console, len(label + indent)):
            text = Text(label, style="bold red")
            text.append(indent + piece, style=style or "not bold default")
            console.print(text, markup=False)
            label = ""


def pairs(rows: list[tuple[str, str]], indent: str = "  ") -> None:
    """Print a list of names and values in two columns."""
    console = stdout()
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        label = name
        for piece in _wrapped(value, console, len(indent) + width + 2):
            line = Text(indent)
            line.append(label.ljust(width), style="bold")
            line.append(f"  {piece}")
            say(line)
            label = ""


def _wrapped(text: str, console: Console, taken: int) -> list[str]:
    """Break a line at spaces to fit beside `taken` columns of a terminal; never when piped."""
    if not console.is_terminal:
        return [text]
    return textwrap.wrap(text, max(24, console.width - taken), break_on_hyphens=False) or [""]


def duration(seconds: float) -> str:
    """Return a time such as 8s, 1m 20s or 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Return a number of bytes in decimal units, such as 1.85 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def facts_text(facts: dict[str, Fact]) -> str:
    """Return facts as one line: `reward 0.412  lr 0.001`; a missing value is a dash."""
    return "  ".join(f"{name} {_number(value)}" for name, value in facts.items())


def _number(value: Fact) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def progress(console: Console | None = None) -> Iterator["BarProgress | LineProgress"]:
    """Yield the progress for this terminal: bars on a TTY, plain lines elsewhere."""
    console = console or stderr()
    if not console.is_terminal or console.is_dumb_terminal:
        yield LineProgress(console)
        return
    bars = BarProgress(console)
    try:
        yield bars
    finally:
        bars.close()


class BarProgress:
    """Progress as bars with the time left; inner tasks vanish when they are over."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._ids: dict[str, TaskID] = {}

    def start(self, task: str, total: int | None) -> None:
        """Show a bar for `task`."""
        if task in self._ids:
            self.finish(task)
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=20 if self._console.width >= 100 else 8),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn(
                    "[dim]{task.fields[facts]}",
                    table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis"),
                ),
                console=self._console,
                expand=True,
            )
            self._bars.start()
        self._ids[task] = self._bars.add_task(task, total=total, facts="")

    def advance(self, task: str, n: int = 1, **facts: Fact) -> None:
        """Move the bar of `task`."""
        if self._bars is None or task not in self._ids:
            return
        shown = {"facts": facts_text(facts)} if facts else {}
        self._bars.update(self._ids[task], advance=n, **shown)  # type: ignore[arg-type]

    def finish(self, task: str) -> None:
        """Take the bar away; the last one stays on the screen if it counted anything."""
        if self._bars is None or task not in self._ids:
            return
        identity = self._ids.pop(task)
        if self._ids or self._bars.tasks[-1].total is None:
            self._bars.remove_task(identity)
        if not self._ids:
            self.close()

    def line(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing and give the cursor back."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._ids.clear()


@dataclass
class _Task:
    total: int | None
    started: float
    shown: float
    done: int = 0


class LineProgress:
    """Progress as plain lines: one for each step that has facts, otherwise one now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, _Task] = {}

    def start(self, task: str, total: int | None) -> None:
        """Begin to count."""
        now = time.monotonic()
        self._tasks[task] = _Task(total, now, now)

    def advance(self, task: str, n: int = 1, **facts: Fact) -> None:
        """Count, and say so where it is due."""
        state = self._tasks.get(task)
        if state is None:
            return
        state.done += n
        now = time.monotonic()
        if not facts and now - state.shown < _SILENT_SECONDS:
            return
        state.shown = now
        parts = [f"{task} {_count(state)}", facts_text(facts)]
        if state.total and 0 < state.done < state.total:
            left = (now - state.started) / state.done * (state.total - state.done)
            parts.append(f"eta {duration(left)}")
        self.line("  ".join(part for part in parts if part))

    def finish(self, task: str) -> None:
        """Say how long it took, if it took long enough to wonder."""
        state = self._tasks.pop(task, None)
        if state is None:
            return
        seconds = time.monotonic() - state.started
        if seconds >= _SILENT_SECONDS:
            counted = f" {_count(state)}" if state.done or state.total else ""
            self.line(f"{task}{counted}  done in {duration(seconds)}")

    def line(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _count(state: _Task) -> str:
    return str(state.done) if state.total is None else f"{state.done}/{state.total}"
