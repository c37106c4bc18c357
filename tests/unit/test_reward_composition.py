"""Weights over steps, ranges and gates: the numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import RewardError
from rewards import reward
from rewards.composition import Composition
from rewards.runner import RewardRunner
from rewards.spec import Gate, RewardSpec, spec_from

NUMBERS = st.floats(-100, 100)


def total_of(specs, parts, step=0):
    composition = Composition(specs)
    counted = composition.counted(parts, step)
    return composition.total(counted, step)


def test_a_sum_of_weighted_scores():
    specs = {"a": RewardSpec("a", 2.0), "b": RewardSpec("b", -0.5), "c": RewardSpec("c", 0.0)}
    assert total_of(specs, {"a": 0.25, "b": 1.0, "c": 9.0}) == 0.5 - 0.5
    assert total_of(specs, {"a": 0.25, "b": 1.0, "c": None}) == 0.0
    assert total_of(specs, {"a": 0.25, "b": None, "c": 9.0}) is None


@pytest.mark.parametrize(("score", "counts"), [(4.0, 0.0), (6.0, 1.0), (5.5, 0.75), (3.0, -0.5)])
def test_a_range_maps_its_ends_to_zero_and_one(score, counts):
    assert total_of({"a": RewardSpec("a", range=(4, 6))}, {"a": score}) == counts
    assert total_of({"a": RewardSpec("a", range=(6, 4))}, {"a": score}) == 1 - counts


def test_mean_and_standard_deviation_are_a_range():
    spec = RewardSpec("a", range=(5.5, 5.5 + 0.5))
    assert total_of({"a": spec}, {"a": 6.5}) == (6.5 - 5.5) / 0.5


@pytest.mark.parametrize(
    ("a", "b", "total"),
    [
        (0.7, 0.4, 0.7 + 0.4),  # at least means at least
        (0.69, 0.4, 0.69),
        (0.69, None, 0.69),  # what does not count is not missed
        (0.9, None, None),
        (None, 0.4, None),
    ],
)
def test_a_gate(a, b, total):
    specs = {"a": RewardSpec("a"), "b": RewardSpec("b", only_if=Gate("a", 0.7))}
    assert total_of(specs, {"a": a, "b": b}) == total


def test_a_gate_looks_at_the_score_before_its_range_and_may_be_a_reward_that_does_not_count():
    specs = {
        "a": RewardSpec("a", 0.0, range=(0, 100)),
        "b": RewardSpec("b", range=(0, 2), only_if=Gate("a", 50)),
    }
    assert total_of(specs, {"a": 50, "b": 1.0}) == 0.5
    assert total_of(specs, {"a": 49, "b": 1.0}) == 0.0
    assert total_of(specs, {"a": None, "b": 1.0}) is None


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (30, 0.6), (40, 0.2), (99, 0.2)]
)
def test_a_schedule_is_linear_between_its_points_and_constant_outside(step, factor):
    spec = RewardSpec("a", 3.0, schedule=((10, 0.0), (20, 1.0), (40, 0.2)))
    assert Composition({"a": spec}).weights(step)["a"] == pytest.approx(3 * factor)


def test_a_reward_that_is_scheduled_to_nothing_is_not_missed():
    specs = {"a": RewardSpec("a"), "b": RewardSpec("b", schedule=((0, 0.0), (10, 1.0)))}
    assert total_of(specs, {"a": 1.0, "b": None}, step=0) == 1.0
    assert total_of(specs, {"a": 1.0, "b": None}, step=1) is None


@given(NUMBERS, NUMBERS, NUMBERS, st.integers(0, 60))
def test_the_total_is_the_sum_of_weight_times_counted(a, b, threshold, step):
    specs = {
        "a": RewardSpec("a", 0.5, schedule=((0, 1.0), (50, 0.25))),
        "b": RewardSpec("b", 2.0, range=(-1, 3), only_if=Gate("a", threshold)),
    }
    share = 1 - 0.75 * min(step, 50) / 50
    expected = 0.5 * share * a + (2 * (b + 1) / 4 if a >= threshold else 0)
    assert total_of(specs, {"a": a, "b": b}, step) == pytest.approx(expected)


def test_gates_on_nothing_are_refused():
    with pytest.raises(RewardError, match=r"`ocrr`.*`ocr`"):
        Composition({"ocr": RewardSpec("ocr"), "b": RewardSpec("b", only_if=Gate("ocrr", 1))})
    with pytest.raises(RewardError, match="no other reward"):
        Composition({"b": RewardSpec("b", only_if=Gate("b", 1))})


def test_a_recipes_entry_becomes_a_spec():
    from recipes.schema_grpo import RewardFunction

    entry = RewardFunction.model_validate(
        {
            "use": "ocr", "name": "text", "weight": 0, "args": {"contains": False}, "workers": 2,
            "timeout_s": 3.0, "schedule": [[0, 1.0], [9, 0]], "range": [0.5, 1],
            "only_if": {"reward": "geneval", "at_least": 1.0},
        }
    )  # fmt: skip
    assert spec_from(entry.model_dump()) == RewardSpec(
        "ocr", 0, {"contains": False}, 3.0, "text", 2, ((0, 1.0), (9, 0)), (0.5, 1),
        Gate("geneval", 1.0),
    )  # fmt: skip
    assert spec_from(RewardFunction.model_validate({"use": "x"}).model_dump()) == RewardSpec("x")


def test_the_runner_composes_and_tells_the_parts():
    @reward(name="c_first")
    def first(images):
        return [0.0, 1.0]

    @reward(name="c_second")
    def second(images):
        return [8.0, 8.0]

    specs = [
        RewardSpec("c_first", name="right"),
        RewardSpec("c_second", 0.5, range=(0, 10), only_if=Gate("right", 1.0)),
    ]
    pictures = [Image.new("RGB", (4, 4))] * 2
    with RewardRunner(specs) as runner:
        low, high = runner.score(pictures, ["", ""], step=7)
    assert low.parts == high.parts | {"right": 0.0} == {"right": 0.0, "c_second": 8.0}
    assert (low.counted, high.counted) == (
        {"right": 0.0, "c_second": 0.0},
        {"right": 1.0, "c_second": 0.8},
    )
    assert (low.total, high.total) == (0.0, pytest.approx(1.4))
