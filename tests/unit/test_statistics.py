"""Intervals and tests against hand values, independent formulas and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bootstrap import satterthwaite
from common.statistics import (
    Components,
    clusters_needed,
    holm,
    mean_interval,
    minimum_detectable_effect,
    paired_difference,
    variance_components,
)


def binary_prompts(rng: np.random.Generator, prompts: int, seeds: int) -> tuple[np.ndarray, list]:
    """Correlated 0/1 outcomes: every prompt has its own success rate, mean 0.5."""
    rates = rng.beta(1.0, 1.0, size=prompts)
    outcomes = rng.random((prompts, seeds)) < rates[:, None]
    return outcomes.ravel().astype(float), [p for p in range(prompts) for _ in range(seeds)]


def test_mean_and_counts() -> None:
    estimate = mean_interval([1, 0, 1, 1], ["a", "a", "b", "b"], resamples=200)
    assert estimate.low is None  # of two clusters
    assert estimate.mean == pytest.approx(0.75)
    assert (estimate.clusters, estimate.samples) == (2, 4)


def test_standard_error_of_equal_clusters_is_that_of_the_cluster_means() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(30, 4))
    clusters = [p for p in range(30) for _ in range(4)]
    estimate = mean_interval(values, clusters, resamples=200)
    expected = values.mean(axis=1).std(ddof=1) / math.sqrt(30)
    assert estimate.standard_error == pytest.approx(expected, rel=1e-9)


def test_overall_is_the_mean_over_tasks_not_over_pictures() -> None:
    values = [1.0] * 2 + [0.0] * 6 + [1.0, 0.0]
    tasks = ["few"] * 2 + ["many"] * 8
    estimate = mean_interval(values, list(range(10)), tasks, resamples=200)
    assert estimate.mean == pytest.approx((1.0 + 1 / 8) / 2)


@pytest.mark.parametrize("prompts", [20, 60])
def test_interval_covers_the_truth(prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    runs = 500
    covered = 0
    for run in range(runs):
        values, clusters = binary_prompts(rng, prompts, seeds=4)
        estimate = mean_interval(values, clusters, resamples=600, seed=run)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.5 <= estimate.high
    # 0.95 plus or minus three standard errors of 500 Bernoulli trials, 0.01 for finite resamples
    assert 0.915 <= covered / runs <= 0.985


def test_interval_of_a_mean_over_tasks_covers_the_truth() -> None:
    """Three tasks of unequal size and difficulty, with clusters of one or two prompts."""
    rng = np.random.default_rng(21)
    sizes, means = (12, 30, 60), (0.2, 0.5, 0.8)
    runs, seeds = 400, 4
    covered = 0
    for run in range(runs):
        values, clusters, tasks = [], [], []
        for task, (size, mean) in enumerate(zip(sizes, means, strict=True)):
            rates = rng.beta(2 * mean, 2 * (1 - mean), size=size)
            for cluster, rate in enumerate(rates):
                pictures = seeds * (1 + cluster % 2)  # a mirrored prompt shares its partner's rate
                values += list((rng.random(pictures) < rate).astype(float))
                clusters += [cluster] * pictures
                tasks += [task] * pictures
        estimate = mean_interval(values, clusters, tasks, resamples=500, seed=run)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.91 <= covered / runs <= 0.985


SIZES = (6, 6, 6, 10, 12, 40, 40)


def draw_scores(rng: np.random.Generator, own: np.ndarray) -> np.ndarray:
    """1 with each prompt's own probability, else uniform: mean (1 + own) / 2."""
    return np.where(rng.random(own.shape) < own, 1.0, rng.random(own.shape))


def draw_counts(rng: np.random.Generator, own: np.ndarray) -> np.ndarray:
    return rng.poisson(own).astype(float)


@pytest.mark.parametrize(
    ("draw", "rates"),
    [
        # In most tasks nearly all pictures have the same value.
        (draw_scores, (0.98, 0.98, 0.98, 0.98, 0.9, 0.5, 0.7)),
        (draw_counts, (0.01, 0.01, 0.02, 0.02, 0.1, 0.3, 0.2)),
    ],
)
def test_scores_and_counts_cover_the_truth_where_many_tasks_agree(draw, rates) -> None:
    rng = np.random.default_rng(5)
    runs, seeds = 250, 4
    truth = np.mean(rates if draw is draw_counts else [(1 + rate) / 2 for rate in rates])
    clusters = [c for size in SIZES for c in range(size) for _ in range(seeds)]
    tasks = [t for t, size in enumerate(SIZES) for _ in range(size * seeds)]
    covered = excluded = rejected = agreeing = 0
    for run in range(runs):
        parts = zip(rates, SIZES, strict=True)
        own = [
            rng.gamma(4, rate / 4, size) if draw is draw_counts
            else rng.beta(4 * rate, 4 * (1 - rate), size)
            for rate, size in parts
        ]  # fmt: skip
        pictures = np.concatenate(own).repeat(seeds)
        before, after = draw(rng, pictures), draw(rng, pictures)
        agreeing += np.ptp(before[: 6 * seeds]) == 0
        score = mean_interval(before, clusters, tasks, resamples=400, seed=run)
        change = paired_difference(before, after, clusters, tasks, resamples=400, seed=run)
        covered += score.low <= truth <= score.high
        excluded += not change.low <= 0 <= change.high
        rejected += change.p_value <= 0.05
    assert agreeing / runs > 0.3  # else this shows nothing
    assert covered / runs >= 0.90  # 0.95 less three standard errors and finite resamples
    assert excluded / runs <= 0.09
    assert rejected / runs <= 0.09


def test_tasks_without_extra_objects_do_not_drown_what_the_others_show() -> None:
    """Seven tasks, five of which never show an extra object: the interval follows the other two."""
    rng = np.random.default_rng(0)
    before, clusters, tasks = [], [], []
    for task, size in enumerate(SIZES):
        for cluster in range(size):
            before += list(rng.poisson(0.6, 4) if task >= 5 else np.zeros(4))
            clusters += [cluster] * 4
            tasks += [task] * 4
    found = paired_difference(before, np.zeros(len(before)), clusters, tasks)
    assert found.p_value < 0.001
    assert found.low < found.mean < found.high < 0


def test_amounts_that_happen_to_be_0_and_1_are_no_rate() -> None:
    """Six tasks without an extra object and one with three: at the least, as few are plausible."""
    values = [1.0] * 3 + [0.0] * 57 + [0.0] * 36
    tasks = [0] * 60 + [1 + number // 6 for number in range(36)]
    rate = mean_interval(values, range(96), tasks)
    amount = mean_interval(values, range(96), tasks, amounts=True)
    assert rate.mean == amount.mean == pytest.approx(0.05 / 7)
    assert amount.low < amount.mean < amount.high < rate.high / 1.5


def test_ignoring_the_clusters_would_cover_too_rarely() -> None:
    """The simulation above can fail: with every picture its own cluster the coverage collapses."""
    rng = np.random.default_rng(1)
    covered = 0
    for run in range(300):
        values, _ = binary_prompts(rng, 40, seeds=4)
        estimate = mean_interval(values, list(range(values.size)), resamples=400, seed=run)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.5 <= estimate.high
    assert covered / 300 < 0.90


def test_false_positive_rate_of_interval_and_test() -> None:
    """Two equal policies on shared prompts: about one comparison in twenty may look different."""
    rng = np.random.default_rng(7)
    runs, prompts, seeds = 500, 30, 4
    clusters = [p for p in range(prompts) for _ in range(seeds)]
    excluded = rejected = 0
    for run in range(runs):
        rates = rng.beta(1.0, 1.0, size=(prompts, 1))
        before = (rng.random((prompts, seeds)) < rates).astype(float)
        after = (rng.random((prompts, seeds)) < rates).astype(float)
        result = paired_difference(before, after, clusters, resamples=600, seed=run)
        assert result.low is not None
        assert result.high is not None
        excluded += result.low > 0 or result.high < 0
        rejected += result.p_value <= 0.05
    assert 0.015 <= excluded / runs <= 0.085
    assert 0.015 <= rejected / runs <= 0.08


def test_holm_keeps_the_rate_of_any_false_positive_over_tasks() -> None:
    """Two equal policies on six tasks: in one comparison of twenty some task may look different."""
    rng = np.random.default_rng(13)
    runs, tasks, prompts, seeds = 300, 6, 20, 4
    clusters = [p for p in range(prompts) for _ in range(seeds)]
    raw = adjusted = 0
    for run in range(runs):
        p_values = []
        for _ in range(tasks):
            rates = rng.beta(1.0, 1.0, size=(prompts, 1))
            before = (rng.random((prompts, seeds)) < rates).astype(float)
            after = (rng.random((prompts, seeds)) < rates).astype(float)
            result = paired_difference(before, after, clusters, resamples=250, seed=run)
            p_values.append(result.p_value)
        raw += min(p_values) <= 0.05
        adjusted += min(holm(p_values)) <= 0.05
    assert adjusted / runs <= 0.09  # 0.05 and three standard errors
    assert raw / runs > 0.13  # without Holm it would be about 1 - 0.95 ** 6 = 0.26


def test_power_at_the_detectable_effect() -> None:
    """A true effect as large as the stated detectable one is found about four times in five."""
    rng = np.random.default_rng(11)
    prompts, runs = 40, 400
    effect = minimum_detectable_effect(1 / math.sqrt(prompts), prompts - 1)
    found = 0
    for run in range(runs):
        change = rng.normal(effect, 1.0, size=prompts)
        result = paired_difference(
            np.zeros(prompts), change, list(range(prompts)), resamples=500, seed=run
        )
        found += result.p_value <= 0.05
    assert 0.73 <= found / runs <= 0.87


def test_detectable_effect_of_many_prompts_is_2_80_standard_errors() -> None:
    # 1.959964 + 0.841621, the normal quantiles of any table
    assert minimum_detectable_effect(0.01, 10**7) == pytest.approx(0.02801585, abs=1e-6)


def test_clusters_needed_by_the_normal_formula() -> None:
    # (1.959964 + 0.841621)^2 * (0.5 / 0.02)^2 = 4905.5 for many clusters; t adds about two
    assert clusters_needed(0.02, 0.5) == pytest.approx(4907.5, abs=1.5)


@given(st.floats(0.02, 0.5), st.floats(0.05, 1.0), st.integers(1, 6))
def test_clusters_needed_is_the_smallest_number(effect: float, spread: float, strata: int) -> None:
    needed = clusters_needed(effect, spread, strata)

    def detectable(clusters: int) -> float:
        return minimum_detectable_effect(spread / math.sqrt(clusters), clusters - strata)

    assert detectable(needed) <= effect
    assert needed == 2 * strata or detectable(needed - 1) > effect


def test_clusters_needed_gives_the_power_it_promises() -> None:
    """With that many prompts the permutation test finds the difference about four times in five."""
    rng = np.random.default_rng(17)
    known, seeds, effect, runs = Components(between=0.03, within=0.2), 4, 0.15, 400
    needed = clusters_needed(effect, math.sqrt(known.cluster_variance(seeds)))
    clusters = [c for c in range(needed) for _ in range(seeds)]
    found = 0
    for run in range(runs):
        true = rng.normal(effect, math.sqrt(known.between), size=(needed, 1))
        change = true + rng.normal(0, math.sqrt(known.within), size=(needed, seeds))
        result = paired_difference(
            np.zeros(change.shape), change, clusters, resamples=400, seed=run
        )
        found += result.p_value <= 0.05
    assert 0.73 <= found / runs <= 0.87


def test_an_effect_of_nothing_cannot_be_looked_for() -> None:
    with pytest.raises(ValueError, match="above 0"):
        clusters_needed(0.0, 1.0)


def test_variance_components_by_hand() -> None:
    # Clusters (1, 3) and (4, 8): means 2 and 6, grand mean 4. Within squares 2 + 8 = 10 on 2
    # degrees of freedom; mean square between 2 * (4 + 4) / 1 = 16; (16 - 5) / 2 = 5.5.
    found = variance_components([1, 3, 4, 8], ["a", "a", "b", "b"])
    assert (found.within, found.between) == (pytest.approx(5.0), pytest.approx(5.5))
    assert found.cluster_variance(4) == pytest.approx(5.5 + 5.0 / 4)


def test_variance_components_are_found_in_clusters_of_unequal_size() -> None:
    rng = np.random.default_rng(4)
    values: list[float] = []
    clusters: list[int] = []
    for cluster in range(4000):
        pairs = 2 + cluster % 3
        values += list(rng.normal(0, 0.3) + rng.normal(0, 0.5, size=pairs))
        clusters += [cluster] * pairs
    found = variance_components(values, clusters)
    assert found.between == pytest.approx(0.09, rel=0.1)
    assert found.within == pytest.approx(0.25, rel=0.05)


def test_equal_clusters_have_no_variance_between_them() -> None:
    assert variance_components([0, 1, 1, 0], ["a", "a", "b", "b"]).between == 0.0
    with pytest.raises(ValueError, match="two clusters"):
        variance_components([0, 1], ["a", "b"])


def test_pairing_is_used() -> None:
    """Prompts differ a lot, the policies by a constant: only the paired interval sees it."""
    rng = np.random.default_rng(3)
    before = rng.normal(0, 10, size=50)
    after = before + 0.5 + rng.normal(0, 0.01, size=50)
    result = paired_difference(before, after, list(range(50)), resamples=500)
    assert result.low is not None
    assert result.high is not None
    assert result.mean == pytest.approx(0.5, abs=0.01)
    assert 0.48 < result.low < result.high < 0.52


def test_exact_sign_flip_p_value_by_enumeration() -> None:
    change = [0.5, 0.25, -0.25, 0.75, 1.0, 0.5]
    patterns = [
        abs(sum(s * c for s, c in zip(signs, change, strict=True)))
        for signs in itertools.product([-1, 1], repeat=6)
    ]
    expected = sum(p >= abs(sum(change)) - 1e-9 for p in patterns) / len(patterns)
    result = paired_difference([0.0] * 6, change, list(range(6)), resamples=100)
    assert result.p_value == pytest.approx(expected)


def test_random_sign_flips_agree_with_enumeration() -> None:
    rng = np.random.default_rng(2)
    change = rng.normal(0.3, 1.0, size=12)
    names = list(range(12))
    exact = paired_difference(np.zeros(12), change, names, resamples=5000).p_value
    sampled = paired_difference(np.zeros(12), change, names, resamples=4000).p_value
    assert sampled == pytest.approx(exact, abs=0.03)


def test_no_difference_at_all() -> None:
    result = paired_difference([1, 0, 1, 0, 1], [1, 0, 1, 0, 1], list("abcde"), resamples=100)
    reach = 1 - 0.025 ** (1 / 5)  # the share of other prompts, each 1 off at most
    assert (result.mean, result.p_value) == (0.0, 1.0)
    assert (result.low, result.high) == pytest.approx((-reach, reach))


@pytest.mark.parametrize("clusters", [1, 4])
def test_fewer_than_five_prompts_have_no_interval(clusters: int) -> None:
    values = [float(i % 2) for i in range(2 * clusters)]
    names = [i // 2 for i in range(2 * clusters)]
    estimate = mean_interval(values, names)
    assert estimate.mean == 0.5
    assert (estimate.low, estimate.high, estimate.standard_error) == (None, None, None)
    difference = paired_difference([0.0] * len(values), values, names)
    assert (difference.low, difference.minimum_detectable) == (None, None)
    assert difference.p_value <= 1


def test_a_task_of_a_single_prompt_leaves_the_mean_over_tasks_without_an_interval() -> None:
    values = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    assert mean_interval(values, range(7), ["a"] * 6 + ["b"]).low is None
    assert mean_interval(values, range(7), ["a"] * 5 + ["b"] * 2).low is not None


def test_equal_amounts_of_unknown_range_have_no_interval() -> None:
    assert mean_interval([21.5] * 20, range(20)).low is None
    assert paired_difference([21.5] * 20, [22.5] * 20, range(20)).low == pytest.approx(
        1 - 2 * (1 - 0.025 ** (1 / 20))  # of values between 21.5 and 22.5 others lose 1 at most
    )


def test_degrees_of_freedom_by_hand() -> None:
    assert satterthwaite([2.0, 2.0], [4, 4]) == pytest.approx(8)  # equal parts add up
    assert satterthwaite([1.0, 0.0], [5, 100]) == pytest.approx(5)
    # (3 + 1)^2 / (9 / 6 + 1 / 2)
    assert satterthwaite([3.0, 1.0], [6, 2]) == pytest.approx(8)


def test_all_correct_is_not_certainty() -> None:
    """Clopper-Pearson for 10 of 10 at 95 % two-sided: lower bound 0.6915 (Agresti's tables)."""
    estimate = mean_interval([1.0] * 10, list(range(10)))
    assert estimate.low == pytest.approx(0.6915, abs=1e-4)
    assert estimate.high == 1.0
    assert mean_interval([0.0] * 10, list(range(10))).high == pytest.approx(0.3085, abs=1e-4)


def test_same_seed_same_interval() -> None:
    values, clusters = binary_prompts(np.random.default_rng(0), 20, 2)
    assert mean_interval(values, clusters, seed=4) == mean_interval(values, clusters, seed=4)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "no values"),
        ([1.0, float("nan")], ["a", "b"], "NaN"),
        ([1.0, 2.0], ["a"], "cluster names"),
    ],
)
def test_bad_input(values: list[float], clusters: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(values, clusters)


def test_holm_by_hand() -> None:
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1 = 0.02 0.03 0.06 0.04, then made non-decreasing
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values)) + 1e-12


def test_equal_differences_do_not_make_a_sure_thing() -> None:
    """8 prompts that all gain 1 leave 1 - 0.025 ** (1 / 8) = 37 % of others open, at most 2 off."""
    found = paired_difference([0.0] * 16, [1.0] * 16, [i // 2 for i in range(16)])
    share = 1 - 0.025 ** (1 / 8)
    assert found.mean == 1.0
    assert (found.low, found.high) == pytest.approx((1 - 2 * share, 1.0))
    assert found.minimum_detectable == pytest.approx(2 * share)


# --- the suite that is used: tasks of 5 to 40 prompts --------------------------------------------

SIZES = (6, 6, 6, 10, 12, 40, 40)
"""Independent prompts of the tasks of the scene world's suite with signs."""
RATES = (0.95, 0.8, 0.6, 0.8, 0.3, 0.4, 0.9)


def correlated(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> np.ndarray:
    """0/1 outcomes [prompts, seeds] whose pictures of one prompt correlate at 1 / 3."""
    rates = rng.beta(2 * mean, 2 * (1 - mean), size=(shape[0], 1))
    return (rng.random(shape) < rates).astype(float)


@pytest.mark.parametrize("prompts", [5, 8, 40])
@pytest.mark.parametrize("rate", [0.5, 0.85])
def test_intervals_of_few_prompts_cover_the_truth(prompts: int, rate: float) -> None:
    rng = np.random.default_rng(prompts)
    clusters = [p for p in range(prompts) for _ in range(4)]
    runs, covered = 300, 0
    for run in range(runs):
        values = correlated(rng, rate, (prompts, 4))
        found = mean_interval(values, clusters, resamples=1000, seed=run)
        covered += found.low <= rate <= found.high
    assert covered / runs >= 0.93 - 3 * (0.93 * 0.07 / runs) ** 0.5  # may be wide, not narrow


@pytest.mark.parametrize("rates", [RATES, (0.97,) * 7])
def test_the_mean_over_tasks_of_unequal_size_covers_the_truth(rates: tuple[float, ...]) -> None:
    """The plain expanded bootstrap covers 0.92 and 0.85 here."""
    rng = np.random.default_rng(4)
    clusters = [(t, p) for t, size in enumerate(SIZES) for p in range(size) for _ in range(4)]
    tasks = [t for t, _ in clusters]
    runs, covered = 200, 0
    for run in range(runs):
        parts = [correlated(rng, rate, (k, 4)) for rate, k in zip(rates, SIZES, strict=True)]
        values = np.concatenate([part.ravel() for part in parts])
        found = mean_interval(values, clusters, tasks, resamples=500, seed=run)
        covered += found.low <= np.mean(rates) <= found.high
    assert covered / runs >= 0.91


def test_two_equal_policies_on_tasks_of_unequal_size_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(5)
    clusters = [(t, p) for t, size in enumerate(SIZES) for p in range(size) for _ in range(4)]
    tasks = [t for t, _ in clusters]
    runs, excluded, rejected = 200, 0, 0
    for run in range(runs):
        sides = []
        rates = [rng.beta(2 * m, 2 * (1 - m), (k, 1)) for m, k in zip(RATES, SIZES, strict=True)]
        for _ in range(2):
            drawn = [(rng.random((len(r), 4)) < r).astype(float).ravel() for r in rates]
            sides.append(np.concatenate(drawn))
        found = paired_difference(*sides, clusters, tasks, resamples=500, seed=run)
        excluded += found.low > 0 or found.high < 0
        rejected += found.p_value <= 0.05
    assert excluded / runs <= 0.10  # 0.05 and three standard errors
    assert rejected / runs <= 0.10
