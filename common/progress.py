"""How long work reports that it goes on. Only the command line draws; the rest calls this."""

from typing import Protocol


class Progress(Protocol):
    """Named tasks that start, advance and finish. A task may run inside another one."""

    def start(self, task: str, total: int | None) -> None:
        """Begin `task`, which takes `total` steps (None = unknown). Starting again restarts it."""

    def advance(self, task: str, n: int = 1, **facts: float | int | str | None) -> None:
        """`n` more steps of `task` are done; `facts` are shown beside it (such as reward=0.41)."""

    def finish(self, task: str) -> None:
        """`task` is over, whether or not all its steps were taken."""

    def line(self, text: str) -> None:
        """Say one thing that stays on the screen."""


class SilentProgress:
    """A Progress that shows nothing."""

    def start(self, task: str, total: int | None) -> None:
        """Do nothing."""

    def advance(self, task: str, n: int = 1, **facts: float | int | str | None) -> None:
        """Do nothing."""

    def finish(self, task: str) -> None:
        """Do nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""
