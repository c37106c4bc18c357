"""How sure a benchmark number is: cluster bootstrap, permutation test, Holm, detectable effect.

Pictures of one prompt are not independent, so the prompt is the unit that is resampled (the
cluster); prompts that ask for the same fact may share one. Where a score is a mean over tasks,
clusters are resampled within each task (the stratum); a cluster's name counts within its stratum.
Everything is seeded and vectorised: the same samples give the same interval.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993); Hesterberg, What Teachers
Should Know About the Bootstrap (2015), section 4 (the expanded percentile interval); Holm (1979).
"""

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 10_000
CHUNK_ELEMENTS = 2_000_000  # bounds the memory of one block of resamples to about 32 MB


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    `low`, `high` and `standard_error` are None where a stratum has fewer than two clusters: no
    spread between them can be seen then. `samples` counts values.
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
    0.8 at the 5 % level; None where no standard error exists.
    """

    p_value: float
    minimum_detectable: float | None


@dataclass(frozen=True)
class _Stratum:
    """Sums [K] and counts [K] of the values of each of the K clusters of one stratum."""

    sums: Floats
    counts: Ints

    @property
    def size(self) -> int:
        return len(self.sums)

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    @property
    def variance_of_mean(self) -> float:
        """Cluster-robust variance of the ratio mean, with the K / (K - 1) correction."""
        residuals = self.sums - self.mean * self.counts
        correction = self.size / (self.size - 1)
        return float(correction * np.square(residuals).sum() / self.counts.sum() ** 2)

    def resampled_means(self, generator: np.random.Generator, resamples: int) -> Floats:
        """Means [resamples] of K clusters drawn with replacement."""
        means = np.empty(resamples)
        block = max(1, CHUNK_ELEMENTS // self.size)
        for start in range(0, resamples, block):
            rows = min(block, resamples - start)
            drawn = generator.integers(self.size, size=(rows, self.size))
            counts = self.counts[drawn].sum(axis=1)
            means[start : start + rows] = self.sums[drawn].sum(axis=1) / counts
        return means


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the mean of `values` [n] with its cluster bootstrap interval.

    `clusters` [n] names the prompt of each value. With `strata` [n] (the task of each value) the
    mean is the unweighted mean of the stratum means, and clusters are resampled within a stratum.
    The interval is the percentile interval widened to the t quantile (Hesterberg's expansion),
    which keeps its coverage at 20 prompts. Rates that are 0 or 1 throughout get the exact binomial
    (Clopper-Pearson) bound with the prompts as trials, because resampling equal values shows no
    spread at all. Raises ValueError for no values, non-finite values or unequal lengths.
    """
    array = _finite(values)
    groups = _strata(array, clusters, strata)
    mean = float(np.mean([group.mean for group in groups]))
    total = sum(group.size for group in groups)
    if min(group.size for group in groups) < 2:
        return Estimate(mean, None, None, None, total, array.size)
    error = _standard_error(groups)
    if np.ptp(array) == 0 and array[0] in (0.0, 1.0):
        low, high = _exact_bounds(int(array[0]), total, confidence)
        return Estimate(mean, low, high, error, total, array.size)
    low, high = _bootstrap_bounds(groups, confidence, resamples, seed)
    return Estimate(mean, low, high, error, total, array.size)


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Return the mean of after - before, both [n] on the same prompts and seeds.

    The pairing is kept in every resample: a prompt carries all its pairs with it. `clusters` and
    `strata` as in `mean_interval`. If all clusters differ by the same, resampling shows no spread:
    the interval then allows for the share of other clusters that as many equal ones leave open
    (Clopper-Pearson), each as far off as values of the range seen, or of [0, 1], can be.
    """
    first, second = _finite(before), _finite(after)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} values before, {second.size} after: pairs are needed")
    change = second - first
    groups = _strata(change, clusters, strata)
    mean = float(np.mean([group.mean for group in groups]))
    total = sum(group.size for group in groups)
    p_value = _sign_flip_p_value(groups, resamples, seed)
    if min(group.size for group in groups) < 2:
        return Difference(mean, None, None, None, total, change.size, p_value, None)
    error = _standard_error(groups)
    if error < 1e-12:
        values = np.concatenate([first, second])
        span = 1.0 if values.min() >= 0 and values.max() <= 1 else float(np.ptp(values))
        reach = 2 * span * _exact_bounds(0, total, confidence)[1]
        return Difference(mean, mean - reach, mean + reach, 0.0, total, change.size, p_value, reach)
    low, high = _bootstrap_bounds(groups, confidence, resamples, seed)
    detectable = minimum_detectable_effect(error, total - len(groups), alpha=1 - confidence)
    return Difference(mean, low, high, error, total, change.size, p_value, detectable)


def minimum_detectable_effect(
    standard_error: float, degrees_of_freedom: int, *, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Return the true difference that a two-sided test at `alpha` finds with probability `power`.

    `(t[1 - alpha / 2] + t[power]) * standard_error`; 2.80 standard errors for many prompts.
    """
    quantiles = stats.t.ppf([1 - alpha / 2, power], degrees_of_freedom)
    return float(quantiles.sum() * standard_error)


def clusters_needed(
    effect: float, spread: float, strata: int = 1, *, power: float = 0.8, alpha: float = 0.05
) -> int:
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
        return minimum_detectable_effect(error, freedom, power=power, alpha=alpha) <= effect

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
    [group] = _strata(values, clusters, None)
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


def _strata(
    values: Floats, clusters: Sequence[Hashable], strata: Sequence[Hashable] | None
) -> list[_Stratum]:
    labels = [None] * values.size if strata is None else list(strata)
    if len(clusters) != values.size or len(labels) != values.size:
        raise ValueError(
            f"{values.size} values, {len(clusters)} cluster names, {len(labels)} stratum names"
        )
    members: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return [_stratum(values[rows], [clusters[i] for i in rows]) for rows in members.values()]


def _stratum(values: Floats, clusters: Sequence[Hashable]) -> _Stratum:
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    sums = np.bincount(codes, weights=values).astype(np.float64)
    return _Stratum(sums, np.bincount(codes))


def _standard_error(groups: Sequence[_Stratum]) -> float:
    return float(np.sqrt(sum(group.variance_of_mean for group in groups)) / len(groups))


def _bootstrap_bounds(
    groups: Sequence[_Stratum], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    means = np.mean([group.resampled_means(generator, resamples) for group in groups], axis=0)
    clusters = sum(group.size for group in groups)
    freedom = clusters - len(groups)
    # The plain percentile interval is too narrow by sqrt(K / (K - 1)) and by t against normal.
    expanded = np.sqrt(clusters / freedom) * stats.t.ppf((1 - confidence) / 2, freedom)
    tail = float(stats.norm.cdf(expanded))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _exact_bounds(value: int, trials: int, confidence: float) -> tuple[float, float]:
    edge = ((1 - confidence) / 2) ** (1 / trials)
    return (edge, 1.0) if value else (0.0, 1 - edge)


def _sign_flip_p_value(groups: Sequence[_Stratum], flips: int, seed: int) -> float:
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
