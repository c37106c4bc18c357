"""What a run proves at each sync: the weights, and what the engine computes with them."""

from dataclasses import replace

import pytest
import torch
from test_rollouts import engine_of

from policy import Policy
from rl.run import PROBES, _sync
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
        [batch] = probe(prompts, length)
        asked.append(batch.completion_ids.shape)
        second = replace(batch, behaviour_logprobs=batch.behaviour_logprobs + (len(asked) == 4))
        return [batch, second]  # as of two workers

    engine.probe = wrong_at_step_26
    sync, tokens = _sync(policy, engine, False, 1e-4), policy.config.num_tokens
    for step in (0, 1, 25):
        sync(step)
    with pytest.raises(WeightMismatch, match="step 26 the engine's log-probs of probe 0"):
        sync(26)
    assert asked == [(4, tokens), (4, PROBE_TOKENS), (4, tokens), (4, PROBE_TOKENS)]


def test_two_probes_begin_with_a_block_of_the_prefix_cache_each():
    # No tokenizer makes less than a token of a word.
    first, second = (words for p in PROBES if len(words := p.split()) > 32)
    assert first[0] != second[0]
