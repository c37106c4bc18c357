"""Adapters swapped in beside the base, in vLLM: what it computes with is what the trainer has."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from tiny_networks import tiny_qwen3

from common.errors import RecipeError
from common.heavy import prepare_torchvision
from recipes import load_recipe
from rollout import Engine, Sampling, WeightMismatch, fingerprint_tensors
from rollout.sync import ModelSide, push_weights, verify_sync
from rollout.weights import merged_tensors, split_tensors

prepare_torchvision()

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

START, IMAGES, LENGTH, RANK = 300, 64, 12, 4
PROMPTS = [[1, 2, 3], list(range(50, 95))]
LAYER = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def base() -> Qwen3ForCausalLM:
    return tiny_qwen3()


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory) -> Iterator[Engine]:
    from rollout.vllm_engine import VllmEngine

    folder = tmp_path_factory.mktemp("ar")
    base.save_pretrained(folder)
    engine = VllmEngine(
        folder, START, IMAGES, LENGTH, max_prompt_length=64, cache_gib=0.1, lora_rank=RANK
    )
    yield engine
    engine.close()


def train(model: PeftModel, size: float) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def model(base) -> PeftModel:
    """Adapters on one layer of each fused pair and on one alone, with a scale of 3."""
    targets = ["k_proj", "gate_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=targets)
    model = get_peft_model(deepcopy(base), config)
    train(model, 0.1)
    return model.eval()


def side(model: PeftModel, step: int) -> ModelSide:
    return ModelSide(model, step, PROMPTS, START, IMAGES, adapter=True)


def test_base_and_adapter_make_up_the_merged_weights(model, base):
    split, merged = dict(split_tensors(model)), dict(merged_tensors(model))
    assert {name for name in split if ".lora_" not in name} == merged.keys()
    for name, weight in base.named_parameters():
        path = name.removesuffix(".weight")
        added = torch.zeros(())
        if f"{path}.lora_A.weight" in split:
            added = split[f"{path}.lora_B.weight"] @ split[f"{path}.lora_A.weight"]
            assert added.abs().max() > 0.01
        torch.testing.assert_close(merged[name], weight + added, atol=1e-6, rtol=0)
        assert torch.equal(split[name], weight)


def test_vllm_samples_from_the_adapter_that_was_pushed_last(engine, model):
    for step in range(3):
        verify_sync(engine, side(model, step))
        held = fingerprint_tensors(split_tensors(model))
        assert engine.fingerprint() == held
        train(model, 0.05)
        assert fingerprint_tensors(split_tensors(model)) != held


def test_no_adapter_at_all_is_the_base(engine, base, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.0 if "lora_B" in name else 1.0)
    verify_sync(engine, side(model, 0))
    batch = engine.generate(PROMPTS, 1, Sampling(), [0, 1])
    plain = ModelSide(base, 0, PROMPTS, START, IMAGES)
    own = plain.completion_logprobs(PROMPTS, batch.completion_ids)
    torch.testing.assert_close(batch.behaviour_logprobs, own, atol=1e-4, rtol=0)


class Faulty:
    """An engine whose pushes of adapters go wrong in one way."""

    def __init__(self, engine: Engine, fault: str) -> None:
        self.engine, self.fault, self.before = engine, fault, {}

    def load_weights(self, named_tensors, step):
        tensors = {name: tensor.clone() for name, tensor in named_tensors}
        before, self.before = self.before, dict(tensors)
        if before and self.fault == "dropped":
            return
        if before and self.fault == "stale":
            tensors = before
        if before and self.fault == "a layer missing":
            tensors = {name: t for name, t in tensors.items() if not name.startswith(LAYER)}
        if before and self.fault == "applied twice":
            tensors[f"{LAYER}.lora_B.weight"] *= 2
        if before and self.fault == "one matrix stale":
            tensors[f"{LAYER}.lora_A.weight"] = before[f"{LAYER}.lora_A.weight"]
        self.engine.load_weights(tensors.items(), step)

    def __getattr__(self, name):
        return getattr(self.engine, name)


FAULTS = ["dropped", "stale", "a layer missing", "applied twice", "one matrix stale"]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_did_not_arrive_stops_the_run_at_once(engine, model, fault):
    faulty = Faulty(engine, fault)
    push_weights(faulty, side(model, 1))
    train(model, 1e-6)
    with pytest.raises(WeightMismatch, match="step 2"):
        push_weights(faulty, side(model, 2))


def test_a_base_that_is_not_the_engine_s_is_seen(engine, model):
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 5] += 1e-6
    with pytest.raises(WeightMismatch, match="step 1"):
        push_weights(engine, side(model, 1))


@pytest.mark.parametrize(
    "overrides",
    [["rollout.engine=transformers"], ["policy.lora=null"], ["policy.lora={rank: 600}"]],
)
def test_only_vllm_takes_adapters_by_themselves(overrides):
    asked = ["rollout.engine=vllm", "rollout.lora_sync=adapter"]
    assert load_recipe("geneval-scenes", asked)
    with pytest.raises(RecipeError, match="set this to merged"):
        load_recipe("geneval-scenes", [*asked, *overrides])
