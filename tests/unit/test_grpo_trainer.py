"""The trainer's numbers against GRPO written out: ratios, gradients, advantages, reference."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from test_rollouts import engine_of
from transformers import TrainerCallback

from common.errors import RunError
from policy import Policy
from recipes import load_recipe
from rewards.runner import Scored
from rl.grpo import ImageGRPOTrainer
from rl.rollouts import Sampler
from rl.run import trainer_config
from rollout.decode import Decode
from rollout.engine import Sampling

PROMPTS = ["a photo of a red circle", "x", 'a sign that says "CAB"']
GROUP, TEMPERATURE = 4, 0.8
# The second group teaches nothing, and one picture of the third could not be scored.
REWARDS = [[0.1, 0.7, 0.2, 0.9], [0.3, 0.3, 0.3, 0.3], [1.0, None, 0.0, 0.4]]


@dataclass
class Given:
    """A reward runner whose totals are prescribed."""

    totals: list[float | None]
    names: list[str] = field(default_factory=lambda: ["given"])
    seen: list[dict[str, Any]] = field(default_factory=list)

    def score(self, images, prompts, columns, step):
        self.seen.append({"images": images, "prompts": prompts, "columns": columns})
        return [
            Scored(t, {"given": t}, counted=None if t is None else {"given": t})
            for t in self.totals
        ]

    def weights(self, step):
        return {"given": 1.0}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first update, and the weights before it."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor | None] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of = {
            name: None if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def flat(groups: list[list[float | None]]) -> list[float | None]:
    return [total for group in groups for total in group]


def build(
    policy: Policy,
    tmp_path,
    rewards=REWARDS,
    *,
    lora=False,
    records=None,
    callbacks=(),
    runner=None,
    **changes,
) -> ImageGRPOTrainer:
    """A trainer of one step over three prompts x 4 samples (or what `changes` say)."""
    overrides = {
        "rollout.group_size": GROUP,
        "rollout.prompts_per_step": len(rewards),
        "rollout.temperature": TEMPERATURE,
        "train.steps": 1,
        "train.grad_clip": "null",
        "algorithm.beta": 0,
        "policy.device": "cpu",
        **changes,
    }
    recipe = load_recipe("geneval-scenes", [f"{k}={v}" for k, v in overrides.items()]).recipe
    policy.requires_grad_(False)
    policy.ar.requires_grad_(True)
    records = (
        records
        or [
            {"prompt": prompt, "prompt_id": str(i), "metadata": {}}
            for i, prompt in enumerate(PROMPTS[: len(rewards)])
        ]
        * recipe.train.steps
    )
    sampler = Sampler(
        policy, engine_of(policy), Sampling(TEMPERATURE), Decode(1, 1.0), run_seed=recipe.seed
    )
    return ImageGRPOTrainer(
        policy.ar,
        trainer_config(recipe, tmp_path, policy.config.num_tokens),
        records,
        sampler=sampler,
        rewards=runner or Given(flat(rewards)),
        sync=lambda step: None,
        drop_zero_variance=recipe.algorithm.drop_zero_variance,
        callbacks=callbacks,
        peft_config=(
            LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]) if lora else None
        ),
        checkpoints=tmp_path / "checkpoints",
    )


def watch_batches(trainer) -> list[dict[str, Any]]:
    """Collect what each step learns from."""
    batches, original = [], trainer._generate_and_score_completions

    def watched(inputs):
        batches.append(original(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = watched
    return batches


def watch_metrics(trainer) -> dict[str, list[float]]:
    kept: dict[str, list[float]] = {}
    original = trainer.log

    def watched(logs, *args, **kwargs):
        for name, values in trainer._metrics["train"].items():
            kept.setdefault(name, []).extend(values)
        return original(logs, *args, **kwargs)

    trainer.log = watched
    return kept


def advantages_of(group: list[float | None]) -> list[float]:
    """(reward - mean) / (standard deviation + 1e-4) over the scored ones; 0 for the others."""
    scored = np.array([total for total in group if total is not None])
    if len(scored) < 2 or np.ptp(scored) == 0:
        return [0.0] * len(group)
    spread = scored.std(ddof=1) + 1e-4
    return [0.0 if t is None else float((t - scored.mean()) / spread) for t in group]


def token_logprobs(policy: Policy, prompt: list[int], completion: torch.Tensor) -> torch.Tensor:
    """Of one sequence alone, from the library's logits; differentiable."""
    first, count = policy.config.image_start_id, policy.config.num_image_tokens
    logits = policy.ar(input_ids=torch.tensor([prompt + completion.tolist()])).logits[0]
    image = logits[len(prompt) - 1 : -1, first : first + count] / TEMPERATURE
    return torch.log_softmax(image, -1).gather(1, completion[:, None] - first)[:, 0]


def analytic_gradients(policy: Policy, rollout, rewards, kept: int) -> dict[str, torch.Tensor]:
    """REINFORCE: minus the mean over `kept` samples of advantage x mean log-prob of the tokens."""
    policy.requires_grad_(False)
    policy.ar.requires_grad_(True)
    advantages = [a for group in rewards for a in advantages_of(group)]
    loss = torch.zeros(())
    for number, advantage in enumerate(advantages):
        if advantage:
            ids, completion = rollout.prompt_ids[number], rollout.completion_ids[number]
            loss = loss - advantage * token_logprobs(policy, ids, completion).mean() / kept
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in policy.ar.named_parameters()
    }


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str, relative=1e-3) -> None:
    distance = float((found - expected).norm() / expected.norm().clamp(min=1e-8))
    assert distance < relative, (name, distance)


# --- the first update ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 8),
        # 8 informative rows in two micro-batches, then in three with one row that only fills up.
        ({"train.micro_batch": 6}, 8),
        ({"train.micro_batch": 4}, 8),
        ({"algorithm.importance_cap": "null"}, 8),
        ({"algorithm.drop_zero_variance": "false"}, 12),
        ({"algorithm.drop_zero_variance": "false", "train.micro_batch": 2}, 12),
    ],
    ids=str,
)
def test_the_first_gradient_is_reinforce_with_group_advantages(
    policy, policy_folder, tmp_path, changes, kept
):
    gradients = Gradients()
    trainer = build(policy, tmp_path, callbacks=[gradients], **changes)
    metrics = watch_metrics(trainer)
    trainer.train()
    base = Policy.from_pretrained(policy_folder)
    expected = analytic_gradients(base, trainer.last_rollout, REWARDS, kept)
    assert gradients.of.keys() == expected.keys()
    for name, gradient in gradients.of.items():
        assert_same(gradient, expected[name], name)
    assert set(metrics["clip_ratio/region_mean"]) == {0.0}
    assert metrics["zero_variance_groups"] == [1.0]
    assert metrics["missing_rewards"] == [1.0]


def test_adapters_get_the_gradient_of_the_weights_they_stand_for(policy, policy_folder, tmp_path):
    gradients = Gradients()
    trainer = build(policy, tmp_path, lora=True, callbacks=[gradients])
    adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" in n}
    trainer.train()
    base = Policy.from_pretrained(policy_folder)
    expected = analytic_gradients(base, trainer.last_rollout, REWARDS, kept=8)
    checked = 0
    for name, gradient in gradients.of.items():
        if "lora_B" not in name:
            assert gradient.abs().max() == 0  # B is zero at the start
            continue
        down = adapters[name.replace("lora_B", "lora_A")]
        weight = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
        # W + (alpha / rank) B A: the chain rule with alpha / rank = 3.
        assert_same(gradient, 3 * expected[weight] @ down.T, name)
        checked += 1
    assert checked == 4


def test_the_ratio_of_the_first_update_is_one(policy, tmp_path, monkeypatch):
    ratios = []
    original = ImageGRPOTrainer._get_per_token_logps_and_entropies

    def watched(self, model, input_ids, *args, **kwargs):
        output = original(self, model, input_ids, *args, **kwargs)
        if torch.is_grad_enabled():
            ratios.append((input_ids, output[0].detach()))
        return output

    monkeypatch.setattr(ImageGRPOTrainer, "_get_per_token_logps_and_entropies", watched)
    trainer = build(policy, tmp_path, **{"train.micro_batch": 4})
    batches = watch_batches(trainer)
    trainer.train()
    old = {tuple(c.tolist()): o for c, o in zip(*(batches[0][k] for k in KEYS), strict=True)}
    count = policy.config.num_tokens
    seen = 0
    for ids, logprobs in ratios:
        for row, found in zip(ids, logprobs, strict=True):
            ratio = (found - old[tuple(row[-count:].tolist())]).exp()
            assert (ratio - 1).abs().max() < 1e-5
            seen += 1
    assert seen == 9  # 8 and one that fills up the third micro-batch


KEYS = ("completion_ids", "old_per_token_logps")


def test_later_updates_keep_old_and_behaviour_logprobs_of_their_own_rollout(policy, tmp_path):
    trainer = build(policy, tmp_path, **{"train.steps": 3, "train.learning_rate": 0.01})
    batches = watch_batches(trainer)
    trainer.train()
    assert len(batches) == 3
    for batch in batches:
        old, behaviour = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
        torch.testing.assert_close(old, behaviour, atol=1e-5, rtol=0)
        assert (batch["importance_sampling_ratio"] - 1).abs().max() < 1e-4
    assert not torch.equal(batches[0]["completion_ids"], batches[1]["completion_ids"])


# --- advantages ----------------------------------------------------------------------------------


def test_groups_without_variance_are_dropped_and_missing_rewards_move_no_mean(policy, tmp_path):
    trainer = build(policy, tmp_path)
    batches = watch_batches(trainer)
    trainer.train()
    [batch] = batches
    assert len(batch["advantages"]) == 8
    rollout = trainer.last_rollout
    expected = {
        tuple(rollout.completion_ids[i].tolist()): advantage
        for i, advantage in enumerate(a for group in REWARDS for a in advantages_of(group))
        if not 4 <= i < 8
    }
    found = dict(
        zip(map(tuple, batch["completion_ids"].tolist()), batch["advantages"].tolist(), strict=True)
    )
    assert found.keys() == expected.keys()
    for row, advantage in expected.items():
        assert found[row] == pytest.approx(advantage, abs=1e-5)
    assert list(found.values()).count(0.0) == 1  # the one that could not be scored
    assert sum(found.values()) == pytest.approx(0, abs=1e-5)


def test_a_rounding_error_in_the_mean_of_equal_rewards_is_no_advantage(policy, tmp_path):
    values = [0.1, 0.3, 0.7]
    rows = torch.tensor(values)[:, None].expand(3, 7)
    assert (rows.nanmean(1) != rows[:, 0]).any(), "choose values whose mean is rounded"
    trainer = build(
        policy,
        tmp_path,
        [[value] * 7 for value in values],
        **{"rollout.group_size": 7, "algorithm.drop_zero_variance": "false"},
    )
    batches, metrics = watch_batches(trainer), watch_metrics(trainer)
    trainer.train()
    assert batches[0]["advantages"].tolist() == [0.0] * 21
    assert metrics["zero_variance_groups"] == [3.0]


def test_advantages_without_scale_are_rewards_minus_their_mean(policy, tmp_path):
    trainer = build(policy, tmp_path, **{"algorithm.advantage_scale": "none"})
    batches = watch_batches(trainer)
    trainer.train()
    found = sorted(batches[0]["advantages"].tolist())
    assert found == pytest.approx(
        sorted(
            [-0.375, 0.225, -0.275, 0.425, 1 - 1.4 / 3, 0, -1.4 / 3, 0.4 - 1.4 / 3],
        )
    )


@pytest.mark.parametrize(
    "rewards",
    [
        [[None] * 4, [None] * 4],
        [[0.3] * 4, [0.7] * 4],
        [[None, None, None, 1.0], [0.3, None, 0.3, 0.3]],
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_that_teaches_nothing_moves_nothing(policy, tmp_path, rewards, lora):
    """Not even by the momentum of the steps before."""
    changes = {"train.steps": 3, "train.learning_rate": 0.01, "train.weight_decay": 0.1}
    trainer = build(policy, tmp_path, rewards, lora=lora, **changes)
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
            teaches = [[0.0, 1.0, 0.5, 0.2], [0.0, 1.0, 0.5, 0.2]]
            trainer.rewards.totals = flat(rewards if state.global_step == 1 else teaches)

    trainer.add_callback(Watch())
    trainer.rewards.totals = [0.0, 1.0, 0.5, 0.2] * 2
    trainer.train()
    moved = [
        sum(not torch.equal(before[name], after[name]) for name in before)
        for before, after in pairwise(weights)
    ]
    assert moved[0] == 0
    assert moved[1] > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_weights_do_not_depend_on_the_micro_batch(policy, policy_folder, tmp_path):
    results = []
    for micro_batch in ("null", 6, 3):
        fresh = Policy.from_pretrained(policy_folder)
        changes = {"train.micro_batch": micro_batch, "train.steps": 2, "train.grad_clip": 1.0}
        trainer = build(fresh, tmp_path, **changes)
        trainer.args.learning_rate = 1e-3
        trainer.train()
        results.append({n: p.detach().clone() for n, p in fresh.ar.named_parameters()})
    start = dict(policy.ar.named_parameters())
    for other in results[1:]:
        for name, whole in results[0].items():
            moved = (whole - start[name]).norm()
            # AdamW's first steps are signs: a few near-zero gradients may flip.
            assert (whole - other[name]).norm() < 0.1 * moved + 1e-6, name


@pytest.mark.parametrize(("lora", "learning_rate"), [(False, 3e-3), (True, 3e-2)])
def test_what_is_rewarded_is_drawn_more_often(policy, tmp_path, lora, learning_rate):
    changes = {"train.steps": 20, "train.learning_rate": learning_rate, "train.grad_clip": 1.0}
    trainer = build(policy, tmp_path, lora=lora, **changes)
    first, shares, drawn = policy.config.image_start_id, [], []
    generate = trainer.sampler.engine.generate

    def watched(*asked):
        drawn.append(generate(*asked))
        return drawn[-1]

    trainer.sampler.engine.generate = watched

    class EvenCodes(Given):
        def score(self, images, prompts, columns, step):
            even = (drawn[-1].completion_ids - first) % 2 == 0
            self.totals = even.float().mean(1).tolist()
            shares.append(float(np.mean(self.totals)))
            return super().score(images, prompts, columns, step)

    trainer.rewards = EvenCodes([])
    trainer.train()
    assert abs(shares[0] - 0.5) < 0.1
    assert np.mean(shares[-3:]) > shares[0] + 0.15


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("cap", ["2.0", "null"])
@pytest.mark.parametrize("micro_batch", ["null", 4])
def test_the_reference_is_the_base_policy(policy, policy_folder, tmp_path, lora, cap, micro_batch):
    changes = {
        "algorithm.beta": 0.1,
        "algorithm.importance_cap": cap,
        "train.micro_batch": micro_batch,
    }
    trainer = build(policy, tmp_path, lora=lora, **changes)
    # As if some steps had been made already.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    batches, metrics = watch_batches(trainer), watch_metrics(trainer)
    trainer.train()
    [batch] = batches
    base = Policy.from_pretrained(policy_folder)
    with torch.no_grad():
        for ids, mask, completion, found in zip(
            *(batch[k] for k in ("prompt_ids", "prompt_mask", "completion_ids")),
            batch["ref_per_token_logps"],
            strict=True,
        ):
            prompt = ids[mask.bool()].tolist()
            expected = token_logprobs(base, prompt, completion)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    own = batch["sampling_per_token_logps"]
    assert (own - batch["ref_per_token_logps"]).abs().max() > 0.01
    assert np.mean(metrics["kl"]) > 1e-4


@pytest.mark.parametrize("lora", [True, False])
def test_the_kl_is_zero_before_the_first_update_and_not_after_it(policy, tmp_path, lora):
    changes = {"algorithm.beta": 0.1, "train.steps": 2, "train.learning_rate": 0.01}
    trainer = build(policy, tmp_path, lora=lora, **changes)
    metrics = watch_metrics(trainer)
    trainer.train()
    assert 0 <= metrics["kl"][0] < 1e-9
    assert metrics["kl"][1] > 1e-5


def test_without_beta_no_reference_is_held(policy, tmp_path):
    trainer = build(policy, tmp_path)
    assert trainer.ref_model is None


# --- what goes to the rewards --------------------------------------------------------------------


def test_rewards_get_the_pictures_prompts_and_columns_of_each_sample(policy, tmp_path):
    records = [
        {"prompt": "x", "metadata": {"tag": "a"}, "size": 3},
        {"prompt": "x", "metadata": {"tag": "b"}, "colour": "red"},
        {"prompt": "y", "metadata": {"tag": "c"}, "size": "large"},
    ]
    trainer = build(policy, tmp_path, records=records)
    trainer.train()
    [call] = trainer.rewards.seen
    assert call["prompts"] == ["x"] * 8 + ["y"] * 4
    assert all(a is b for a, b in zip(call["images"], trainer.last_rollout.images, strict=True))
    assert [m["tag"] for m in call["columns"]["metadata"]] == list("aaaabbbbcccc")
    assert call["columns"]["size"] == [3] * 4 + [None] * 4 + ["large"] * 4
    assert call["columns"]["colour"] == [None] * 4 + ["red"] * 4 + [None] * 4
    assert "prompt" not in call["columns"]


def test_prompts_that_are_no_whole_groups_are_refused(policy, tmp_path):
    trainer = build(policy, tmp_path)
    for prompts in (["a"] * 6, ["a", "a", "a", "b"] * 2):
        with pytest.raises(RunError, match="whole groups of 4"):
            trainer.rollout(prompts)


def test_weights_are_synced_once_a_step_with_the_step_s_number(policy, tmp_path):
    synced = []
    trainer = build(policy, tmp_path, **{"train.steps": 3, "train.micro_batch": 4})
    trainer.vllm_generation._sync = synced.append
    trainer.train()
    assert synced == [0, 1, 2]


def test_the_trainer_prints_nothing(policy, tmp_path, capfd):
    trainer = build(policy, tmp_path)
    capfd.readouterr()
    trainer.train()
    assert capfd.readouterr().out == ""
