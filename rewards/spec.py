"""What a run says about one of its rewards: which, with what arguments, and how it counts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from common.errors import RewardError


@dataclass(frozen=True)
class Gate:
    """A reward counts only where another one's score is at least this much."""

    reward: str
    at_least: float


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run.

    `use` and `args` are what `load_reward` takes. `timeout_s` limits one call. `workers` 0 runs it
    in a thread of this process, n > 0 in n processes of its own (one thread each), which is safe
    from crashes and uses several cores. `name` is how logs and gates call it (default: its own).

    How it counts is in `rewards.composition`: `weight` (0 = logged, not counted), `schedule`
    (points (step, factor) of a factor on the weight), `range` (the scores that become 0 and 1, the
    greater one first where less is better) and `only_if`.
    """

    use: str
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    name: str | None = None
    workers: int = 0
    schedule: tuple[tuple[int, float], ...] | None = None
    range: tuple[float, float] | None = None
    only_if: Gate | None = None

    def __post_init__(self) -> None:
        """Raise RewardError for a value that cannot be meant."""
        self._require(math.isfinite(self.weight), "weight", self.weight, "write a number")
        self._require(
            math.isfinite(self.timeout_s) and self.timeout_s > 0,
            "timeout_s", self.timeout_s, "write seconds above 0",
        )  # fmt: skip
        self._require(self.workers >= 0, "workers", self.workers, "write 0 or more")
        if self.schedule is not None:
            steps = [step for step, _ in self.schedule]
            rising = bool(steps) and all(a < b for a, b in pairwise(steps))
            finite = all(math.isfinite(factor) for _, factor in self.schedule)
            fix = "write points [step, factor] with rising steps"
            self._require(rising and finite, "schedule", self.schedule, fix)
        if self.range is not None:
            usable = self.range[0] != self.range[1] and all(map(math.isfinite, self.range))
            self._require(usable, "range", self.range, "write two different scores")
        if self.only_if is not None:
            least = self.only_if.at_least
            self._require(math.isfinite(least), "only_if.at_least", least, "write a score")

    def _require(self, holds: bool, key: str, value: Any, fix: str) -> None:
        if not holds:
            raise RewardError(f"reward `{self.use}`: {key} is {value}. Fix: {fix}.")


def spec_from(entry: Mapping[str, Any]) -> RewardSpec:
    """Return the spec of an entry of a recipe's `rewards.functions`, given as a mapping."""
    gate = entry.get("only_if")
    return RewardSpec(**{**entry, "only_if": Gate(**gate) if gate else None})
