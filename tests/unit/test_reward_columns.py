"""Several rewards in TRL's trainer: its two aggregations, scheduled weights, missing scores."""

import numpy as np
import pytest
from test_grpo_trainer import GROUP, Given, build, watch_batches, watch_metrics

from common.errors import RunError
from rewards.composition import Composition
from rewards.runner import Scored
from rewards.spec import Gate, RewardSpec
from rl import grpo
from rl.reward_columns import reward_columns

A = np.array([[0.1, 0.7, 0.2, 0.9], [0.3, 0.3, 0.3, 0.3], [0.5, 0.5, 0.5, 0.5]])
B = np.array([[4.0, 1.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 8.0, 2.0, 2.0]])
SPECS = {
    "a": RewardSpec("a", 2.0),
    "b": RewardSpec("b", 0.5, schedule=((0, 1.0), (2, 3.0)), only_if=Gate("a", 0.2)),
    "watched": RewardSpec("watched", 0.0),
}
COUNTED_B = np.where(A >= 0.2, B, 0.0)


class Composed:
    """A runner of two prescribed rewards and one that is only logged; one picture has no `a`."""

    def __init__(self):
        self.names = list(SPECS)
        self.composition = Composition(SPECS)

    def weights(self, step):
        return self.composition.weights(step)

    def score(self, images, prompts, columns, step):
        scored = []
        for i, (a, b) in enumerate(zip(A.ravel(), B.ravel(), strict=True)):
            parts = {"a": None if i == 9 else a, "b": b, "watched": 7.0}
            counted = self.composition.counted(parts, step)
            total = self.composition.total(counted, step)
            scored.append(Scored(total, parts, counted=counted))
        return scored


def normalised(values):
    """Within each group, over the scored ones."""
    spread = np.nanstd(values, axis=1, ddof=1, keepdims=True)
    return (values - np.nanmean(values, axis=1, keepdims=True)) / (spread + 1e-4)


def expected_advantages(aggregation):
    a, b = A.copy(), COUNTED_B.copy()
    a[2, 1] = b[2, 1] = np.nan
    if aggregation == "sum_then_normalize":
        advantages = normalised(2 * a + 0.5 * b)
    else:
        total = 2 * normalised(a) + 0.5 * normalised(b)
        advantages = (total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4)
    advantages[1] = 0  # nothing differs
    return np.nan_to_num(advantages)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_of_two_rewards(policy, tmp_path, aggregation):
    changes = {
        "rewards.multi_objective_aggregation": aggregation,
        "algorithm.drop_zero_variance": "false",
    }
    trainer = build(policy, tmp_path, [[0.0] * GROUP] * 3, runner=Composed(), **changes)
    batches, metrics = watch_batches(trainer), watch_metrics(trainer)
    trainer.train()
    found = batches[0]["advantages"].reshape(3, GROUP).numpy()
    assert found == pytest.approx(expected_advantages(aggregation), abs=1e-5)
    assert metrics["zero_variance_groups"] == [1.0]
    assert metrics["missing_rewards"] == [1.0]
    assert metrics["parts/watched"] == [7.0]
    scored = np.delete(A.ravel(), 9)
    assert metrics["parts/a"] == [pytest.approx(scored.mean())]
    counted = np.delete(COUNTED_B.ravel(), 9)
    assert metrics["rewards/b/mean"] == [pytest.approx(counted.mean())]
    assert metrics["reward"] == [pytest.approx((2 * scored + 0.5 * counted).mean())]


def test_scheduled_weights_reach_trl_at_their_step(policy, tmp_path):
    seen = []
    changes = {"train.steps": 3}
    trainer = build(policy, tmp_path, [[0.0] * GROUP] * 3, runner=Composed(), **changes)
    original = trainer._calculate_rewards

    def watched(*args):
        columns = original(*args)
        seen.append(trainer.reward_weights.tolist())
        return columns

    trainer._calculate_rewards = watched
    trainer.train()
    assert seen == [[2.0, 0.5, 0.0], [2.0, 1.0, 0.0], [2.0, 1.5, 0.0]]


def test_one_scoring_serves_all_columns():
    calls = []

    def score(**given):
        calls.append(given)
        return [{"x": 1.0, "y": 2.0}, None, {"x": 3.0}]

    x, y = reward_columns(score, ["x", "y"])
    assert (x.__name__, y.__name__) == ("x", "y")
    assert x(prompts=["p"]) == [1.0, None, 3.0]
    assert y(prompts=["p"]) == [2.0, None, 0.0]
    assert calls == [{"prompts": ["p"]}]


@pytest.mark.parametrize(
    ("here", "elsewhere", "stops"), [(0, 0, True), (0, 3, False), (3, 0, False)]
)
def test_a_run_stops_when_no_process_has_a_score_and_on_all_of_them(
    policy, tmp_path, monkeypatch, here, elsewhere, stops
):
    """One process that stopped alone would leave the others waiting for its part of a step."""
    runner = Given([0.5] * here + [None] * (12 - here))
    trainer = build(policy, tmp_path, runner=runner)
    others = Given([0.5] * elsewhere + [None] * (12 - elsewhere)).score([0] * 12, [], {}, 0)
    monkeypatch.setattr(grpo, "gather_object", lambda own: [*own, *others])
    trainer.last_scores = runner.score([0] * 12, [], {}, 0)

    def three_steps():
        for _ in range(3):
            trainer.reward(lambda *_: None)

    if stops:
        with pytest.raises(RunError, match="last 3 steps"):
            three_steps()
    else:
        three_steps()
