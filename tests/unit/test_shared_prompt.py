"""A pass that shares prompts gives what every sequence gives alone, and so does its gradient."""

import pytest
import torch
from tiny_policy import new_policy

from policy.sampling import left_pad
from policy.shared_prompt import tail_states

OWNERS = [0, 1, 0, 2, 1, 0]  # groups need not be neighbours
PROMPTS = ["a red circle", "x", 'a long sign that says "CAB" and nothing else']


@pytest.fixture(scope="module")
def batch():
    policy = new_policy()
    ids = policy.prompt_ids(PROMPTS)
    rows = [ids[owner] for owner in OWNERS]
    prompts, mask = left_pad(rows, policy.config.pad_id)
    first, count = policy.config.image_start_id, policy.config.num_tokens
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(policy.config.num_image_tokens, (len(rows), count), generator=generator)
    tokens = first + codes
    whole = torch.cat([prompts, tokens], 1)
    return policy, rows, tokens, whole, torch.cat([mask, torch.ones_like(tokens)], 1)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_states_and_gradients_are_those_of_every_sequence_alone(batch):
    policy, rows, tokens, whole, mask = batch
    tail = 1 + policy.config.num_tokens
    alone = torch.cat(
        [
            policy.ar.model(
                input_ids=torch.cat([torch.tensor(row), token])[None], use_cache=False
            ).last_hidden_state[:, -tail:]
            for row, token in zip(rows, tokens, strict=True)
        ]
    )
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(7))
    (alone * weights).sum().backward()
    expected = gradients(policy.ar.model)
    shared = tail_states(policy.ar.model, whole, mask, tail)
    (shared * weights).sum().backward()
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)
    found = gradients(policy.ar.model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize(("rows", "prompts"), [(range(6), 3), ([0, 1, 3], 3), ([2, 2, 2], 1)])
def test_a_prompt_is_passed_once(batch, rows, prompts):
    policy, _, _, whole, mask = batch
    tail, passed = 1 + policy.config.num_tokens, []
    hook = policy.ar.model.embed_tokens.register_forward_hook(
        lambda _module, given, _output: passed.append(given[0].numel())
    )
    with torch.no_grad():
        tail_states(policy.ar.model, whole[list(rows)], mask[list(rows)], tail)
    hook.remove()
    assert sum(passed) == prompts * (whole.shape[1] - tail) + len(rows) * tail


def test_with_gradient_checkpointing_sequences_stay_whole(batch):
    policy, _, _, whole, mask = batch
    decoder, tail = policy.ar.model, 1 + policy.config.num_tokens
    with torch.no_grad():
        expected = tail_states(decoder, whole, mask, tail)
    decoder.train()
    policy.ar.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        found = tail_states(decoder, whole, mask, tail)
    finally:
        policy.ar.gradient_checkpointing_disable()
        decoder.eval()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
