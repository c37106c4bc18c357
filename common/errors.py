"""Errors that a user can act on. Each message names the file or key and one fix.

`exit_code` is what the command line returns: 1 failed, 2 wrong use, 75 interrupted but resumable.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class AtelierError(Exception):
    """Base of all errors that are shown to the user as one message without a traceback."""

    exit_code = 1


class UsageError(AtelierError):
    """A command that cannot do what it was asked, as it was asked."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a recipe: where it stands, what was seen and the one fix."""

    where: str
    """`file.yaml:12`, `override` or the file alone."""
    key: str
    """Dotted key, or "" when the problem has none."""
    message: str
    fix: str
    seen: str | None = None
    """The value that was found, as text; None where there is none."""

    def __str__(self) -> str:
        head = f"{self.where}  {self.key}" if self.key else self.where
        if self.seen is not None:
            head += f" = {self.seen}"
        return f"{head}\n    {self.message}\n    Fix: {self.fix}"


class RecipeError(AtelierError):
    """A recipe that cannot be used as written. `problems` lists them one by one, where known."""

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class PolicyError(AtelierError):
    """A policy folder that is incomplete, damaged or of the wrong kind."""


class RewardError(AtelierError):
    """A reward function that cannot be found, loaded or called as asked."""


class DataError(AtelierError):
    """Prompts or images that cannot be read."""


class RunError(AtelierError):
    """A run that cannot start, go on or be read."""


class Interrupted(AtelierError):
    """A run that was stopped from outside after its state was saved: it can be resumed."""

    exit_code = 75
