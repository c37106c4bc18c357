"""Both engines draw from the softmax they report: chi-square over 200,000 tokens.

All rows of the embedding are made equal, so every position of every sequence has the same hidden
state and all tokens are independent draws from one law, which a plain forward pass gives.
"""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_networks import tiny_qwen3

from common.heavy import prepare_torchvision
from common.seeds import counter_seed
from rollout import Engine, Sampling
from rollout.transformers_engine import TransformersEngine

prepare_torchvision()

from transformers import Qwen3ForCausalLM  # noqa: E402

START, IMAGES, LENGTH = 300, 64, 100
SAMPLES = 2_000
SETTINGS = {
    "plain": Sampling(),
    "truncated": Sampling(temperature=1.5, top_k=30, top_p=0.9),
}


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    model = tiny_qwen3(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[0].clone())
    return model


@pytest.fixture(scope="module")
def vllm_engine(model, tmp_path_factory) -> Iterator[Engine]:
    from rollout.vllm_engine import VllmEngine

    folder = tmp_path_factory.mktemp("ar")
    model.save_pretrained(folder)
    engine = VllmEngine(
        folder, START, IMAGES, LENGTH, max_prompt_length=8, max_sequences=1000, cache_gib=0.1
    )
    yield engine
    engine.close()


@pytest.fixture
def engine(request, model) -> Engine:
    if request.param == "vllm":
        return request.getfixturevalue("vllm_engine")
    return TransformersEngine(deepcopy(model), START, IMAGES, LENGTH, pad_id=0, micro_batch=1000)


def law(model: Qwen3ForCausalLM, sampling: Sampling) -> np.ndarray:
    """float64 [IMAGES]: the truncated softmax, written out over sorted probabilities."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits[0]
    assert torch.allclose(logits[0], logits[2], atol=1e-5)
    scaled = logits[-1, START : START + IMAGES].double().numpy() / sampling.temperature
    order = np.argsort(-scaled)
    keep = order[: sampling.top_k or IMAGES]
    mass = np.exp(scaled[keep] - scaled.max())
    mass /= mass.sum()
    keep = keep[np.cumsum(mass) - mass < sampling.top_p]
    result = np.zeros(IMAGES)
    result[keep] = np.exp(scaled[keep] - scaled.max())
    return result / result.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "name"),
    [(engine, name) for engine in ("transformers", "vllm") for name in SETTINGS],
    indirect=["engine"],
)
def test_draws_follow_the_softmax(engine, model, name):
    sampling = SETTINGS[name]
    expected = law(model, sampling) * SAMPLES * LENGTH
    seeds = [counter_seed(11, name, index) for index in range(SAMPLES)]
    batch = engine.generate([[1, 2, 3]], SAMPLES, sampling, seeds)
    codes = batch.completion_ids - START
    found = np.bincount(codes.flatten().numpy(), minlength=IMAGES)
    allowed = expected > 0
    assert allowed.sum() == 64 if name == "plain" else 10 < allowed.sum() < 30
    assert found.sum() == SAMPLES * LENGTH == 200_000
    assert found[~allowed].sum() == 0
    assert stats.chisquare(found[allowed], expected[allowed]).pvalue > 1e-3
    # Neighbours in a sequence are independent: a generator that repeats itself shows here.
    frequent = int(found.argmax())
    hits = (codes == frequent).double().numpy()
    lag_one = np.corrcoef(hits[:, :-1].ravel(), hits[:, 1:].ravel())[0, 1]
    assert abs(lag_one) < 4 / np.sqrt(hits[:, 1:].size)
    # So are sequences: their counts of the most frequent token vary as a binomial does.
    share = expected[frequent] / expected.sum()
    spread = hits.sum(axis=1).var() / (LENGTH * share * (1 - share))
    assert abs(spread - 1) < 4 * np.sqrt(2 / SAMPLES)
