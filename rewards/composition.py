"""How the scores of several rewards become one number.

A score s of a reward counts as c = (s - low) / (high - low), with `range` [low, high], or as it
is without one. Where its gate is shut, c is 0. A picture's total is the sum of weight(step) * c.
"""

from collections.abc import Mapping

from common.errors import RewardError
from common.registry import nearest
from rewards.spec import RewardSpec


class Composition:
    """The weights, ranges and gates of a run's rewards, by name.

    Raises RewardError for a gate on a reward that is not there, or on itself.
    """

    def __init__(self, specs: Mapping[str, RewardSpec]) -> None:
        self._specs = dict(specs)
        for name, spec in self._specs.items():
            if spec.only_if is None or spec.only_if.reward in set(self._specs) - {name}:
                continue
            others = [other for other in self._specs if other != name]
            close = nearest(spec.only_if.reward, others)
            fix = f"Did you mean `{close}`?" if close else f"Use: {', '.join(others) or '-'}."
            raise RewardError(
                f"reward `{name}`: only_if names `{spec.only_if.reward}`, which is no other reward "
                f"of this run. {fix}"
            )

    def weights(self, step: int) -> dict[str, float]:
        """Return each reward's weight at a training step (the first is 0)."""
        return {
            name: spec.weight * _factor(spec.schedule, step) for name, spec in self._specs.items()
        }

    def counted(self, parts: Mapping[str, float | None], step: int) -> dict[str, float] | None:
        """Return what each reward with a weight at this step counts for one picture, unweighted.

        None if any of them could not score the picture and its gate is not shut, or if its gate
        could not be scored: a sum over the rest would not be comparable within a group.
        """
        counted = {}
        for name, weight in self.weights(step).items():
            if weight == 0:
                continue
            value = self._one(self._specs[name], parts[name], parts)
            if value is None:
                return None
            counted[name] = value
        return counted

    def total(self, counted: Mapping[str, float] | None, step: int) -> float | None:
        """Return the weighted sum; None of None."""
        if counted is None:
            return None
        weights = self.weights(step)
        return sum(weights[name] * value for name, value in counted.items())

    def _one(
        self, spec: RewardSpec, score: float | None, parts: Mapping[str, float | None]
    ) -> float | None:
        if spec.only_if is not None:
            opener = parts[spec.only_if.reward]
            if opener is None:
                return None
            if opener < spec.only_if.at_least:
                return 0.0
        if score is None or spec.range is None:
            return score
        low, high = spec.range
        return (score - low) / (high - low)


def _factor(schedule: tuple[tuple[int, float], ...] | None, step: int) -> float:
    """Return the factor at a step: linear between the points, constant before and after them."""
    if schedule is None:
        return 1.0
    (before, factor) = schedule[0]
    if step <= before:
        return factor
    for after, target in schedule[1:]:
        if step <= after:
            return factor + (target - factor) * (step - before) / (after - before)
        before, factor = after, target
    return factor
