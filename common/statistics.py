"""How sure a benchmark number is: cluster bootstrap, permutation test, Holm, detectable effect.

Pictures of one prompt are not independent, so the prompt is the unit that is resampled (the
cluster); prompts that ask for the same fact may share one. Where a score is a mean over tasks,
clusters are resampled within each task (the stratum); a cluster's name counts within its stratum.
Everything is seeded and vectorised: the same samples give the same interval.

Intervals: `common.bootstrap`. Source: Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from common.bootstrap import (
    AGREEING_RATE,
    AGREEING_SCORE,
    CHUNK_ELEMENTS,
    Floats,
    Stratum,
    Unseen,
    bootstrap_interval,
    cluster_range,
    is_rate,
    strata_of,
    value_range,
)

RESAMPLES = 10_000
ALONE = 0.25
"""Clusters' worth of weight for what no cluster showed, in the mean of a single stratum. By
simulation: without it, intervals of rates near 1 and of scores that are mostly 1 cover the truth in
0.89 to 0.91 of cases. Means over tasks and differences lie evenly enough about their mean."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    `low`, `high` and `standard_error` are None with fewer than `MIN_CLUSTERS` clusters, where a
    stratum has a single one, and where all values agree and nothing bounds them: no spread can be
    seen then. `samples` counts values.
    """

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    clusters: int
    samples: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference of means, with its sign-flip p-value and what it could have detected.

    `minimum_detectable` is the true difference that this number of clusters finds with probability
    0.8 at the 5 % level; None where no standard error exists, and where it would be more than 1
    for values in [0, 1].
    """

    p_value: float
    minimum_detectable: float | None


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    amounts: bool = False,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the mean of `values` [n] with its cluster bootstrap interval.

    `clusters` [n] names the prompt of each value. With `strata` [n] (the task of each value) the
    mean is the unweighted mean of the stratum means, and clusters are resampled within a stratum.
    Values that all agree in a single stratum get the exact bound with the clusters as trials.
    Values of 0 and 1 alone are taken for a rate, unless `amounts` says that others may come up;
    amounts that are all alike, at 0 too, have no interval.
    Raises ValueError for no values, non-finite values or unequal lengths.
    """
    array = _finite(values)
    groups = strata_of(array, clusters, strata)
    mean = float(np.mean([group.mean for group in groups]))
    total = sum(group.size for group in groups)
    alone, unseen = ALONE if len(groups) == 1 else 0.0, None
    if is_rate(array) and not amounts:
        unseen = Unseen(0.0, 1.0, AGREEING_RATE, alone)
    else:
        span = value_range(array, amounts)
        if len(groups) > 1 or span != (0.0, 1.0):  # a single task near 1 may hide prompts near 0
            span = cluster_range(groups) or span
        unseen = Unseen(*span, AGREEING_SCORE, alone) if span else None
    found = bootstrap_interval(groups, unseen, confidence, resamples, seed)
    if found is None:
        return Estimate(mean, None, None, None, total, array.size)
    return Estimate(mean, found.low, found.high, found.error, total, array.size)


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    amounts: bool = False,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Return the mean of after - before, both [n] on the same prompts and seeds.

    The pairing is kept in every resample: a prompt carries all its pairs with it. `clusters`,
    `strata` and `amounts` as in `mean_interval`. Differences that all agree in a single stratum get
    the exact bound.
    """
    first, second = _finite(before), _finite(after)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} values before, {second.size} after: pairs are needed")
    change = second - first
    groups = strata_of(change, clusters, strata)
    mean = float(np.mean([group.mean for group in groups]))
    total = sum(group.size for group in groups)
    p_value = _sign_flip_p_value(groups, resamples, seed)
    both, unseen = np.concatenate([first, second]), None
    if is_rate(both) and not amounts:
        unseen = Unseen(-1.0, 1.0, AGREEING_RATE)
    elif changes := cluster_range(groups):
        reach = max(-changes[0], changes[1])  # either policy may be the better one elsewhere
        unseen = Unseen(-reach, reach, AGREEING_SCORE)
    elif span := value_range(both, amounts):
        unseen = Unseen(span[0] - span[1], span[1] - span[0], AGREEING_SCORE)
    found = bootstrap_interval(groups, unseen, confidence, resamples, seed)
    if found is None:
        return Difference(mean, None, None, None, total, change.size, p_value, None)
    detectable = minimum_detectable_effect(found.spread, found.freedom, alpha=1 - confidence)
    if len(groups) == 1 and groups[0].agrees:
        detectable = max(mean - found.low, found.high - mean)
    within = not amounts and both.min() >= 0 and both.max() <= 1
    finds = None if within and detectable > 1 else detectable
    return Difference(mean, found.low, found.high, found.error, total, change.size, p_value, finds)


def minimum_detectable_effect(
    standard_error: float, degrees_of_freedom: float, *, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Return the true difference that a two-sided test at `alpha` finds with probability `power`.

    `(t[1 - alpha / 2] + t[power]) * standard_error`; 2.80 standard errors for many prompts.
    """
    quantiles = stats.t.ppf([1 - alpha / 2, power], degrees_of_freedom)
    return float(quantiles.sum() * standard_error)


def clusters_needed(effect: float, spread: float, strata: int = 1) -> int:
    """Return the smallest number K of clusters whose `minimum_detectable_effect` is `effect`.

    `spread` is the standard error times sqrt(K), which does not depend on K: for one stratum the
    standard deviation of the clusters' mean differences. At least two clusters in each of the
    `strata` are returned. Raises ValueError for an effect that is not above 0.
    """
    if not effect > 0:
        raise ValueError(f"the effect is {effect}: only a difference above 0 can be looked for")

    def enough(clusters: int) -> bool:
        error = spread / clusters**0.5
        freedom = clusters - strata
        return minimum_detectable_effect(error, freedom) <= effect

    low, high = 2 * strata, 2 * strata
    while not enough(high):
        low, high = high, 2 * high
    return low + bisect_left(range(low, high), True, key=enough)


@dataclass(frozen=True)
class Components:
    """What the paired differences of one task vary by.

    `between` is the variance of the clusters' true differences, `within` that of one pair of
    pictures around its cluster's.
    """

    between: float
    within: float

    def cluster_variance(self, pairs: float) -> float:
        """Return the variance of the mean difference of a cluster with that many pairs."""
        return self.between + self.within / pairs


def variance_components(change: ArrayLike, clusters: Sequence[Hashable]) -> Components:
    """Split the variance of paired differences [n] by one-way analysis of variance.

    `within` is pooled over the clusters; `between` is the moment estimate for clusters of unequal
    size (Searle, Casella and McCulloch, Variance Components, 1992, section 3.6), 0 where it would
    be negative. Raises ValueError without two clusters, or without a cluster of two pairs.
    """
    values = _finite(change)
    [group] = strata_of(values, clusters, None)
    pairs, size = values.size, group.size
    if size < 2 or pairs == size:
        raise ValueError(
            f"{pairs} pairs in {size} clusters: two clusters and a cluster of two pairs are needed"
        )
    squares = float(np.square(values).sum())
    explained = float((np.square(group.sums) / group.counts).sum())
    within = (squares - explained) / (pairs - size)
    usual = (pairs - float(np.square(group.counts).sum()) / pairs) / (size - 1)
    mean_square = (explained - float(values.sum()) ** 2 / pairs) / (size - 1)
    return Components(max(0.0, (mean_square - within) / usual), max(0.0, within))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for looking at all of them (Holm's step-down), order kept."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise ValueError("no values: a mean needs at least one scored sample")
    if not np.isfinite(array).all():
        raise ValueError("values hold NaN or infinity: leave unscored samples out and count them")
    return array


def _sign_flip_p_value(groups: Sequence[Stratum], flips: int, seed: int) -> float:
    """Two-sided p-value under "which policy is which" being arbitrary for each prompt.

    All sign patterns are counted where there are no more of them than `flips`; otherwise `flips`
    random ones, with the observed pattern added to both counts so that p is never 0.
    """
    weights = np.concatenate([group.sums / group.counts.sum() for group in groups])
    weights = weights[weights != 0]  # a prompt without a difference is the same either way
    if weights.size == 0:
        return 1.0
    observed = abs(weights.sum()) - 1e-12  # equal patterns must not differ by rounding
    if weights.size < 60 and 2**weights.size <= flips:
        bits = np.arange(2**weights.size)[:, None] >> np.arange(weights.size) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ weights) >= observed))
    generator = np.random.default_rng(seed)
    extreme = 0
    block = max(1, CHUNK_ELEMENTS // weights.size)
    for start in range(0, flips, block):
        size = (min(block, flips - start), weights.size)
        signs = generator.integers(2, size=size, dtype=np.int8) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(signs @ weights) >= observed))
    return (extreme + 1) / (flips + 1)
