"""How often 95 % intervals hold the truth, and how often equal policies look different.

    python -m benchmarks.coverage [RUNS]

Scores of 0 or 1, four pictures a prompt. A prompt's own rate varies (beta) so that two of its
pictures correlate at the given value. Printed for single tasks and for the mean over the scene
world's seven tasks: coverage and mean width of the score's interval; of the difference between two
equal policies, coverage, width, and the rate at which the permutation test rejects.
"""

import sys

import numpy as np

from common.statistics import mean_interval, paired_difference

SEEDS, RESAMPLES = 4, 1000
SIZES = (6, 6, 6, 10, 12, 40, 40)
CASES = {
    f"{prompts} prompts, rate {rate}": ((prompts,), (rate,))
    for prompts in (5, 6, 8, 10, 40)
    for rate in (0.5, 0.8, 0.95)
} | {
    "7 tasks, rates 0.3 to 0.95": (SIZES, (0.95, 0.8, 0.6, 0.8, 0.3, 0.4, 0.9)),
    "7 tasks, rate 0.97": (SIZES, (0.97,) * 7),
}


def main() -> None:
    """Print a row for each case and correlation."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(f"{runs} runs; the standard error of a coverage of 0.95 is {(0.0475 / runs) ** 0.5:.3f}")
    print(f"{'':<28}{'corr':>6}{'score':>8}{'width':>8}{'diff':>8}{'width':>8}{'p<.05':>8}")
    for correlation in (0.15, 0.5):
        for name, (sizes, rates) in CASES.items():
            row = "".join(f"{x:>8.3f}" for x in case(sizes, rates, correlation, runs))
            print(f"{name:<28}{correlation:>6}{row}", flush=True)


def case(
    sizes: tuple[int, ...], rates: tuple[float, ...], correlation: float, runs: int
) -> list[float]:
    """Return coverage and width of the score's interval, of the difference's, and rejections."""
    rng = np.random.default_rng(1)
    strength = 1 / correlation - 1
    clusters = [(t, p) for t, size in enumerate(sizes) for p in range(size) for _ in range(SEEDS)]
    tasks = [t for t, _ in clusters]
    totals = np.zeros(5)
    for run in range(runs):
        parts = zip(rates, sizes, strict=True)
        drawn = [rng.beta(strength * m, strength * (1 - m), size) for m, size in parts]
        own = np.concatenate(drawn).repeat(SEEDS)
        before, after = (rng.random((2, own.size)) < own).astype(float)
        score = mean_interval(before, clusters, tasks, resamples=RESAMPLES, seed=run)
        found = paired_difference(before, after, clusters, tasks, resamples=RESAMPLES, seed=run)
        assert score.low is not None
        assert score.high is not None
        assert found.low is not None
        assert found.high is not None
        totals += [
            score.low <= np.mean(rates) <= score.high,
            score.high - score.low,
            found.low <= 0 <= found.high,
            found.high - found.low,
            found.p_value <= 0.05,
        ]
    return list(totals / runs)


if __name__ == "__main__":
    main()
