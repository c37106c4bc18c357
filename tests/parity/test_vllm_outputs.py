"""vLLM on the converted checkpoint: greedy tokens and log-probs of the published model.

The reference model's heads are 16 wide, which no kernel of vLLM's CPU attention takes. The same
function with heads of 32 is written down here: rotary pairs keep their frequencies, and the zeros
between them change neither the norms nor the products.
"""

from collections.abc import Iterator

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout import Sampling
from rollout.vllm_engine import VllmEngine


def with_heads_of_twice_the_width(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    config = Qwen3Config(**{**model.config.to_dict(), "head_dim": 2 * model.config.head_dim})
    wide = Qwen3ForCausalLM(config).eval()
    size = model.config.head_dim
    # Rotary frequency i of `size` is frequency 2i of twice the size; halves stay halves.
    half = torch.arange(size // 2)
    kept = torch.cat([2 * half, size + 2 * half])
    weights = dict(model.state_dict())
    for name, target in wide.state_dict().items():
        source = weights[name]
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            rows = source.view(-1, size, source.shape[1])
            # The mean of squares is over twice the channels: sqrt(2) keeps it, epsilon and all.
            scale = 1.0 if "v_proj" in name else 2**0.5
            target.zero_().view(-1, 2 * size, source.shape[1])[:, kept] = scale * rows
        elif name.endswith("o_proj.weight"):
            columns = source.view(source.shape[0], -1, size)
            target.zero_().view(source.shape[0], -1, 2 * size)[:, :, kept] = columns
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            # Products are divided by the root of the width: the query makes up for it.
            scale = 1.0 if "q_norm" in name else 2**-0.5
            target.zero_()[kept] = scale * source
        else:
            target.copy_(source)
    return wide


@pytest.fixture(scope="module")
def engine(text_to_image, tmp_path_factory) -> Iterator[VllmEngine]:
    config = text_to_image.policy.config
    folder = tmp_path_factory.mktemp("wide") / "ar"
    with torch.no_grad():
        wide = with_heads_of_twice_the_width(text_to_image.policy.ar)
    wide.save_pretrained(folder)
    engine = VllmEngine(
        folder,
        config.image_start_id,
        config.num_image_tokens,
        config.num_tokens,
        max_prompt_length=96,
        max_sequences=8,
        cache_gib=0.1,
    )
    yield engine
    engine.close()


def test_the_wider_heads_compute_the_same(text_to_image):
    with torch.no_grad():
        wide = with_heads_of_twice_the_width(text_to_image.policy.ar)
        for number in (0, 1):
            ids = text_to_image.tensors[f"{number}.input_ids"]
            hidden = wide.model(ids).last_hidden_state
            expected = text_to_image.tensors[f"{number}.last_hidden_state"]
            assert float((hidden - expected).abs().max()) < 1e-5


def image_logits(policy, ids: torch.Tensor) -> torch.Tensor:
    first = policy.config.image_start_id
    with torch.no_grad():
        return policy.ar(ids).logits[0, :, first : first + policy.config.num_image_tokens]


def test_greedy_tokens_are_equal(engine, text_to_image):
    policy = text_to_image.policy
    prompts = policy.prompt_ids(text_to_image.facts["prompts"])
    batch = engine.generate(prompts, 1, Sampling(top_k=1), [0, 1])
    for prompt, completion in zip(prompts, batch.completion_ids, strict=True):
        ids = list(prompt)
        for _ in range(policy.config.num_tokens):
            code = int(image_logits(policy, torch.tensor([ids]))[-1].argmax())
            ids.append(policy.config.image_start_id + code)
        assert completion.tolist() == ids[len(prompt) :]


def test_logprobs_of_sampled_tokens_are_equal(engine, text_to_image):
    policy, config = text_to_image.policy, text_to_image.policy.config
    prompts = policy.prompt_ids(text_to_image.facts["prompts"])
    batch = engine.generate(prompts, 3, Sampling(), list(range(6)))
    for prompt, tokens, found in zip(
        batch.prompt_ids, batch.completion_ids, batch.behaviour_logprobs, strict=True
    ):
        logits = image_logits(policy, torch.tensor([[*prompt, *tokens.tolist()]]))
        before = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        expected = before.gather(-1, tokens[:, None] - config.image_start_id)[:, 0]
        assert float((found - expected).abs().max()) < 1e-4


def test_logprobs_of_the_published_tokens_are_equal(engine, text_to_image):
    """Of the whole vocabulary, as the published code's own softmax has them."""
    from vllm import SamplingParams

    for number in (0, 1):
        ids = text_to_image.tensors[f"{number}.input_ids"][0].tolist()
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        with torch.compiler.set_stance("force_eager"):
            [output] = engine._llm.generate(
                [{"prompt_token_ids": ids}], [parameters], use_tqdm=False
            )
        told = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        found = torch.tensor([at[token].logprob for at, token in told])
        expected = text_to_image.tensors[f"{number}.token_logprobs"][0]
        assert float((found - expected).abs().max()) < 1e-4
