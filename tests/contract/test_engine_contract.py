"""Both engines against the contract: law and log-probs of the samples, seeds, and weight sync."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_networks import tiny_qwen3

from common.errors import PolicyError, RunError
from common.heavy import prepare_torchvision
from common.seeds import counter_seed
from rollout import Engine, Sampling, WeightMismatch, fingerprint_tensors
from rollout.sync import ModelSide, verify_sync
from rollout.transformers_engine import TransformersEngine
from rollout.weights import merged_tensors

prepare_torchvision()

from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

START, IMAGES, LENGTH = 300, 64, 12
# The third prompt is longer than a block of vLLM's prefix cache (32).
PROMPTS = [[1, 2, 3], list(range(10, 30)), list(range(50, 95))]
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=9),
    Sampling(temperature=0.9, top_k=30, top_p=0.8),
]
TOLERANCE = {"transformers": 1e-5, "vllm": 1e-4}
KINDS = list(TOLERANCE)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_qwen3()


@pytest.fixture(scope="module")
def pristine(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in merged_tensors(model)}


@pytest.fixture(scope="module")
def engines(model, tmp_path_factory) -> Iterator[dict[str, Engine]]:
    from copy import deepcopy

    from rollout.vllm_engine import VllmEngine

    folder = tmp_path_factory.mktemp("ar")
    model.save_pretrained(folder)
    vllm = VllmEngine(
        folder, START, IMAGES, LENGTH, max_prompt_length=64, max_sequences=64, cache_gib=0.1
    )
    own = TransformersEngine(deepcopy(model), START, IMAGES, LENGTH, pad_id=0)
    yield {"transformers": own, "vllm": vllm}
    vllm.close()


@pytest.fixture(params=KINDS)
def engine(request, engines, model, pristine) -> Engine:
    """An engine that holds the pristine weights, as the trainer's model does."""
    with torch.no_grad():
        for name, tensor in merged_tensors(model):
            tensor.copy_(pristine[name])
    engines[request.param].load_weights(pristine.items(), step=0)
    return engines[request.param]


def kind(engine: Engine) -> str:
    return "transformers" if isinstance(engine, TransformersEngine) else "vllm"


def seeds(count: int, run: int = 0) -> list[int]:
    return [counter_seed(run, "tokens", index) for index in range(count)]


def probes(model: Qwen3ForCausalLM, step: int) -> ModelSide:
    return ModelSide(model, step, PROMPTS, START, IMAGES)


def train(model: Qwen3ForCausalLM, size: float = 0.02) -> None:
    """Stand for an optimizer step: every tensor moves."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def expected_logprob(logits: np.ndarray, token: int, sampling: Sampling) -> float:
    """The truncated softmax written out over sorted probabilities in float64."""
    logits = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits)
    keep = order[: sampling.top_k or len(order)]
    mass = np.exp(logits[keep] - logits[keep].max())
    mass /= mass.sum()
    # A token stays if what is more probable than it does not reach top_p yet.
    keep = keep[np.cumsum(mass) - mass < sampling.top_p]
    mass = np.exp(logits[keep] - logits[keep].max())
    mass /= mass.sum()
    return float(np.log(mass[list(keep).index(token)]))


def test_batches_have_the_promised_form(engine):
    batch = engine.generate(PROMPTS, 2, Sampling(), seeds(6))
    assert batch.prompt_ids == [PROMPTS[i // 2] for i in range(6)]
    assert batch.completion_ids.shape == batch.behaviour_logprobs.shape == (6, LENGTH)
    assert batch.completion_ids.dtype == torch.int64
    assert batch.behaviour_logprobs.dtype == torch.float32
    assert batch.completion_ids.min() >= START
    assert batch.completion_ids.max() < START + IMAGES
    # Used as a constant of a loss that is differentiated.
    loss = (torch.ones(6, LENGTH, requires_grad=True) * batch.behaviour_logprobs).sum()
    loss.backward()


@pytest.mark.parametrize("sampling", SETTINGS)
def test_behaviour_logprobs_are_those_of_the_teacher_forced_truncated_softmax(
    engine, model, sampling
):
    batch = engine.generate(PROMPTS, 3, sampling, seeds(9, run=1))
    for prompt, completion, found in zip(
        batch.prompt_ids, batch.completion_ids, batch.behaviour_logprobs, strict=True
    ):
        ids = torch.tensor([prompt + completion.tolist()])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1, START : START + IMAGES]
        expected = [
            expected_logprob(row.numpy(), int(token) - START, sampling)
            for row, token in zip(logits, completion, strict=True)
        ]
        np.testing.assert_allclose(found.numpy(), expected, atol=TOLERANCE[kind(engine)], rtol=0)


def test_top_k_one_is_the_library_s_greedy_decoding_with_logprob_zero(engine, model):
    batch = engine.generate(PROMPTS, 1, Sampling(top_k=1), seeds(3))
    allowed = list(range(START, START + IMAGES))
    for prompt, completion in zip(PROMPTS, batch.completion_ids, strict=True):
        greedy = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda *_: allowed,
        )
        assert completion.tolist() == greedy[0, len(prompt) :].tolist()
    assert batch.behaviour_logprobs.abs().max() == 0


def test_a_sample_depends_on_its_prompt_and_seed_alone(engine):
    numbers = seeds(6)
    together = engine.generate(PROMPTS, 2, Sampling(), numbers)
    again = engine.generate(PROMPTS, 2, Sampling(), numbers)
    assert torch.equal(together.completion_ids, again.completion_ids)
    for index in range(6):
        alone = engine.generate([PROMPTS[index // 2]], 1, Sampling(), [numbers[index]])
        assert torch.equal(alone.completion_ids[0], together.completion_ids[index])
    others = engine.generate(PROMPTS, 2, Sampling(), seeds(6, run=2))
    assert not (others.completion_ids == together.completion_ids).all(dim=1).any()
    assert not torch.equal(together.completion_ids[0], together.completion_ids[1])


def test_new_weights_are_used_after_each_of_many_syncs(engine, model):
    engine.generate(PROMPTS, 1, Sampling(), seeds(3))  # fills what may be cached
    for step in range(1, 6):
        train(model)
        verify_sync(engine, probes(model, step))
        assert engine.fingerprint() == fingerprint_tensors(model.named_parameters())


def test_a_head_given_beside_its_tied_embedding_is_accepted(engine, model):
    train(model)
    engine.load_weights(model.state_dict().items(), step=1)
    assert engine.fingerprint() == fingerprint_tensors(model.named_parameters())


class Faulty:
    """An engine whose pushes go wrong in one way."""

    def __init__(self, engine: Engine, fault: str) -> None:
        self.engine, self.fault = engine, fault
        self.previous: dict[str, torch.Tensor] | None = None

    def load_weights(self, named_tensors, step):
        tensors = {name: tensor.clone() for name, tensor in named_tensors}
        previous, self.previous = self.previous, dict(tensors)
        if previous is None:
            pass
        elif self.fault == "dropped":
            return
        elif self.fault == "stale":
            tensors = previous
        else:
            tensors[self.fault] = previous[self.fault]
        self.engine.load_weights(tensors.items(), step)

    def __getattr__(self, name):
        return getattr(self.engine, name)


@pytest.mark.parametrize(
    "fault",
    [
        "dropped",
        "stale",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_sync_that_goes_wrong_is_caught_at_once(engine, model, fault):
    faulty = Faulty(engine, fault)
    verify_sync(faulty, probes(model, 1))
    # So small that no log-prob would show it: one step at a learning rate of 1e-6.
    train(model, size=1e-6)
    with pytest.raises(WeightMismatch, match="step 2"):
        verify_sync(faulty, probes(model, 2))


def test_probes_alone_catch_an_engine_that_reports_the_right_fingerprint(engine, model):
    faulty = Faulty(engine, "stale")
    verify_sync(faulty, probes(model, 1))
    train(model)
    faulty.fingerprint = lambda: fingerprint_tensors(model.named_parameters())
    with pytest.raises(WeightMismatch, match="log-probs of probe"):
        verify_sync(faulty, probes(model, 2))


@pytest.mark.parametrize("length", [1, 4])
def test_probes_are_the_first_tokens_of_whole_completions(engine, length):
    whole = engine.generate(PROMPTS, 1, Sampling(), [0, 1, 2])
    [probes] = engine.probe(PROMPTS, length).values()
    assert probes.prompt_ids == PROMPTS
    assert torch.equal(probes.completion_ids, whole.completion_ids[:, :length])
    torch.testing.assert_close(
        probes.behaviour_logprobs, whole.behaviour_logprobs[:, :length], atol=1e-5, rtol=0
    )


def test_a_proved_sync_changes_neither_random_states_nor_samples(engine, model):
    train(model)
    engine.load_weights(merged_tensors(model), step=1)
    expected = engine.generate(PROMPTS, 2, Sampling(), seeds(6))
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    verify_sync(engine, probes(model, 1))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()
    found = engine.generate(PROMPTS, 2, Sampling(), seeds(6))
    assert torch.equal(found.completion_ids, expected.completion_ids)


@pytest.mark.parametrize("what", ["missing", "unknown", "misshapen", "twice"])
def test_an_incomplete_push_is_refused_and_changes_nothing(engine, model, what):
    before = engine.fingerprint()
    train(model)
    tensors = list(merged_tensors(model))
    name, tensor = tensors[3]
    if what == "missing":
        del tensors[3]
    elif what == "unknown":
        tensors.append(("model.layers.9.mlp.up_proj.weight", tensor))
    elif what == "misshapen":
        tensors[3] = (name, tensor[:-1])
    else:
        tensors.append((name, tensor))
    with pytest.raises(WeightMismatch, match=what):
        engine.load_weights(tensors, step=1)
    assert engine.fingerprint() == before


@pytest.mark.parametrize(
    ("prompts", "n", "count", "words"),
    [([], 1, 0, "nothing to sample"), ([[1], []], 1, 2, "prompt 1"), ([[1]], 2, 1, "1 seeds")],
)
def test_impossible_requests_say_what_is_wrong(engine, prompts, n, count, words):
    with pytest.raises(RunError, match=words):
        engine.generate(prompts, n, Sampling(), seeds(count))


def test_vllm_s_packed_copy_of_a_tied_head_is_watched(engines, model, pristine, monkeypatch):
    vllm = engines["vllm"]
    vllm.load_weights(pristine.items(), step=0)
    train(model)
    with monkeypatch.context() as patch:
        patch.setattr("rollout.vllm_engine.repack_tied_head", lambda model: None)
        with pytest.raises(WeightMismatch, match="packed copy"):
            verify_sync(vllm, probes(model, 1))
    verify_sync(vllm, probes(model, 2))


def test_a_prefix_cache_that_outlives_its_weights_is_caught(engines, model, monkeypatch):
    vllm = engines["vllm"]
    verify_sync(vllm, probes(model, 1))
    train(model)
    with monkeypatch.context() as patch:
        patch.setattr(vllm._llm, "reset_prefix_cache", lambda: True)
        with pytest.raises(WeightMismatch, match="log-probs of probe 2"):
            verify_sync(vllm, probes(model, 2))
    verify_sync(vllm, probes(model, 3))


def test_sampling_with_vllm_leaves_random_states_threads_and_environment_alone(engines):
    environment, threads = dict(os.environ), torch.get_num_threads()
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    engines["vllm"].generate(PROMPTS, 1, Sampling(), seeds(3))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()
    assert dict(os.environ) == environment
    assert "LD_PRELOAD" not in os.environ or "vllm" not in os.environ["LD_PRELOAD"]
    torch.set_num_threads(threads)  # the real function: vLLM's replacement would only warn
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"


def test_vllm_names_the_limits_it_was_started_with(engines, tmp_path):
    from rollout.vllm_engine import VllmEngine

    with pytest.raises(RunError, match="max_prompt_length"):
        engines["vllm"].generate([[1] * 65], 1, Sampling(), [0])
    with pytest.raises(PolicyError, match=r"config\.json"):
        VllmEngine(tmp_path, START, IMAGES, LENGTH)
    Qwen3Config(head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="head_dim is 16"):
        VllmEngine(tmp_path, START, IMAGES, LENGTH)


@pytest.mark.parametrize("cache_gib", [1e-7, 1e-4])
def test_a_cache_too_small_for_one_picture_is_told_by_its_key(engines, model, tmp_path, cache_gib):
    """Too small for one block of 32 KiB, and for the three that the longest sequence takes."""
    from rollout.vllm_engine import VllmEngine

    model.save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"cache.*\n    Fix: raise rollout\.vllm\.cache_gib") as told:
        VllmEngine(tmp_path, START, IMAGES, LENGTH, max_prompt_length=64, cache_gib=cache_gib)
    assert "gpu_memory_utilization" not in str(told.value)
