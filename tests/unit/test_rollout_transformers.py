"""What is special to the engine that samples from the trainer's own module."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from common.errors import RunError
from common.heavy import prepare_torchvision
from rollout import Sampling, WeightMismatch, fingerprint_tensors
from rollout.sync import PROBE_TOKENS, ModelSide, verify_sync
from rollout.transformers_engine import TransformersEngine
from rollout.weights import check_finite, merged_tensors

prepare_torchvision()

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

START, IMAGES, LENGTH = 40, 24, 9
PROMPTS = [[1, 2, 3], [4] * 17, list(range(5, 12))]


def tiny(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**values, **changes})).eval()


def engine_of(model, **options) -> TransformersEngine:
    return TransformersEngine(model, START, IMAGES, LENGTH, pad_id=0, **options)


def forced_logprobs(model, batch) -> torch.Tensor:
    rows = []
    for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.tolist()])).logits[0]
        image = logits[len(prompt) - 1 : -1, START : START + IMAGES].log_softmax(-1)
        rows.append(image.gather(1, completion[:, None] - START)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_any_grouping_of_heads_and_either_head_gives_exact_logprobs(heads, tied):
    model = tiny(num_key_value_heads=heads, tie_word_embeddings=tied)
    batch = engine_of(model).generate(PROMPTS, 4, Sampling(), list(range(12)))
    torch.testing.assert_close(
        batch.behaviour_logprobs, forced_logprobs(model, batch), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5, 8, 11, 12])
def test_the_micro_batch_changes_no_token(micro_batch):
    model = tiny()
    whole = engine_of(model).generate(PROMPTS, 4, Sampling(), list(range(12)))
    parts = engine_of(model, micro_batch=micro_batch).generate(
        PROMPTS, 4, Sampling(), list(range(12))
    )
    assert torch.equal(parts.completion_ids, whole.completion_ids)
    torch.testing.assert_close(
        parts.behaviour_logprobs, whole.behaviour_logprobs, atol=1e-5, rtol=0
    )


def test_a_single_token_completion_needs_no_second_pass():
    engine = TransformersEngine(tiny(), START, IMAGES, 1, pad_id=0)
    assert engine.generate(PROMPTS, 1, Sampling(), [0, 1, 2]).completion_ids.shape == (3, 1)


def test_training_mode_and_gradient_checkpointing_do_not_spoil_the_logprobs():
    model = tiny()
    expected = engine_of(model).generate(PROMPTS, 2, Sampling(), list(range(6)))
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()  # a frozen part keeps its own mode
    batch = engine_of(model).generate(PROMPTS, 2, Sampling(), list(range(6)))
    assert torch.equal(batch.behaviour_logprobs, expected.behaviour_logprobs)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert model.config._attn_implementation == "sdpa"


def test_the_trainer_s_own_module_needs_no_copy():
    model = tiny()
    engine = engine_of(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    verify_sync(engine, ModelSide(model, 1, PROMPTS, START, IMAGES))
    batch = engine.generate(PROMPTS, 1, Sampling(), [1, 2, 3])
    torch.testing.assert_close(
        batch.behaviour_logprobs, forced_logprobs(model, batch), atol=1e-5, rtol=0
    )


def with_lora(model):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return wrapped.eval()


def test_merged_tensors_are_those_of_peft_s_own_merge_and_leave_the_model_alone():
    wrapped = with_lora(tiny())
    reference = dict(deepcopy(wrapped).merge_and_unload().named_parameters())
    before = {name: tensor.clone() for name, tensor in wrapped.named_parameters()}
    merged = dict(merged_tensors(wrapped))
    assert merged.keys() == reference.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, reference[name], atol=1e-6, rtol=0)
    for name, tensor in wrapped.named_parameters():
        assert torch.equal(tensor, before[name])
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[q_proj], dict(tiny().named_parameters())[q_proj])


def test_a_disabled_adapter_is_not_merged():
    wrapped = with_lora(tiny())
    with wrapped.disable_adapter():
        assert fingerprint_tensors(merged_tensors(wrapped)) == fingerprint_tensors(
            tiny().named_parameters()
        )


def test_a_lora_trainer_syncs_into_a_plain_copy():
    wrapped = with_lora(tiny())
    verify_sync(engine_of(tiny()), ModelSide(wrapped, 1, PROMPTS, START, IMAGES))


def test_a_lora_module_can_be_sampled_from_directly_but_not_overwritten():
    wrapped = with_lora(tiny())
    engine = engine_of(wrapped.get_base_model())
    verify_sync(engine, ModelSide(wrapped, 1, PROMPTS, START, IMAGES))
    with pytest.raises(WeightMismatch, match="LoRA inside"):
        engine.load_weights(tiny().named_parameters(), 2)


def test_an_adapter_applied_twice_is_caught():
    wrapped = with_lora(tiny())
    twice = with_lora(tiny())
    with torch.no_grad():
        for name, tensor in merged_tensors(wrapped):
            owner, _, leaf = name.rpartition(".")
            layer = twice.get_base_model().get_submodule(owner)
            getattr(getattr(layer, "base_layer", layer), leaf).copy_(tensor)
    with pytest.raises(WeightMismatch):
        verify_sync(
            engine_of(twice.get_base_model()), ModelSide(wrapped, 1, PROMPTS, START, IMAGES)
        )


def test_what_only_late_tokens_show_is_seen_by_whole_probes():
    model = tiny()
    side, engine = ModelSide(model, 1, PROMPTS, START, IMAGES), engine_of(tiny())
    longest = max(map(len, PROMPTS))

    def wrong(module, given, options, output):
        if int(options["position_ids"].max()) >= longest + PROBE_TOKENS:
            output.last_hidden_state = output.last_hidden_state * 1.1

    engine.model.model.register_forward_hook(wrong, with_kwargs=True)
    verify_sync(engine, side)
    with pytest.raises(WeightMismatch, match="log-probs of probe"):
        verify_sync(engine, side, length=LENGTH)


class Broken:
    """An engine whose probes went wrong."""

    def __init__(self, change) -> None:
        self._engine, self._change = engine_of(tiny()), change

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def probe(self, prompt_ids, length):
        [batch] = self._engine.probe(prompt_ids, length).values()
        return {"the engine": replace(batch, **self._change(batch))}


@pytest.mark.parametrize("token", [START - 1, START + IMAGES, 0, 70, -1])
def test_a_probe_token_that_is_no_image_token_stops_the_run(token):
    def change(batch):
        drawn = batch.completion_ids.clone()
        drawn[1, 2] = token
        return {"completion_ids": drawn}

    with pytest.raises(WeightMismatch, match="probe 1 differ from the trainer's by inf"):
        verify_sync(Broken(change), ModelSide(tiny(), 1, PROMPTS, START, IMAGES))


@pytest.mark.parametrize("rows", [slice(1), slice(0)])
@pytest.mark.parametrize(
    "fields", [("behaviour_logprobs",), ("completion_ids", "behaviour_logprobs")]
)
def test_missing_probes_stop_the_run(rows, fields):
    def change(batch):
        return {field: getattr(batch, field)[rows] for field in fields}

    with pytest.raises(WeightMismatch, match=r"of shapes .* instead of \[3, 4\]"):
        verify_sync(Broken(change), ModelSide(tiny(), 1, PROMPTS, START, IMAGES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_trained_weights_that_are_not_finite_are_named(value):
    model = with_lora(tiny())
    check_finite(model, 5)
    name, weight = next((n, w) for n, w in model.named_parameters() if "down_proj.lora_B" in n)
    with torch.no_grad():
        weight[3, 2] = value
    with pytest.raises(RunError, match=f"`{name}` has values that are not finite after 5 steps"):
        check_finite(model, 5)


def test_windowed_attention_is_refused():
    with pytest.raises(RunError, match="full attention"):
        engine_of(tiny(use_sliding_window=True, sliding_window=4, max_window_layers=1))
