"""Parameter counts of the published architecture, by arithmetic on its configurations alone."""

import itertools
import json
from pathlib import Path

import pytest

from policy import base_path
from policy.anatomy import read_anatomy
from policy.published import published_anatomy

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity" / "blip3o_tiny"


@pytest.fixture(scope="module")
def counts():
    return published_anatomy().parameters


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def convolution(inputs: int, outputs: int, side: int, groups: int = 1, bias: bool = True) -> int:
    return inputs // groups * outputs * side**2 + bias * outputs


def test_the_language_model(counts):
    width, inner, heads, kv_heads, head = 2048, 6144, 16, 8, 128
    attention = width * head * (2 * heads + 2 * kv_heads) + 2 * head  # with the norms of q and k
    layer = attention + 3 * width * inner + 2 * width
    vocabulary = 151_669 + 2 + 3 + 65_536
    assert vocabulary == 217_210
    assert counts["ar"] == vocabulary * width + 28 * layer + width  # the head is the embedding


def test_the_image_tokenizer(counts):
    width, inner, patch, positions, bottleneck = 1152, 4304, 14, 27 * 27, 1536
    norm = 2 * width
    mlp = linear(width, inner) + linear(inner, width)
    layer = 4 * linear(width, width) + mlp + 2 * norm
    embeddings = convolution(3, width, patch) + positions * width
    pooling = width + 4 * linear(width, width) + mlp + norm
    encoder = embeddings + 27 * layer + norm + pooling
    assert encoder == 428_225_600  # as the SigLIP2 paper's So400m: 0.4 B
    codebook = 65_536 * bottleneck + linear(bottleneck, bottleneck)
    bottlenecks = linear(width, width) + linear(width, bottleneck)
    assert counts["image_tokenizer"] == encoder + bottlenecks + codebook


def test_the_connector_and_the_diffusion_head(counts):
    assert counts["connector"] == linear(2048, 2304) + linear(2304, 2304) + 2304
    width, layers, widened = 70 * 32, 20, 2 * int(2.5 * 70 * 32)
    attention = 3 * linear(width, width, bias=False) + linear(width, width) + 2 * width
    cross = 4 * linear(width, width) + 2 * width
    gated = (
        convolution(width, widened, 1)
        + convolution(widened, widened, 3, groups=widened)
        + convolution(widened // 2, width, 1, bias=False)
    )
    block = attention + cross + gated + 6 * width
    time = linear(256, width) + linear(width, width) + linear(width, 6 * width)
    caption = linear(2304, width) + linear(width, width) + width
    ends = convolution(32, width, 1) + linear(width, 32) + 2 * width
    assert counts["diffusion"] == layers * block + time + caption + ends


def test_the_autoencoder(counts):
    channels = (128, 256, 512, 512, 1024, 1024)

    def residual(width: int) -> int:
        return convolution(width, width, 3) + convolution(width, width, 3, bias=False) + 2 * width

    def vit(width: int) -> int:
        scale = convolution(3 * width, 3 * width, 5, groups=3 * width, bias=False)
        scale += convolution(3 * width, 3 * width, 1, groups=3 * width // 32, bias=False)
        attention = 3 * width * width + scale + 2 * width * width + 2 * width
        gated = convolution(width, 8 * width, 1) + convolution(8 * width, 8 * width, 3, 8 * width)
        return attention + gated + convolution(4 * width, width, 1, bias=False) + 2 * width

    def stages(blocks: tuple[int, ...]) -> int:
        kinds = (residual,) * 3 + (vit,) * 3
        return sum(
            count * kind(width) for count, kind, width in zip(blocks, kinds, channels, strict=True)
        )

    steps = itertools.pairwise(channels)
    between = [(convolution(a, b, 3), convolution(b, a, 3)) for a, b in steps]
    encoder = convolution(3, 128, 3) + stages((2, 2, 2, 3, 3, 3)) + convolution(1024, 32, 3)
    decoder = convolution(32, 1024, 3) + stages((3,) * 6) + convolution(128, 3, 3) + 2 * 128
    down, up = (sum(column) for column in zip(*between, strict=True))
    assert counts["vae"] == encoder + down + decoder + up


def test_the_embedding_grows_to_the_vocabulary_of_the_specification():
    from policy.published import DESCRIPTION, QWEN3

    last = DESCRIPTION.image_start_id + DESCRIPTION.num_image_tokens
    assert last == QWEN3["vocab_size"] == 217_210
    assert DESCRIPTION.num_tokens == 729


@pytest.mark.skipif(not PARITY.is_dir(), reason="needs the reference checkpoint in ../shared")
def test_the_description_has_the_keys_of_the_published_configurations():
    """Keys that the published files have and ours lack would be sizes that nobody set."""
    from policy.published import DC_AE, QWEN3, SANA

    sizes = {"dropout", "guidance_embeds", "guidance_embeds_scale", "timestep_scale"}
    for ours, file in (
        (SANA, "diffusion/transformer/config.json"),
        (DC_AE, "diffusion/vae/config.json"),
    ):
        theirs = json.loads((PARITY / file).read_text())
        assert {key for key in theirs if not key.startswith("_")} - set(ours) - sizes == set()
    assert QWEN3.keys() <= json.loads((PARITY / "checkpoint" / "config.json").read_text()).keys()


def test_a_folder_s_headers_hold_what_the_modules_hold():
    from policy import Policy

    policy = Policy.from_pretrained(base_path())
    counted = {
        name: sum(p.numel() for p in getattr(policy, name).parameters())
        for name in ("ar", "image_tokenizer", "connector", "diffusion", "vae")
    }
    assert read_anatomy(base_path()).parameters == counted
