"""What a benchmark suite is: prompts, a scorer for one picture, and what its numbers mean."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from numbers import Real
from typing import Any, Literal, TypeVar

from PIL import Image

from common.errors import UsageError

Record = Mapping[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Metric:
    """How one value of a sample is named and read.

    `kind` is "rate" (in [0, 1], shown in per cent) or "amount" (shown as it is).
    """

    label: str
    kind: Literal["rate", "amount"] = "rate"
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class SampleScore:
    """What the scorer says about one picture.

    `values` holds one number for each metric of the suite, None where it could not be scored, never
    0 instead. `reason` explains the headline value. `details` is JSON; where objects were located
    it has "objects": a list of {"label", "color", "score", "box": [left, top, right,
    bottom]} in pixels and "size": [width, height].
    """

    values: dict[str, float | None]
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A benchmark: prompt records, the scorer, and its metrics with the headline first.

    A record has `prompt`, `prompt_id`, `metadata` with `tag` (its task) and, where several prompts
    ask for the same fact, `cluster`: the statistics resample those prompts together.

    `not_comparable` says why the numbers must not be put beside a published leaderboard; None
    where they may. Raise `version` whenever prompts or rules change: results of different versions
    are never compared.
    """

    name: str
    title: str
    version: int
    records: tuple[Record, ...]
    score: Callable[[Any, Record], SampleScore]
    """Gets the picture that the policy made, or its answers where the suite asks questions."""
    metrics: Mapping[str, Metric]
    not_comparable: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides the scores (such as the detector): JSON. Results that differ in it are
    never paired. `load_suite` adds the options, files among them by their content."""
    pictures: int | None = None
    """Pictures for each prompt in the published protocol; None where it names no number."""
    workers: int = 1
    """Pictures scored at the same time, in threads: above 1 where a scorer waits for a judge."""
    reference: Callable[[Record], Image.Image] | None = None
    """The picture to edit, or to ask about, of a record; None where prompts alone are drawn."""
    answers: bool = False
    """The policy answers each of a record's `questions` about its reference, and draws nothing."""
    several: Callable[[Record], Sequence[Image.Image]] | None = None
    """All pictures that a record's questions are about; None where that is its reference alone."""
    published: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]] | None = None
    """The numbers that publications show, from rows of samples.jsonl that were scored; None where
    the means over tasks are those."""
    close: Callable[[], None] = lambda: None
    """Ends what the scorer has started; calls that are under way are waited for no longer."""

    @property
    def headline(self) -> str:
        """Name of the metric that comparisons are decided on."""
        return next(iter(self.metrics))

    def from_prompts_alone(self) -> "Suite":
        """Return the suite itself; raise UsageError if it shows the policy pictures."""
        if self.reference is not None:
            raise UsageError(
                f"suite `{self.name}` shows the policy pictures, and training draws from prompts "
                "alone.\n    Fix: take another suite in the recipe; use this one with "
                "`atelier eval`."
            )
        return self

    def comparability(self, seeds: int, limit: int | None) -> str | None:
        """Return why an evaluation must not stand beside a published leaderboard; None if it may.

        `limit` prompts of this whole suite are used, `seeds` pictures of each.
        """
        reasons = [self.not_comparable] if self.not_comparable else []
        if limit is not None and limit < len(self.records):
            reasons.append(f"{limit} of {len(self.records)} prompts were used")
        if self.pictures is not None and seeds != self.pictures:
            reasons.append(f"{seeds} pictures per prompt instead of {self.pictures}")
        return "; ".join(reasons) or None

    def limited(self, limit: int | None) -> "Suite":
        """Return the suite with at most `limit` prompts, the tasks taking turns.

        A smaller limit's prompts are always among a larger one's.
        """
        if limit is None or limit >= len(self.records):
            return self
        return replace(self, records=tuple(in_turn(self.records, task_of)[:limit]))


def in_turn(items: Iterable[Item], task: Callable[[Item], str]) -> list[Item]:
    """Return the items with their tasks taking turns, in order within each task."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(task(item), []).append(item)
    rounds = zip_longest(*by_task.values())
    return [item for turn in rounds for item in turn if item is not None]


def checked(score: SampleScore, suite: Suite) -> SampleScore:
    """Return a score as it can be stored; without any value, and why, where it cannot.

    Anybody's scorer may leave out a metric, give no finite number, or details that are no JSON.
    """
    wrong = [f"no value for `{name}`" for name in suite.metrics if name not in score.values]
    wrong += [
        f"{value!r} for `{name}` is no finite number"
        for name, value in score.values.items()
        if value is not None and not (isinstance(value, Real) and math.isfinite(value))
    ]
    try:
        text = json.dumps([score.reason, score.details], allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:  # what JSON or UTF-8 cannot hold
        wrong.append(f"its reason or details are no JSON ({error})")
    if not isinstance(score.details, Mapping):
        wrong.append("its details are no dictionary")
    if wrong:
        why = "; ".join(wrong).encode(errors="backslashreplace").decode()
        return SampleScore(dict.fromkeys(suite.metrics), f"could not be scored: {why}")
    values = {name: None if x is None else float(x) for name, x in score.values.items()}
    return replace(score, values=values)


def task_of(record: Record) -> str:
    """Return the task that a prompt belongs to (GenEval's tag)."""
    return str(record["metadata"]["tag"])
