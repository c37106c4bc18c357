"""The cluster bootstrap of a mean over strata, with what few clusters need.

A few clusters show too little spread. Three things make up for it: the percentile interval is
widened to the t quantile, whose degrees of freedom are Satterthwaite's where strata of unequal
size and spread are averaged; it is joined with one in which values that no cluster showed have a
small weight (`Unseen`); and fewer than `MIN_CLUSTERS` clusters get no interval.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993); Hesterberg, What Teachers
Should Know About the Bootstrap (2015), section 4 (the expanded percentile interval); Satterthwaite,
Biometrics Bulletin 2 (1946); Clopper and Pearson, Biometrika 26 (1934).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_CLUSTERS = 5
"""The means of fewer clusters say too little about the spread of others."""
CHUNK_ELEMENTS = 2_000_000  # bounds the memory of one block of resamples to about 32 MB
AGREEING_RATE, AGREEING_SCORE = 0.5, 0.1
"""Clusters' worth of weight for what was not seen in a stratum whose clusters all agree: Jeffreys'
prior for a rate; for scores and counts what covers best by simulation (`benchmarks.coverage`)."""


@dataclass(frozen=True)
class Stratum:
    """Sums [K] and counts [K] of the values of each of the K clusters of one stratum."""

    sums: Floats
    counts: Ints

    @property
    def size(self) -> int:
        """Number of clusters."""
        return len(self.sums)

    @property
    def mean(self) -> float:
        """Mean over all values."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def variance_of_mean(self) -> float:
        """Cluster-robust variance of the ratio mean, with the K / (K - 1) correction."""
        return self.size / (self.size - 1) * self.resampled_variance

    @property
    def resampled_variance(self) -> float:
        """The variance that resampled means have: smaller than it should be."""
        residuals = self.sums - self.mean * self.counts
        return float(np.square(residuals).sum() / self.counts.sum() ** 2)

    @property
    def agrees(self) -> bool:
        """Whether all clusters have one mean."""
        return bool(np.ptp(self.sums / self.counts) < 1e-12)

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


@dataclass(frozen=True)
class Unseen:
    """What clusters that were not drawn might show: means at the ends of the range [low, high].

    That is the range of a rate, 0 to 1, and of the scores of a single stratum that lie in it. Of
    other scores and counts it is what the clusters of any stratum show: a task without extra
    objects may have as many as the worst prompt of another task.
    `agreeing` clusters of that kind are added to a stratum whose clusters all agree, and `weight`
    to any other, as a Beta(weight, K + 1 - weight) share; the nearer end is the rarer.
    """

    low: float
    high: float
    agreeing: float
    weight: float = 0.0

    def weight_in(self, group: Stratum) -> float:
        """Return how many clusters of unseen values are added to a stratum."""
        return self.agreeing if group.agrees else self.weight

    def variance(self, group: Stratum) -> float:
        """Return what the unseen clusters add to the variance of a stratum's mean."""
        weight = self.weight_in(group)
        share = weight * (weight + 1) / ((group.size + 1) * (group.size + 2))
        below, above = group.mean - self.low, self.high - group.mean
        return share * (below**3 + above**3) / (below + above)

    def mixed_into(self, means: Floats, group: Stratum, generator: np.random.Generator) -> Floats:
        """Return resampled means, each with its own share of unseen clusters."""
        weight = self.weight_in(group)
        if weight == 0:
            return means
        share = generator.beta(weight, group.size + 1 - weight, size=means.size)
        above = (self.high - group.mean) / (self.high - self.low)
        ends = np.where(generator.random(means.size) < above, self.high, self.low)
        return means + share * (ends - means)

    def exact_bounds(self, group: Stratum, confidence: float) -> tuple[float, float]:
        """Return the exact interval of a stratum whose clusters all agree.

        If a share s of all clusters were of another kind, K that agree would come up with
        probability (1 - s)^K (Clopper and Pearson); those others lie at one end of the range.
        """
        share = 1 - ((1 - confidence) / 2) ** (1 / group.size)
        return (
            group.mean - share * (group.mean - self.low),
            group.mean + share * (self.high - group.mean),
        )


@dataclass(frozen=True)
class Interval:
    """An interval of a mean over strata.

    `error` is the standard error that the clusters show, `spread` the one with what they do not
    show, on which the interval stands, and `freedom` its degrees of freedom.
    """

    low: float
    high: float
    error: float
    spread: float
    freedom: float


def bootstrap_interval(
    groups: Sequence[Stratum], unseen: Unseen | None, confidence: float, resamples: int, seed: int
) -> Interval | None:
    """Return the interval of the unweighted mean over strata; None if there is too little for one.

    That is so with fewer than `MIN_CLUSTERS` clusters in all, a stratum of a single cluster, or a
    stratum whose clusters all agree without anything known of the `unseen`.
    """
    if sum(group.size for group in groups) < MIN_CLUSTERS or min(g.size for g in groups) < 2:
        return None
    if unseen is None and any(group.agrees for group in groups):
        return None
    extra = [unseen.variance(group) if unseen else 0.0 for group in groups]
    variances = [g.variance_of_mean + v for g, v in zip(groups, extra, strict=True)]
    resampled = [g.resampled_variance + v for g, v in zip(groups, extra, strict=True)]
    freedom = satterthwaite(variances, [group.size - 1 for group in groups])
    error = sum(group.variance_of_mean for group in groups) ** 0.5 / len(groups)
    spread = sum(variances) ** 0.5 / len(groups)
    if unseen and len(groups) == 1 and groups[0].agrees:
        return Interval(*unseen.exact_bounds(groups[0], confidence), error, spread, freedom)
    generator = np.random.default_rng(seed)
    shown, mixed = np.zeros((2, resamples))
    for group in groups:
        own = group.resampled_means(generator, resamples)
        shown += own / len(groups)
        mixed += (unseen.mixed_into(own, group, generator) if unseen else own) / len(groups)
    # The plain percentile interval is too narrow by (K - 1) / K of each stratum's variance and by
    # t against normal.
    expanded = (sum(variances) / sum(resampled)) ** 0.5 * stats.t.ppf((1 - confidence) / 2, freedom)
    tail = float(stats.norm.cdf(expanded))
    # Near an end of the range the unseen pull every resample one way, past the mean itself: what
    # the clusters show stays in the interval.
    mean = np.mean([group.mean for group in groups])
    ends = np.append(np.quantile([shown, mixed], [tail, 1 - tail], axis=1), mean)
    return Interval(float(ends.min()), float(ends.max()), error, spread, freedom)


def satterthwaite(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """Return the degrees of freedom of a sum of independent estimates of variance.

    The least certain part counts most: with one variance far above the others they are that part's.
    """
    parts = sum(v**2 / freedom for v, freedom in zip(variances, freedoms, strict=True))
    return sum(variances) ** 2 / parts


def value_range(values: Floats, amounts: bool) -> tuple[float, float] | None:
    """Return the range that values may take: [0, 1] where they lie in it, else the one seen.

    None where all are alike, outside [0, 1] or, if they are `amounts`, anywhere.
    """
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1 and not (amounts and low == high):
        return 0.0, 1.0
    return (low, high) if high > low else None


def cluster_range(groups: Sequence[Stratum]) -> tuple[float, float] | None:
    """Return the range of the clusters' means over all strata; None if they all agree."""
    means = np.concatenate([group.sums / group.counts for group in groups])
    low, high = float(means.min()), float(means.max())
    return (low, high) if high - low > 1e-12 else None


def is_rate(values: Floats) -> bool:
    """Return whether all values are 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def strata_of(
    values: Floats, clusters: Sequence[Hashable], strata: Sequence[Hashable] | None
) -> list[Stratum]:
    """Group values [n] by stratum (one if None) and cluster; ValueError if the lengths differ."""
    labels = [None] * values.size if strata is None else list(strata)
    if len(clusters) != values.size or len(labels) != values.size:
        raise ValueError(
            f"{values.size} values, {len(clusters)} cluster names, {len(labels)} stratum names"
        )
    members: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return [_stratum(values[rows], [clusters[i] for i in rows]) for rows in members.values()]


def _stratum(values: Floats, clusters: Sequence[Hashable]) -> Stratum:
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    sums = np.bincount(codes, weights=values).astype(np.float64)
    return Stratum(sums, np.bincount(codes))
