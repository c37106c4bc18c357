"""The sampler's arithmetic: truncation, inverse-CDF draws, requests and fingerprints."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import RunError
from common.heavy import prepare_torchvision
from policy.sampling import draw, truncated_logprobs
from rollout import Sampling, WeightMismatch, fingerprint_tensors
from rollout.engine import _sums

prepare_torchvision()

from transformers import (  # noqa: E402
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.05, 1.0),
)
def test_truncation_is_that_of_the_library_s_warpers(seed, temperature, top_k, top_p):
    logits = 3 * torch.randn(4, 40, generator=torch.Generator().manual_seed(seed))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = truncated_logprobs(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(found, expected.log_softmax(-1))


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = truncated_logprobs(logits, Sampling(top_p=0.7)).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    alone = truncated_logprobs(logits, Sampling(top_p=0.01)).exp()
    torch.testing.assert_close(alone, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


@settings(deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 50.0]), min_size=2, max_size=9).filter(
        any
    ),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(weights, uniform):
    total = math.fsum(weights)
    logprobs = torch.tensor([weights], dtype=torch.float64).div(total).log()
    index = int(draw(logprobs, torch.tensor([uniform], dtype=torch.float64)))
    assert weights[index] > 0
    assert math.fsum(weights[:index]) <= uniform * total + 1e-6 * total
    assert math.fsum(weights[: index + 1]) >= uniform * total - 1e-6 * total


def test_equidistant_quantiles_give_the_exact_law():
    probabilities = torch.tensor([0.1, 0.0, 0.2, 0.45, 0.25, 0.0])
    count = 200_000
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(probabilities.log().expand(count, -1), quantiles)
    shares = torch.bincount(drawn, minlength=6) / count
    torch.testing.assert_close(shares, probabilities, atol=1e-5, rtol=0)


def test_generator_draws_pass_chi_square():
    logits = 2 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    count = 200_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn = draw(logits.log_softmax(-1).expand(count, -1), uniforms)
    expected = np.exp(logits.double().numpy())
    expected *= count / expected.sum()
    found = np.bincount(drawn.numpy(), minlength=64)
    assert stats.chisquare(found, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_sampling_that_has_no_law_is_refused(values):
    with pytest.raises(RunError, match=next(iter(values))):
        Sampling(**values)


def test_a_fingerprint_does_not_depend_on_order_or_layout():
    one, two = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)
    digest = fingerprint_tensors([("one", one), ("two", two)])
    assert digest == fingerprint_tensors([("two", two), ("one", one)])
    assert digest == fingerprint_tensors([("one", one.t().contiguous().t()), ("two", two)])


def test_a_fingerprint_sees_every_change():
    tensors = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.ones(4)}
    bit = tensors["one"].clone()
    bit.view(torch.int32)[1, 1] ^= 1
    variants = [
        tensors,
        {**tensors, "one": bit},
        {**tensors, "one": tensors["one"].reshape(3, 2)},
        {**tensors, "one": tensors["one"].double()},
        {"one": tensors["one"]},
        {"uno": tensors["one"], "two": tensors["two"]},
        {"one": tensors["two"], "two": tensors["one"]},
    ]
    assert len({fingerprint_tensors(v.items()) for v in variants}) == len(variants)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_fingerprint_sees_what_a_plain_sum_would_not(data):
    """Flipped signs, elements that changed places, in the last bytes, behind the first megabyte."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    count = data.draw(st.sampled_from([2, 3, 17, 2**18 + 5]))
    one = torch.arange(1, count + 1).remainder(97).add(1).to(dtype)
    where = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=6, unique=True))
    signs, places = one.clone(), one.clone()
    signs[where] = -signs[where]
    places[where] = places[where].roll(1)
    before = fingerprint_tensors([("a", one)])
    assert fingerprint_tensors([("a", signs)]) != before
    moved = not torch.equal(places, one)
    assert (fingerprint_tensors([("a", places)]) != before) == moved


def test_no_pair_of_flipped_signs_cancels_out():
    one = torch.arange(1.0, 18.0)
    before, pairs = fingerprint_tensors([("a", one)]), [(i, j) for j in range(17) for i in range(j)]
    for pair in pairs:
        flipped = one.clone()
        flipped[list(pair)] *= -1
        assert fingerprint_tensors([("a", flipped)]) != before, pair


def test_the_sums_of_a_fingerprint_are_what_they_are_said_to_be():
    """Again in Python's numbers: words of 8 bytes, odd factors, products that are folded."""
    values = torch.tensor([1.5, -2.0, -0.0, 3.25, 7.0])
    factors = [int(raw) | 1 for raw in np.random.PCG64(0).random_raw(3)]
    words = np.frombuffer(struct.pack("<6f", 1.5, -2.0, 0.0, 3.25, 7.0, 0.0), "<i8").tolist()
    total = 0
    for word, factor in zip(words, factors, strict=True):
        product = word * factor % 2**64
        total += (product ^ (product >> 32)) * factor
    total = (total + 2**63) % 2**64 - 2**63
    assert _sums(values).tolist() == [total]


def test_negative_zero_counts_as_zero_and_a_name_twice_is_an_error():
    zero = fingerprint_tensors([("a", torch.zeros(2))])
    assert fingerprint_tensors([("a", -torch.zeros(2))]) == zero
    with pytest.raises(WeightMismatch, match="twice"):
        fingerprint_tensors([("a", torch.zeros(2)), ("a", torch.zeros(2))])
