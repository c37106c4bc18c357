"""Intervals of means near the ends of what values may be."""

import numpy as np
import pytest

from common.statistics import mean_interval, paired_difference

SIX_TASKS = [task for task, size in enumerate((6, 6, 6, 10, 12, 39)) for _ in range(size)]


def test_the_mean_over_tasks_lies_in_its_interval_where_everything_is_right() -> None:
    right, wrong = np.ones(79), np.zeros(79)
    assert mean_interval(right, range(79), SIX_TASKS).high == 1.0
    assert mean_interval(wrong, range(79), SIX_TASKS).low == 0.0
    assert paired_difference(wrong, right, range(79), SIX_TASKS).high == 1.0


@pytest.mark.parametrize("rate", [0.99, 0.999])
def test_the_mean_over_tasks_covers_rates_near_1(rate: float) -> None:
    rng = np.random.default_rng(6)
    clusters = np.arange(79).repeat(4)
    tasks = np.repeat(SIX_TASKS, 4)
    covered = 0
    for run in range(100):
        own = rng.beta(2 * rate, 2 * (1 - rate), (79, 1))
        values = (rng.random((79, 4)) < own).astype(float).ravel()
        found = mean_interval(values, clusters, tasks, resamples=400, seed=run)
        covered += found.low <= rate <= found.high
    assert covered >= 88  # 0.95 less three standard errors; without what is shown 59 and 0


@pytest.mark.parametrize("amounts", [False, True])
@pytest.mark.parametrize("prompts", [6, 10])
def test_scores_near_0_and_1_cover_the_truth(prompts: int, amounts: bool) -> None:
    """Probabilities, nine prompts of ten above 0.98 and one below 0.02."""
    rng = np.random.default_rng(3)
    covered = 0
    for run in range(200):
        right = rng.random(prompts) < 0.9
        values = np.where(right, 0.98, 0.0) + rng.uniform(0, 0.02, prompts)
        found = mean_interval(values, range(prompts), amounts=amounts, resamples=500, seed=run)
        covered += found.low <= 0.892 <= found.high  # 0.9 * 0.98 + 0.01
    assert covered / 200 >= 0.90


def test_five_prompts_that_agree_can_find_no_difference_of_rates() -> None:
    """The sign-flip test of five prompts cannot give p < 0.05, even for a difference of 1."""
    found = paired_difference([0.0] * 5, [1.0] * 5, range(5))
    assert found.p_value == 2 / 2**5
    assert found.minimum_detectable is None


@pytest.mark.parametrize("amount", [0.0, 1.0, 3.0])
def test_equal_amounts_say_nothing_of_how_large_others_may_be(amount: float) -> None:
    assert mean_interval([amount] * 20, range(20), amounts=True).low is None
    assert paired_difference([amount] * 20, [amount] * 20, range(20), amounts=True).low is None
