"""Trying rewards out before a run: prompt records, and one call on four synthetic pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rewards.outcomes import Outcome
from rewards.runner import RewardRunner, RewardSpec

_PICTURES = 4
_SIDE = 64


@dataclass(frozen=True)
class RewardTrial:
    """How a reward did on four synthetic pictures: its scores, what went wrong, and the time.

    `problems` is empty if every picture got a number. A `whole_batch` reward compares the pictures
    of a call.
    """

    name: str
    scores: tuple[float | None, ...]
    problems: tuple[str, ...]
    seconds: float
    whole_batch: bool


def try_rewards(
    specs: Sequence[RewardSpec],
    records: Sequence[Mapping[str, Any]],
    folder: str | Path | None = None,
) -> list[RewardTrial]:
    """Check all prompt records, then call each reward once, by itself, on four synthetic pictures.

    The pictures (grey, a gradient, a red disc, noise) go with the first records, in turn.
    `folder` is where the prompt file is (see `RewardRunner`).
    Raises RewardError if a reward cannot be loaded or a record cannot be scored (it is named);
    exceptions, a wrong length, NaN, a wrong type or a timeout in the call are `problems`.
    """
    chosen = [records[i % len(records)] for i in range(_PICTURES)] if records else []
    prompts = [str(record.get("prompt", "")) for record in chosen]
    keys = {key for record in chosen for key in record if key != "prompt"}
    columns = {str(key): [record.get(key) for record in chosen] for key in keys}
    with RewardRunner(specs, folder=folder) as runner:
        runner.check_records(records)
        results = runner.call_once(synthetic_pictures()[: len(chosen)], prompts, columns)
        whole = runner.whole_batch
    return [_trial(n, outcome, seconds, n in whole) for n, (outcome, seconds) in results.items()]


def _trial(name: str, outcome: Outcome, seconds: float, whole_batch: bool) -> RewardTrial:
    if isinstance(outcome, str):
        return RewardTrial(name, (None,) * _PICTURES, (outcome,), seconds, whole_batch)
    problems = dict.fromkeys(score.reason for score in outcome if score.value is None)
    values = tuple(score.value for score in outcome)
    return RewardTrial(name, values, tuple(problems), seconds, whole_batch)


def synthetic_pictures() -> list[Image.Image]:
    """Return four 64 x 64 RGB pictures: grey, a gradient, a red disc on white, noise."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    grey = np.full((_SIDE, _SIDE, 3), 128)
    gradient = np.stack([x * 4, y * 4, 255 - x * 4], axis=-1)
    inside = np.hypot(x - _SIDE / 2, y - _SIDE / 2) < _SIDE / 4
    disc = np.where(inside[..., None], (214, 30, 36), (255, 255, 255))
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3))
    return [Image.fromarray(p.astype(np.uint8)) for p in (grey, gradient, disc, noise)]
