"""Keys and values in 8 bits, in vLLM: the law it samples from, and what the sync proof still sees.

The law is computed without vLLM: the exact model, its keys and values rounded by torch.
"""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from tiny_networks import tiny_qwen3

from common.errors import PolicyError, RecipeError
from common.heavy import prepare_torchvision
from recipes import load_recipe
from rl.run import probe_tolerance
from rollout import RolloutBatch, Sampling, WeightMismatch
from rollout.sync import ModelSide, push_weights, verify_sync
from rollout.vllm_engine import VllmEngine
from rollout.weights import merged_tensors

prepare_torchvision()

from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

START, IMAGES, LENGTH = 300, 64, 36
# The second prompt is longer than a block of the prefix cache.
PROMPTS = [[1, 2, 3], list(range(50, 95))]
FP8 = ["rollout.engine=vllm", "rollout.vllm.cache_dtype=fp8"]
TOLERANCE = probe_tolerance(load_recipe("geneval-scenes", FP8).recipe)
N = 8


def towards_zero(given: torch.Tensor) -> torch.Tensor:
    """Return e4m3's neighbour on the side of zero: vLLM's kernel for the CPU cuts bits off."""
    nearest = given.abs().to(torch.float8_e4m3fn)
    bits = nearest.view(torch.uint8)
    bits = torch.where(nearest.to(given.dtype) > given.abs(), bits - 1, bits)
    return bits.view(torch.float8_e4m3fn).to(given.dtype) * given.sign()


class EightBits(DynamicCache):
    """What goes in comes out as 8 bits have it."""

    def update(self, keys, values, *others, **options):
        return super().update(towards_zero(keys), towards_zero(values), *others, **options)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def engine(request, tmp_path_factory) -> Iterator[VllmEngine]:
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's kernel for keys and values in 8 bits needs AVX-512")
    folder = tmp_path_factory.mktemp("ar")
    tiny_qwen3().save_pretrained(folder)
    engine = VllmEngine(
        folder, START, IMAGES, LENGTH, dtype=request.param, max_prompt_length=64,
        max_sequences=64, cache_gib=0.1, cache_dtype="fp8",
    )  # fmt: skip
    yield engine
    engine.close()


@pytest.fixture
def model(engine) -> Qwen3ForCausalLM:
    return tiny_qwen3().to(engine.dtype)


def side(model: Qwen3ForCausalLM, step: int = 0) -> ModelSide:
    return ModelSide(model, step, PROMPTS, START, IMAGES)


def drawn(engine: VllmEngine, model: Qwen3ForCausalLM) -> RolloutBatch:
    push_weights(engine, side(model))
    return engine.generate(PROMPTS, N, Sampling(), list(range(2 * N)))


@torch.no_grad()
def logprobs(model: Qwen3ForCausalLM, batch: RolloutBatch, cache: type[DynamicCache]):
    rows = []
    for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True):
        ids = torch.tensor([prompt + completion.tolist()])
        logits = model(input_ids=ids, past_key_values=cache(), use_cache=True).logits[0]
        law = logits[len(prompt) - 1 : -1, START : START + IMAGES].float().log_softmax(-1)
        rows.append(law.gather(1, completion[:, None] - START)[:, 0])
    return torch.stack(rows)


def test_samples_are_image_tokens_and_their_logprobs_those_of_rounded_keys_and_values(
    engine, model
):
    batch = drawn(engine, model)
    assert START <= batch.completion_ids.min() <= batch.completion_ids.max() < START + IMAGES
    assert len(batch.completion_ids.unique()) > IMAGES // 2
    beside = (batch.behaviour_logprobs - logprobs(model, batch, DynamicCache)).abs()
    rounded = (batch.behaviour_logprobs - logprobs(model, batch, EightBits)).abs()
    assert 0.005 < beside.mean() < beside.max() < TOLERANCE
    if engine.dtype == torch.float32:
        assert rounded.max() < 0.01  # where a value lies between two, the last bit decides
        assert rounded.mean() < 1e-4
    elif not torch.cpu._is_amx_tile_supported():  # its kernel for bfloat16 was never seen
        assert rounded.mean() < beside.mean() / 2


def test_the_cache_holds_a_byte_for_each_number(engine):
    config = engine._llm.llm_engine.vllm_config.cache_config
    token = 2 * 2 * 2 * 32  # keys and values, layers, heads, their size
    assert config.num_gpu_blocks == int(0.1 * 2**30) // (32 * token)


def test_the_sync_is_proved_and_a_stale_one_seen(engine, model):
    verify_sync(engine, side(model), TOLERANCE)
    stale = deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.01
    push = dict(merged_tensors(stale))
    load = engine.load_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load_weights", lambda _, step: load(push.items(), step))
        with pytest.raises(WeightMismatch, match="fingerprints"):
            push_weights(engine, side(model, 1))
    verify_sync(engine, side(model, 2), TOLERANCE)


def test_keys_of_other_weights_are_beyond_the_tolerance(engine, model, monkeypatch):
    verify_sync(engine, side(model), TOLERANCE)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            moved = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter += moved.to(parameter.dtype)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        with pytest.raises(WeightMismatch, match="log-probs of probe 1"):
            # So wide a tolerance needs many tokens.
            verify_sync(engine, side(model, 1), TOLERANCE, LENGTH)
    verify_sync(engine, side(model, 2), TOLERANCE)


def test_heads_that_the_cpu_has_no_8_bit_kernel_for_are_refused(tmp_path):
    Qwen3Config(head_dim=80).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"cache_dtype[\s\S]*divisible by 32[\s\S]*Fix: .*auto"):
        VllmEngine(tmp_path, START, IMAGES, LENGTH, cache_dtype="fp8")


def test_8_bits_need_the_correction():
    with pytest.raises(RecipeError, match=r"set algorithm\.importance_cap"):
        load_recipe("geneval-scenes", [*FP8, "algorithm.importance_cap=null"])


def test_the_tolerance_is_wider_for_8_bits_alone():
    for changes in ([], ["rollout.engine=vllm"], ["rollout.vllm.cache_dtype=fp8"]):
        assert probe_tolerance(load_recipe("geneval-scenes", changes).recipe) == 1e-4
