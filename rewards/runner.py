"""Running several rewards over a batch of pictures so that none can spoil the others.

Every reward works on private copies in a thread or in processes of its own, in batches, with a
time limit. What it returns is checked item by item. What could not be scored is None, with the
reason logged.

If a call fails as a whole (it raises or runs out of time), its pictures are tried once more, one at
a time, so that a bad picture costs only its own score. That is sound for rewards that judge each
picture by itself; one that compares the pictures of a call says so with `@reward(whole_batch=True)`
and is never split.

A call that did not come back (it hung, or its process ended) costs its time limit. After two such
batches the pictures are tried singly, in shuffled order, and after eight such pictures the rest is
given up unless more came back than did not. So a reward that always hangs costs ten time limits a
round (a coroutine that blocks its thread twice as many, see `rewards.hosting`), and pictures on
which it hangs cost only their own scores, up to half of the round.

A reward that has given no picture a score three times in a row (a judge that is down) is first
tried on up to three pictures, and asked for the rest only if one of them gets a score.

A Python thread cannot be stopped. A call that runs out of time in one is left behind; while 32
such calls have not come back, the reward is not called. A process is killed and started anew.
"""

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import RewardError
from common.images import refusal
from rewards.cache import ScoreCache, image_digest, reward_identity, score_key
from rewards.composition import Composition
from rewards.contract import RewardFunction, Score
from rewards.hosting import Call, Host, ThreadHost
from rewards.outcomes import BrokenContract, Outcome, Patience
from rewards.plugins import load_reward
from rewards.spec import RewardSpec
from rewards.workers import WorkerHost

__all__ = ["RewardRunner", "RewardSpec", "Scored"]

_LOG = logging.getLogger("atelier.rewards")
_BREAK_AFTER = 3
"""Rounds in a row without any score after which a reward is only probed."""
_PROBES = 3
_LOST_BATCHES = 2
_LOST_SINGLY = 8


@dataclass(frozen=True)
class Scored:
    """The scores of one picture.

    `parts` holds each reward's score by name. `counted` is what each reward with a weight counts,
    before its weight (see `rewards.composition`), and `total` the weighted sum; both are None if
    a reward that counts could not score the picture: a sum over what is left would not be
    comparable within a group. `reasons` says why a part is None, or how it came about. `details`
    is what a reward told beyond its score (see `Score`).
    """

    total: float | None
    parts: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, float] | None = None


@dataclass
class _Part:
    """A loaded reward with what the runner needs to know about it."""

    name: str
    function: RewardFunction
    host: Host
    processes: int
    identity: str  # empty where no score may be kept
    failed_rounds: int = 0
    broken: BrokenContract | None = None  # while set, what it says of one picture is no score
    seconds: float = 0.0


@dataclass(frozen=True)
class _Batch:
    """What all rewards score; `unusable` tells for which pictures nothing can be done, and why."""

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    unusable: Mapping[int, str]
    digests: Mapping[int, str]

    def call(self, places: Sequence[int]) -> Call:
        return Call(
            [self.images[i] for i in places],
            [self.prompts[i] for i in places],
            {key: [x[i] for i in places] for key, x in self.columns.items()},
        )


class RewardRunner:
    """Scores pictures with several rewards side by side, one call of `score` at a time.

    Close it, or use it as a context manager.

    Relative paths in columns that a reward opens start at `folder`, where the prompt file is
    (default: the working directory). With a `cache`, which the caller closes, pictures that a
    reward has scored before are not scored again.
    Raises RewardError for a reward that cannot be loaded and for names or gates that do not fit.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        batch_size: int = 32,
        folder: str | Path | None = None,
        cache: ScoreCache | None = None,
    ) -> None:
        if not specs:
            raise RewardError("no reward is given. Fix: name at least one.")
        if batch_size < 1:
            raise RewardError(f"batch_size is {batch_size}. Fix: write an integer of 1 or more.")
        self._batch_size = batch_size
        self._folder = Path(folder or "")
        self._cache = cache
        functions = [load_reward(spec.use, **spec.args) for spec in specs]
        names = _names(specs, functions)
        self.composition = Composition(dict(zip(names, specs, strict=True)))
        self._parts = [
            _Part(
                name,
                function,
                _host(function, spec),
                max(1, spec.workers),
                reward_identity(function) if cache and function.cacheable else "",
            )
            for name, function, spec in zip(names, functions, specs, strict=True)
        ]
        self._drivers = ThreadPoolExecutor(len(self._parts), thread_name_prefix="reward")

    @property
    def names(self) -> list[str]:
        """Names of the parts in the order given; a reward used again is called name#2."""
        return [part.name for part in self._parts]

    @property
    def whole_batch(self) -> list[str]:
        """Names of the rewards that compare the pictures of a call (see the module's text)."""
        return [part.name for part in self._parts if part.function.whole_batch]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each reward took in the last `score`."""
        return {part.name: part.seconds for part in self._parts}

    @property
    def path_columns(self) -> set[str]:
        """Columns whose text some reward opens as files."""
        return {name for part in self._parts for name in part.function.paths}

    def weights(self, step: int = 0) -> dict[str, float]:
        """Return each reward's weight at a training step."""
        return self.composition.weights(step)

    def check_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raise RewardError, naming the record, if some reward cannot score a prompt record."""
        for record in records:
            for part in self._parts:
                part.function.check_record(part.function.with_paths(record, self._folder))

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        step: int = 0,
    ) -> list[Scored]:
        """Return the scores of each picture, in order. Rewards run side by side.

        `columns` holds the further keys of the prompt records, one value for each picture; `step`
        decides scheduled weights. Raises RewardError only if the lengths differ; whatever a reward
        does becomes a None with a reason.
        """
        columns = columns or {}
        lengths = {"prompts": len(prompts), **{key: len(v) for key, v in columns.items()}}
        for key, length in lengths.items():
            if length != len(images):
                raise RewardError(f"`{key}` has {length} entries for {len(images)} images.")
        # Reading a lazily opened file here also keeps threads from reading it at once.
        unusable = {i: problem for i, x in enumerate(images) if (problem := refusal(x))}
        usable = set(range(len(images))) - set(unusable) if self._cache else ()
        digests = {i: image_digest(images[i]) for i in usable}
        batch = _Batch(images, prompts, columns, unusable, digests)
        futures = [self._drivers.submit(self._score_part, part, batch) for part in self._parts]
        by_part = [future.result() for future in futures]
        for problem, count in Counter(unusable.values()).items():
            _LOG.warning("%d of %d images were refused: %s", count, len(images), problem)
        scored = [self._combined(scores, step) for scores in zip(*by_part, strict=True)]
        log_failures([one for i, one in enumerate(scored) if i not in unusable])
        return scored

    def call_once(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> dict[str, tuple[Outcome, float]]:
        """Call each reward by itself on all pictures; return what came of it and the seconds.

        Nothing is retried, so that a reward's own behaviour shows.
        """
        results = {}
        for part in self._parts:
            call = Call(images, prompts, part.function.with_paths(columns, self._folder))
            started = time.perf_counter()
            [outcome] = part.host.run([call], Patience(1))
            results[part.name] = (outcome, time.perf_counter() - started)
        return results

    def close(self) -> None:
        """Let threads and processes end, also in the middle of a round (Ctrl-C).

        Calls that were left behind end with this process.
        """
        for part in self._parts:
            part.host.close()
        self._drivers.shutdown()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _combined(self, scores: Sequence[Score], step: int) -> Scored:
        pairs = list(zip(self.names, scores, strict=True))
        parts = {name: score.value for name, score in pairs}
        counted = self.composition.counted(parts, step)
        return Scored(
            self.composition.total(counted, step),
            parts,
            {name: score.reason for name, score in pairs if score.reason},
            {name: score.details for name, score in pairs if score.details},
            counted,
        )

    def _score_part(self, part: _Part, batch: _Batch) -> list[Score]:
        started = time.perf_counter()
        batch = replace(batch, columns=part.function.with_paths(batch.columns, self._folder))
        scores = {place: Score(None, problem) for place, problem in batch.unusable.items()}
        places = [place for place in range(len(batch.images)) if place not in scores]
        if self._cache is None or not part.identity:
            scores |= self._judge(part, batch, places)
        else:
            scores |= self._judge_new(self._cache, part, batch, places)
        part.seconds = time.perf_counter() - started
        return [scores[place] for place in range(len(batch.images))]

    def _judge_new(
        self, cache: ScoreCache, part: _Part, batch: _Batch, places: Sequence[int]
    ) -> dict[int, Score]:
        """Score only what is not in the cache, and equal pictures of equal prompts once."""
        seen = [name for name in batch.columns if part.function.sees(name)]
        keys = {
            i: score_key(
                part.identity,
                batch.digests[i],
                batch.prompts[i],
                {name: batch.columns[name][i] for name in seen},
                part.function.paths,
            )
            for i in places
        }
        known = cache.get(keys.values())
        first = {key: i for i, key in reversed(keys.items()) if key not in known}
        fresh = self._judge(part, batch, sorted(first.values()))
        new = {keys[i]: score for i, score in fresh.items()}
        cache.put(new)
        return {i: (known | new)[key] for i, key in keys.items()}

    def _judge(self, part: _Part, batch: _Batch, places: Sequence[int]) -> dict[int, Score]:
        """Call the reward for these pictures: in batches, then singly where a batch failed."""
        if not places:
            return {}
        whole = part.function.whole_batch
        scores: dict[int, Score] = {}
        probed = part.failed_rounds >= _BREAK_AFTER and not part.broken and not whole
        if probed and len(places) > _PROBES:
            step = len(places) // _PROBES
            probes = places[part.failed_rounds % step :: step][:_PROBES]  # others every time
            scores, reasons = _call(part, batch, probes, 1)
            scores |= {i: Score(None, reason) for i, reason in reasons.items()}
            if not _any_value(scores):
                note = (
                    f"it was only tried on {_PROBES} pictures, because none got a score in the "
                    f"last {part.failed_rounds} rounds: {scores[probes[0]].reason}"
                )
                part.failed_rounds += 1
                return dict.fromkeys(places, Score(None, note)) | scores
        rest = [place for place in places if place not in scores]
        size = len(rest) if whole else self._size(len(rest), part.processes)
        judged, again = _call(part, batch, rest, size)
        if not whole and size > 1 and len(rest) > 1:
            singly = [i for i, why in again.items() if not isinstance(why, BrokenContract)]
            for reason in sorted({again[i] for i in singly}):
                _LOG.warning(
                    "reward `%s`: a call failed (%s); its images are scored one by one",
                    part.name,
                    reason,
                )
            retried, failed = _call(part, batch, singly, 1)
            judged |= retried
            again = {i: why for i, why in again.items() if i not in judged} | failed
        scores |= judged | {i: Score(None, reason) for i, reason in again.items()}
        part.failed_rounds = 0 if _any_value(scores) else part.failed_rounds + 1
        return scores

    def _size(self, count: int, processes: int) -> int:
        """Return the pictures in a call: alike in all, and so that no process stays idle."""
        rounds = math.ceil(count / (self._batch_size * processes))
        return math.ceil(count / max(1, rounds * processes))


def _any_value(scores: Mapping[int, Score]) -> bool:
    return any(score.value is not None for score in scores.values())


def _call(
    part: _Part, batch: _Batch, places: Sequence[int], size: int
) -> tuple[dict[int, Score], dict[int, str]]:
    """Call the reward for each `size` pictures; return the scores by place, and for the places of
    calls that failed as a whole the reason."""
    patience = Patience(_LOST_BATCHES)
    if size == 1:
        patience = Patience(_LOST_SINGLY)
        places = random.Random(0).sample(places, len(places))  # bad ones often stand together
    chunks = [places[i : i + size] for i in range(0, len(places), max(1, size))]
    scores: dict[int, Score] = {}
    failed: dict[int, str] = {}
    outcomes = part.host.run(list(map(batch.call, chunks)), patience)
    several = [outcome for chunk, outcome in zip(chunks, outcomes, strict=True) if len(chunk) > 1]
    if any(isinstance(outcome, list) for outcome in several):
        part.broken = None
    else:
        broken = (outcome for outcome in several if isinstance(outcome, BrokenContract))
        part.broken = next(broken, part.broken)
    for chunk, outcome in zip(chunks, outcomes, strict=True):
        if part.broken and len(chunk) == 1:
            failed |= dict.fromkeys(chunk, part.broken)
        elif isinstance(outcome, str):
            failed |= dict.fromkeys(chunk, outcome)
        else:
            scores |= zip(chunk, outcome, strict=True)
    return scores, failed


def _names(specs: Sequence[RewardSpec], functions: Sequence[RewardFunction]) -> list[str]:
    """Return a name for each reward; of those without a given one, the second is called name#2."""
    names: list[str] = []
    used = Counter[str]()
    for spec, function in zip(specs, functions, strict=True):
        name = spec.name or function.name
        used[name] += 1
        if spec.name is not None and used[name] > 1:
            raise RewardError(f"two rewards are called `{name}`. Fix: give one another name.")
        names.append(name if used[name] == 1 else f"{name}#{used[name]}")
    return names


def _host(function: RewardFunction, spec: RewardSpec) -> Host:
    if spec.workers == 0:
        return ThreadHost(function, spec.timeout_s)
    return WorkerHost(function, spec.use, spec.timeout_s, spec.workers)


def log_failures(scored: Sequence[Scored]) -> None:
    """Log how many pictures each reward could not score, for each reason."""
    failed = Counter(
        (name, one.reasons.get(name, ""))
        for one in scored
        for name, value in one.parts.items()
        if value is None
    )
    for (name, reason), count in failed.items():
        _LOG.warning(
            "reward `%s`: %d of %d images could not be scored: %s",
            name,
            count,
            len(scored),
            reason,
        )
