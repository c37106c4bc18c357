"""Log-probs of image tokens in the trainer, against a softmax written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.sampling import left_pad
from rl.image_head import add_image_head, image_logprobs

PROMPTS = ["a photo of a red circle", "x", 'a sign that says "CAB"']


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(2, 30),
    st.floats(0.05, 10),
    st.floats(0, 20),
)
def test_logprobs_and_entropy_are_those_of_the_softmax(
    seed, batch, length, codes, temperature, size
):
    generator = torch.Generator().manual_seed(seed)
    hidden = size * torch.randn(batch, length, 5, generator=generator)
    head = torch.randn(codes, 5, generator=generator)
    chosen = torch.randint(codes, (batch, length), generator=generator)
    found, entropy = image_logprobs(hidden, head, chosen, temperature)
    logits = hidden.double().numpy() @ head.double().numpy().T / temperature
    expected = log_softmax(logits)
    picked = np.take_along_axis(expected, chosen.numpy()[..., None], -1)[..., 0]
    scale = 1 + np.abs(logits).max()
    np.testing.assert_allclose(found, picked, atol=2e-6 * scale)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(-1), atol=2e-6 * scale)
    assert found.dtype == entropy.dtype == torch.float32


def test_bfloat16_states_give_a_float32_softmax():
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, _ = image_logprobs(hidden, head, torch.zeros(2, 3, dtype=torch.int64))
    logits = torch.nn.functional.linear(hidden, head).double().numpy()
    np.testing.assert_allclose(found, log_softmax(logits)[..., 0], atol=1e-5)


def batch_of(policy):
    prompts, mask = left_pad(policy.prompt_ids(PROMPTS), policy.config.pad_id)
    first, count = policy.config.image_start_id, policy.config.num_tokens
    generator = torch.Generator().manual_seed(3)
    tokens = first + torch.randint(policy.config.num_image_tokens, (3, count), generator=generator)
    return torch.cat([prompts, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1), tokens


def plain_logprobs(model, policy, tokens, temperature) -> np.ndarray:
    """Each sequence alone, without padding, from the library's own logits."""
    first, rows = policy.config.image_start_id, []
    for prompt, completion in zip(policy.prompt_ids(PROMPTS), tokens, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.tolist()])).logits[0]
        image = logits[len(prompt) - 1 : -1, first : first + policy.config.num_image_tokens]
        logprobs = log_softmax(image.double().numpy() / temperature)
        rows.append(np.take_along_axis(logprobs, completion.numpy()[:, None] - first, -1)[:, 0])
    return np.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("lora", [False, True])
def test_the_extended_forward_scores_the_last_tokens_of_a_padded_batch(policy, temperature, lora):
    model = policy.ar
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    ids, mask, tokens = batch_of(policy)
    expected = plain_logprobs(model, policy, tokens, temperature)
    config = policy.config
    add_image_head(policy.ar, config.image_start_id, config.num_image_tokens, temperature)
    output = model(input_ids=ids, attention_mask=mask, image_tokens=config.num_tokens)
    np.testing.assert_allclose(output.log_probs.detach(), expected, atol=1e-5)
    assert output.log_probs.requires_grad
    assert output.entropy.shape == (3, config.num_tokens)


def test_without_image_tokens_the_forward_is_the_library_s(policy):
    ids, mask, _ = batch_of(policy)
    with torch.no_grad():
        before = policy.ar(input_ids=ids, attention_mask=mask).logits
        add_image_head(policy.ar, policy.config.image_start_id, policy.config.num_image_tokens, 0.5)
        assert torch.equal(policy.ar(input_ids=ids, attention_mask=mask).logits, before)
