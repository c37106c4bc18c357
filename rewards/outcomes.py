"""What a call of a reward came to: valid scores, or the reason why there are none."""

import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import RewardError
from rewards.contract import Score

LARGEST = 1e15
"""Trainers take standard deviations in float32, whose squares end at 1.8e19: beyond it the spread
of a group, and with it every picture's advantage, would be no number."""


class BrokenContract(str):
    """The reason for a call whose return value is no list, or a list of one for several pictures.

    Such a function is not asked again picture by picture: of one picture, a function that returns
    the mean of its batch looks as if it kept the contract.
    """


class Lost(str):
    """The reason for a call that did not come back: it hung, or its process ended or never began.

    Such a call costs a time limit or the start of a process, so few of them are made.
    """


class Patience:
    """How many calls of a round may be lost before no more are made.

    After `least` lost calls the reward is given up unless more calls came back than were lost. So
    pictures on which a reward hangs cost only their own scores, however many they are, while one
    that hangs on everything costs `least` time limits.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._lost = self._back = 0

    @property
    def over(self) -> bool:
        """Whether no further call should be made."""
        return self._lost >= self._least and self._lost > self._back

    def note(self, outcome: Any) -> None:
        """Count the outcome of a call."""
        lost = isinstance(outcome, Lost)
        self._lost += lost
        self._back += not lost

    @property
    def reason(self) -> str:
        """Why there is no further call."""
        return f"{self._lost} calls did not come back, so it was not called again"


Outcome = list[Score] | str
"""The scores of a call, one for each picture, or why the call failed as a whole."""


def outcome_of(value: Any, length: int) -> Outcome:
    """Check what a reward returned for `length` pictures, item by item."""
    if hasattr(value, "tolist"):  # a NumPy array or a torch tensor
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return BrokenContract(f"it returned {type(value).__name__} instead of a list of scores")
    if len(value) != length:
        reason = f"it returned {len(value)} scores for {length} images"
        return BrokenContract(reason) if len(value) == 1 else reason
    return [_one_score(item) for item in islice(value, length)]


def told(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    """Return what went wrong and, for an error in the reward itself, in which line.

    That is the last one in a file beside `function`, the reward's own: what it called in a library
    says less.
    """
    if isinstance(error, RewardError):
        return _writable(str(error))
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code})"
    try:
        text = _writable(f"{type(error).__name__}: {error}")
    except Exception:  # its own __str__ may do anything
        text = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    folder = Path(code.co_filename).parent if code else None
    own = [frame for frame in frames if Path(frame.filename).parent == folder]
    last = (own or frames)[-1:]
    return text + "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in last)


def too_late(timeout_s: float) -> Lost:
    """Return the reason for a call that ran out of time."""
    return Lost(f"it did not return within {timeout_s:g} s")


def _one_score(item: Any) -> Score:
    """Return a valid Score, its value None for whatever is not a finite number."""
    score = item if isinstance(item, Score) else Score(item)
    value: Any = score.value
    reason = _writable(str(score.reason or ""))
    try:
        details = _as_json(score.details)
    except (TypeError, ValueError, RecursionError) as error:
        return Score(None, f"the reward's details are no JSON object: {error}")
    if value is None:
        return Score(None, reason or "the reward returned None", details)
    if getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
        value = value.item()
    if not isinstance(value, int | float):
        return Score(None, f"the reward returned {type(value).__name__}, not a number")
    if abs(value) == math.inf or value != value:
        return Score(None, f"the reward returned {value}", details)
    if abs(value) > LARGEST:
        return Score(None, f"the reward returned a number over {LARGEST:g}: too large", details)
    return Score(float(value), reason, details)


def _as_json(details: Any) -> dict[str, Any]:
    """Return details as they are when read back from JSON, so that they can go anywhere.

    JSON has no infinity and no NaN: they become None.
    """
    if not isinstance(details, Mapping):
        raise TypeError(f"they are a {type(details).__name__}")
    if not details:
        return {}
    text = _writable(json.dumps(dict(details), default=_plain, ensure_ascii=False))
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)
    return plain


def _writable(text: str) -> str:
    """Return text that can be written as UTF-8: half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    """Return numbers for arrays and text for other objects."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
