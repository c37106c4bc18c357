"""How often 95 % intervals hold the truth, and how often equal policies look different.

    python -m benchmarks.coverage [RUNS]

Four pictures a prompt, of three kinds of metric: a rate (0 or 1), a score in [0, 1] (1 where the
picture is right, else anything below it, all alike) and a count (Poisson). A prompt's own rate
varies (beta, gamma) so that two of its pictures are alike. Printed for single tasks and for the
mean over the scene world's six tasks: coverage and mean width of the score's interval; of the
difference between two equal policies, coverage, width, and the rate at which the permutation test
rejects.
"""

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.statistics import mean_interval, paired_difference

SEEDS, RESAMPLES = 4, 1000
SIZES = (6, 6, 6, 10, 12, 39)
RATES = {
    f"{prompts} prompts, {rate}": ((prompts,), (rate,))
    for prompts in (5, 6, 8, 10, 40)
    for rate in (0.5, 0.8, 0.95)
} | {
    "6 tasks, 0.3 to 0.95": (SIZES, (0.95, 0.8, 0.6, 0.8, 0.3, 0.4)),
    **{f"6 tasks, {rate}": (SIZES, (rate,) * 6) for rate in (0.97, 0.99, 0.999)},
}
COUNTS = {
    f"{prompts} prompts, {mean}": ((prompts,), (mean,))
    for prompts in (6, 10, 40)
    for mean in (0.1, 0.5, 2.0)
} | {
    "6 tasks, 0.02 to 0.5": (SIZES, (0.02, 0.1, 0.5, 0.02, 0.3, 0.2)),
    "6 tasks, 0.05": (SIZES, (0.05,) * 6),
}
Sizes, Means = tuple[int, ...], tuple[float, ...]
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, Floats], Floats]


def right_or_wrong(rng: np.random.Generator, own: Floats) -> Floats:
    """Return 1 with each prompt's own probability, else 0."""
    return (rng.random(own.shape) < own).astype(float)


def partly_right(rng: np.random.Generator, own: Floats) -> Floats:
    """Return 1 with each prompt's own probability, else a score that is uniform in [0, 1]."""
    return np.where(rng.random(own.shape) < own, 1.0, rng.random(own.shape))


def counted(rng: np.random.Generator, own: Floats) -> Floats:
    """Return a number of objects with each prompt's own mean."""
    return rng.poisson(own).astype(float)


def main() -> None:
    """Print a row for each kind, case and spread of the prompts."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(f"{runs} runs; the standard error of a coverage of 0.95 is {(0.0475 / runs) ** 0.5:.3f}")
    print(f"{'':<34}{'alike':>6}{'score':>8}{'width':>8}{'diff':>8}{'width':>8}{'p<.05':>8}")
    for kind, draw, cases in (
        ("rate", right_or_wrong, RATES),
        ("score", partly_right, RATES),
        ("count", counted, COUNTS),
    ):
        for alike in (0.15, 0.5):
            for name, (sizes, means) in cases.items():
                row = "".join(f"{x:>8.3f}" for x in case(draw, sizes, means, alike, runs))
                print(f"{kind:<7}{name:<27}{alike:>6}{row}", flush=True)


def case(draw: Draw, sizes: Sizes, means: Means, alike: float, runs: int) -> list[float]:
    """Return coverage and width of the score's interval, of the difference's, and rejections."""
    rng = np.random.default_rng(1)
    clusters = [(t, p) for t, size in enumerate(sizes) for p in range(size) for _ in range(SEEDS)]
    tasks = [t for t, _ in clusters]
    truth = np.mean([0.5 + m / 2 if draw is partly_right else m for m in means])
    totals = np.zeros(5)
    for run in range(runs):
        parts = zip(means, sizes, strict=True)
        own = np.concatenate([_prompts(rng, draw, m, alike, size) for m, size in parts])
        before, after = draw(rng, own.repeat(SEEDS)), draw(rng, own.repeat(SEEDS))
        score = mean_interval(before, clusters, tasks, resamples=RESAMPLES, seed=run)
        found = paired_difference(before, after, clusters, tasks, resamples=RESAMPLES, seed=run)
        totals += [
            *_holds(score.low, score.high, float(truth)),
            *_holds(found.low, found.high, 0.0),
            found.p_value <= 0.05,
        ]
    return list(totals / runs)


def _prompts(rng: np.random.Generator, draw: Draw, mean: float, alike: float, size: int) -> Floats:
    """Return each prompt's own probability or mean."""
    strength = 1 / alike - 1
    if draw is counted:  # the spread of the prompts' means is sqrt(alike) times as wide as the mean
        return rng.gamma(1 / alike, mean * alike, size)
    return rng.beta(strength * mean, strength * (1 - mean), size)


def _holds(low: float | None, high: float | None, truth: float) -> tuple[float, float]:
    """Return whether an interval holds the truth, and its width; without one, that it does not."""
    if low is None or high is None:
        return 0.0, 0.0
    return float(low <= truth <= high), high - low


if __name__ == "__main__":
    main()
