"""What a run proves at each sync: the weights, and what the engine computes with them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_grpo_trainer import build
from test_rollouts import engine_of
from tiny_policy import write_recipe
from transformers import TrainerCallback

from cli.main import main
from common.errors import RunError
from data.prompts import records_of_run
from policy import Policy
from recipes import load_recipe
from rl.run import PROBES, _sync, _write_policy, probe_ids
from rollout.engine import WeightMismatch
from rollout.sync import PROBE_TOKENS


def test_a_sync_refuses_an_engine_that_computes_something_else(policy, policy_folder):
    other = Policy.from_pretrained(policy_folder)
    with torch.no_grad():
        other.ar.model.norm.weight *= 1.01

    class Deaf:
        def __init__(self):
            self.inner = engine_of(other)
            self.dtype = self.inner.dtype
            self.generate, self.fingerprint = self.inner.generate, self.inner.fingerprint

        def load_weights(self, tensors, step):
            list(tensors)

    for step in (0, 1):
        with pytest.raises(WeightMismatch):
            _sync(policy, Deaf(), False, 1e-4)(step)


def test_every_sync_is_probed_and_now_and_then_by_whole_pictures(policy):
    engine, asked = engine_of(policy), []
    probe = engine.probe

    def wrong_at_step_26(prompts, length):
        [batch] = probe(prompts, length).values()
        asked.append(batch.completion_ids.shape)
        second = replace(batch, behaviour_logprobs=batch.behaviour_logprobs + (len(asked) == 4))
        return {"one": batch, "the other": second}  # as of two workers

    engine.probe = wrong_at_step_26
    sync, tokens = _sync(policy, engine, False, 1e-4), policy.config.num_tokens
    for step in (0, 1, 25):
        sync(step)
    with pytest.raises(WeightMismatch, match="step 26 the other's log-probs of probe 0"):
        sync(26)
    assert asked == [(4, tokens), (4, PROBE_TOKENS), (4, tokens), (4, PROBE_TOKENS)]


class Spoiler(TrainerCallback):
    """An update that goes wrong."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")


def test_nothing_is_sampled_from_weights_that_are_not_finite_and_no_policy_written(
    policy, tmp_path
):
    trainer = build(policy, tmp_path, callbacks=[Spoiler()], **{"train.steps": 2})
    # The held-out evaluation syncs by the same function, before any rollout of the step.
    trainer.vllm_generation._sync = _sync(policy, engine_of(policy), False, 1e-4)
    told = "`model.norm.weight` has values that are not finite after 1 steps"
    with pytest.raises(RunError, match=told):
        trainer.train()
    trainer.replay = tmp_path / "saved"
    with pytest.raises(RunError, match=told):
        trainer.vllm_generation.sync_weights()
    with pytest.raises(RunError, match=told):
        _write_policy(trainer, policy, load_recipe("geneval-scenes-full").recipe, tmp_path, "")
    assert not (tmp_path / "policy").exists()


def test_a_start_policy_with_weights_that_are_not_finite_is_named(policy):
    policy.ar.requires_grad_(False)  # the base below adapters is no better
    with torch.no_grad():
        policy.ar.model.norm.weight[0] = float("inf")
    with pytest.raises(RunError, match=r"`model.norm.weight` has values .*\n.*folder is damaged"):
        _sync(policy, engine_of(policy), False, 1e-4)(0)


def test_two_probes_begin_with_a_block_of_the_prefix_cache_each():
    # No tokenizer makes less than a token of a word.
    first, second = (words for p in PROBES if len(words := p.split()) > 32)
    assert first[0] != second[0]


@pytest.mark.parametrize("room", [3, 40, 400])
def test_probes_are_cut_to_the_context_and_stay_different_in_their_first_block(policy, room):
    whole = policy.prompt_ids(PROBES)
    assert max(map(len, whole)) == 94
    policy.ar.config.max_position_embeddings = policy.config.num_tokens + room
    probes = probe_ids(policy)
    assert [len(ids) for ids in probes] == [min(room, len(ids)) for ids in whole]
    assert all(ids[-2:] == probes[0][-2:] for ids in probes)  # the picture begins after them
    first, second = (ids[:32] for ids in probes[2:])
    assert (first != second) == (room > 32)
    _sync(policy, engine_of(policy), False, 1e-4)(0)


def test_a_policy_with_room_for_its_own_prompts_alone_is_trained(policy_folder, tmp_path, capsys):
    folder = shutil.copytree(policy_folder, tmp_path / "short")
    recipe, one_step = str(write_recipe(tmp_path / "recipe", folder)), "train.steps=1"
    records = records_of_run(load_recipe(recipe, [one_step]).recipe)
    own = [str(record["prompt"]) for record in records]
    longest = max(map(len, Policy.from_pretrained(folder).prompt_ids(own)))
    config = json.loads((folder / "ar/config.json").read_text())

    def train(room: int) -> tuple[int, str]:
        config["max_position_embeddings"] = 36 + room
        (folder / "ar/config.json").write_text(json.dumps(config))
        code = main(["train", recipe, one_step, "--out", str(tmp_path / str(room))])
        return code, capsys.readouterr().err

    code, told = train(longest - 1)
    assert code == 1
    assert f"room for {longest - 1}" in told
    assert any(repr(prompt[:40]) in told for prompt in own)
    assert train(longest)[0] == 0
