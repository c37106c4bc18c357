"""Running several rewards over a batch of pictures so that none can spoil the others.

Every reward works on private copies in a thread of its own, in batches, with a time limit. What it
returns is checked item by item. What could not be scored is None, with the reason logged.

If a call fails as a whole (it raises, runs out of time or returns the wrong number of scores), its
pictures are tried once more, one at a time, so that one bad picture costs only its own score.
That is sound for rewards that judge each picture by itself; one that compares the pictures of
a call says so with `@reward(whole_batch=True)` and is never split.

A Python thread cannot be stopped. A call that runs out of time is left behind; after three such
calls that have not come back, the reward is not called again until one does.
"""

import logging
import math
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import RewardError
from rewards.contract import RewardFunction, Score
from rewards.hosting import CallHost, CallTimeout, HostBusy
from rewards.plugins import load_reward

_LOG = logging.getLogger("atelier.rewards")


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run: what `load_reward` takes, its weight, its time limit for one call.

    A weight of 0 means that the reward is logged and not counted.
    """

    use: str
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0


@dataclass(frozen=True)
class Scored:
    """The scores of one picture.

    `total` is the sum of weight x score, None if any reward that has a weight could not score
    the picture: a sum over what is left would not be comparable within a group. `parts` holds
    each reward's score by name. `reasons` says why a part is None, or how it came about.
    `details` is what a reward told beyond its score (see `Score`).
    """

    total: float | None
    parts: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A loaded reward with what the runner needs to know about it."""

    name: str
    function: RewardFunction
    spec: RewardSpec
    host: CallHost


@dataclass(frozen=True)
class _Batch:
    """What all rewards score; `unusable` tells for which pictures nothing can be done, and why."""

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    unusable: Mapping[int, str]


class RewardRunner:
    """Scores pictures with several rewards at once. Close it, or use it as a context manager.

    `folder` is where "file.py:function" is looked up (default: the working directory).
    Raises RewardError for a reward that cannot be loaded and for a bad weight or time limit.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        batch_size: int = 32,
        folder: str | Path | None = None,
    ) -> None:
        if not specs:
            raise RewardError("no reward is given. Fix: name at least one.")
        if batch_size < 1:
            raise RewardError(f"batch_size is {batch_size}. Fix: write an integer of 1 or more.")
        self._batch_size = batch_size
        self._parts: list[_Part] = []
        used = Counter[str]()
        for spec in specs:
            _check_spec(spec)
            function = load_reward(_located(spec.use, folder), **spec.args)
            used[function.name] += 1
            number = used[function.name]
            name = function.name if number == 1 else f"{function.name}#{number}"
            self._parts.append(_Part(name, function, spec, CallHost(name, spec.timeout_s)))
        self._drivers = ThreadPoolExecutor(len(self._parts), thread_name_prefix="reward")

    @property
    def names(self) -> list[str]:
        """Names of the parts in the order given; a reward used again is called name#2."""
        return [part.name for part in self._parts]

    def check_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raise RewardError, naming the record, if some reward cannot score a prompt record."""
        for part in self._parts:
            for record in records:
                part.function.check_record(record)

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Scored]:
        """Return the scores of each picture, in order. Rewards run side by side.

        `columns` holds the further keys of the prompt records, one value for each picture. Raises
        RewardError only if the lengths differ; whatever a reward does becomes a None with a reason.
        """
        columns = columns or {}
        lengths = {"prompts": len(prompts), **{key: len(v) for key, v in columns.items()}}
        for key, length in lengths.items():
            if length != len(images):
                raise RewardError(f"`{key}` has {length} entries for {len(images)} images.")
        unusable = {i: problem for i, x in enumerate(images) if (problem := _unusable(x))}
        batch = _Batch(images, prompts, columns, unusable)
        futures = [self._drivers.submit(self._score_part, part, batch) for part in self._parts]
        by_part = [future.result() for future in futures]
        for part, scores in zip(self._parts, by_part, strict=True):
            _log_failures(part.name, scores)
        return [self._combined(scores) for scores in zip(*by_part, strict=True)]

    def close(self) -> None:
        """Let the threads end. Calls that were left behind end with the process."""
        self._drivers.shutdown()
        for part in self._parts:
            part.host.close()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _combined(self, scores: Sequence[Score]) -> Scored:
        pairs = list(zip(self._parts, scores, strict=True))
        total: float | None = 0.0
        for part, score in pairs:
            if part.spec.weight == 0:
                continue
            if score.value is None or total is None:
                total = None
            else:
                total += part.spec.weight * score.value
        return Scored(
            total,
            {part.name: score.value for part, score in pairs},
            {part.name: score.reason for part, score in pairs if score.reason},
            {part.name: score.details for part, score in pairs if score.details},
        )

    def _score_part(self, part: _Part, batch: _Batch) -> list[Score]:
        scores = {place: Score(None, problem) for place, problem in batch.unusable.items()}
        places = [place for place in range(len(batch.images)) if place not in scores]
        whole = part.function.whole_batch
        size = max(1, len(places)) if whole else self._batch_size
        again: list[int] = []
        for chunk, outcome in _outcomes(part, batch, places, size):
            if isinstance(outcome, Exception) and len(chunk) > 1 and not whole:
                again += chunk
            else:
                scores |= zip(chunk, _checked(outcome, len(chunk)), strict=True)
        for chunk, outcome in _outcomes(part, batch, again, 1):
            scores |= zip(chunk, _checked(outcome, len(chunk)), strict=True)
        return [scores[place] for place in range(len(batch.images))]


def _check_spec(spec: RewardSpec) -> None:
    if not math.isfinite(spec.weight):
        raise RewardError(f"reward `{spec.use}`: weight is {spec.weight}. Fix: write a number.")
    if not (math.isfinite(spec.timeout_s) and spec.timeout_s > 0):
        raise RewardError(
            f"reward `{spec.use}`: timeout_s is {spec.timeout_s}. Fix: write seconds above 0."
        )


def _located(use: str, folder: str | Path | None) -> str:
    path, colon, attribute = use.rpartition(":")
    if folder is None or not colon or not path.endswith(".py"):
        return use
    return f"{Path(folder) / path}:{attribute}"


def _unusable(image: Any) -> str | None:
    """Return why no reward can look at this picture, or None. Reads its file if it is still open.

    Reading it here also keeps the rewards' threads from reading the same file at once.
    """
    if not isinstance(image, Image.Image):
        return f"it is a {type(image).__name__}, not a PIL image"
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"the image cannot be read: {error}"
    return None


def _private(value: Any) -> Any:
    """Copy what a reward could change in place, so that the others see what they were given."""
    if isinstance(value, dict):
        return {key: _private(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_private(item) for item in value]
    if isinstance(value, Image.Image | np.ndarray):
        return value.copy()
    return value


def _outcomes(
    part: _Part, batch: _Batch, places: Sequence[int], size: int
) -> Iterator[tuple[list[int], list[Any] | Exception]]:
    """Call the reward once for each `size` pictures; yield their places with the list of scores
    or with what went wrong."""

    def call(chunk: Sequence[int]) -> Any:
        images = [batch.images[i].copy() for i in chunk]
        prompts = [batch.prompts[i] for i in chunk]
        columns = {key: [_private(x[i]) for i in chunk] for key, x in batch.columns.items()}
        return part.function(images, prompts, **columns)

    chunks = [list(places[i : i + size]) for i in range(0, len(places), size)]
    returned = part.host.run([partial(call, chunk) for chunk in chunks])
    for chunk, value in zip(chunks, returned, strict=True):
        yield chunk, _as_list(value, len(chunk))


def _as_list(value: Any, length: int) -> list[Any] | Exception:
    if isinstance(value, Exception):
        return value
    if hasattr(value, "tolist"):  # a NumPy array or a torch tensor
        try:
            value = value.tolist()
        except Exception as error:  # a tensor on a GPU reports its failure when it is read
            return error
    if not isinstance(value, list | tuple):
        return TypeError(f"it returned {type(value).__name__} instead of a list of scores")
    if len(value) != length:
        return ValueError(f"it returned {len(value)} scores for {length} images")
    return list(value)


def _checked(outcome: list[Any] | Exception, length: int) -> list[Score]:
    if isinstance(outcome, Exception):
        return [Score(None, _told(outcome))] * length
    return [_one_score(item) for item in outcome]


def _one_score(item: Any) -> Score:
    """Return a valid Score, its value None for whatever is not a finite number."""
    score = item if isinstance(item, Score) else Score(item)
    value: Any = score.value
    if value is None:
        return Score(None, score.reason or "the reward returned None", score.details)
    if getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
        value = value.item()
    if not isinstance(value, int | float):
        return Score(None, f"the reward returned {type(value).__name__}, not a number")
    if abs(value) == math.inf or value != value:
        return Score(None, f"the reward returned {value}", score.details)
    if abs(value) > sys.float_info.max:
        return Score(None, "the reward returned an integer too large for a score", score.details)
    return Score(float(value), score.reason, score.details)


def _told(error: Exception) -> str:
    """Return what went wrong and, for an error in the reward itself, in which line."""
    if isinstance(error, CallTimeout | HostBusy | RewardError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


def _log_failures(name: str, scores: Sequence[Score]) -> None:
    for reason, count in Counter(s.reason for s in scores if s.value is None).items():
        _LOG.warning(
            "reward `%s`: %d of %d images could not be scored: %s", name, count, len(scores), reason
        )
