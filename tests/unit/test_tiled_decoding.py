"""`decode.*.tile`: what tiles change of a picture, and where they do not reach."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import write_recipe
from torch.utils.flop_counter import FlopCounterMode

from cli.main import main
from common.errors import RecipeError
from common.journal import read_journal
from policy.anatomy import read_anatomy
from policy.pixels import decode_latents, to_images
from policy.tiling import check_tile, pixels_per_cell, stride_of, tile_sides
from recipes import load_recipe
from rl import flops
from rl.run import decoding
from rollout.decode import rendered

CELL = 8
TILE = 20 * CELL
"""A tile of 20 cells in a picture of 24: tiles begin at 0 and 18 and share two cells."""


def latents_of(policy, height: int, width: int, batch: int = 1) -> torch.Tensor:
    shape = (batch, policy.config.latent_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def attentive() -> AutoencoderDC:
    """The published kind of autoencoder: linear attention in the stages next to the latents."""
    torch.manual_seed(0)
    kinds, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    both = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", kinds), ("qkv_multiscales", scales),
            ("block_out_channels", (8, 16, 32)), ("layers_per_block", (1, 1, 1)),
        )
    }  # fmt: skip
    return AutoencoderDC(latent_channels=16, **both).eval()


# --- pictures -------------------------------------------------------------------------------------


def test_an_autoencoder_of_convolutions_decodes_the_inside_of_a_tile_as_the_whole(policy):
    """How far it looks is read off the gradient of one pixel, not off the tiles."""
    latents = latents_of(policy, 24, 24)
    seen = latents.clone().requires_grad_()
    policy.vae.decode(seen).sample[0, :, 12 * CELL, 12 * CELL].sum().backward()
    columns = seen.grad.abs().amax((0, 1, 2)).nonzero()
    reach = int((columns - 12).abs().max())
    assert 2 <= reach <= 9
    with torch.no_grad():
        whole, tiled = (decode_latents(policy.vae, latents, tile) for tile in (None, TILE))
    inside = slice(0, min(18, 20 - reach) * CELL)
    assert torch.allclose(tiled[..., inside, inside], whole[..., inside, inside], atol=1e-5)
    off = (tiled - whole).abs().amax((0, 1))
    assert off[:, 18 * CELL :].max() > 0.01
    assert off[18 * CELL :].max() > 0.01


def test_linear_attention_makes_every_pixel_of_tiles_another_one():
    vae = attentive()
    latents = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, tiled = (decode_latents(vae, latents, tile) for tile in (None, 20 * 4))
    off = (tiled - whole).abs().amax((0, 1))[: 8 * 4, : 8 * 4]  # farthest from every seam
    assert (off > 1e-4).float().mean() > 0.9


@torch.no_grad()
def test_what_two_tiles_share_goes_over_from_one_to_the_other(policy):
    strip = latents_of(policy, 2, 24, batch=2)
    found = decode_latents(policy.vae, strip, TILE)

    def decoded(part: torch.Tensor) -> np.ndarray:
        scaled = part / policy.vae.config.scaling_factor
        return policy.vae.decode(scaled).sample.double().numpy()

    left, right = decoded(strip[..., :20]), decoded(strip[..., 18:])
    share = np.arange(16) / 16
    between = left[..., 144:160] * (1 - share) + right[..., :16] * share
    expected = np.concatenate([left[..., :144], between, right[..., 16:]], axis=-1)
    assert np.allclose(found, np.clip(expected / 2 + 0.5, 0, 1), atol=1e-5)


@torch.no_grad()
def test_tiles_leave_nothing_behind_for_other_threads_and_calls(policy):
    latents = latents_of(policy, 12, 12, batch=2)
    asked = [None, 64, None, 32, None, 64] * 2
    alone = {tile: decode_latents(policy.vae, latents, tile) for tile in (64, 32, None)}
    assert not torch.equal(alone[None], alone[64])
    assert not torch.equal(alone[32], alone[64])
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda tile: decode_latents(policy.vae, latents, tile), asked))
    for tile, pixels in zip(asked, found, strict=True):
        assert torch.equal(pixels, alone[tile])
    assert not policy.vae.use_tiling
    assert policy.vae.tile_sample_min_height == 512


# --- geometry -------------------------------------------------------------------------------------


def test_the_overlap_is_the_library_s(policy):
    vae = policy.vae
    assert stride_of(vae.tile_sample_min_width, 32) == vae.tile_sample_stride_width
    assert pixels_per_cell(vae.config) == vae.spatial_compression_ratio == CELL
    assert tile_sides(32, 512, 32) == [16, 16, 4]


@given(st.integers(2, 64), st.integers(2, 64), st.sampled_from([8, 16, 32]))
def test_tiles_cover_a_picture_and_overlap_by_a_cell_at_least(latent_size, cells, ratio):
    if cells >= latent_size:
        with pytest.raises(RecipeError, match="to null, for whole pictures"):
            check_tile("decode.train.tile", cells * ratio, latent_size, ratio)
        return
    check_tile("decode.train.tile", cells * ratio, latent_size, ratio)
    stride = stride_of(cells * ratio, ratio)
    assert stride % ratio == 0
    assert 0 < stride // ratio < cells
    sides = tile_sides(latent_size, cells * ratio, ratio)
    covered = [
        set(range(i * stride // ratio, i * stride // ratio + n)) for i, n in enumerate(sides)
    ]
    assert set.union(*covered) == set(range(latent_size))
    assert max(sides) == cells


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["check", "plan", "train"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decode.train.tile=48", "decode.train.tile: a picture has 48 px a side, no more than a "
         "tile of 48. Fix: set decode.train.tile to null, for whole pictures, or to less than 48."),
        ("decode.eval.tile=20", "decode.eval.tile: 20 px are not a multiple of the autoencoder's "
         "8. Fix: set decode.eval.tile to 16."),
        ("decode.train.tile=8", "Fix: set decode.train.tile to 16 or more."),
    ],
)  # fmt: skip
def test_tiles_that_cannot_be_are_told_by_key(
    policy_folder, tmp_path, capsys, verb, override, words
):
    recipe = write_recipe(tmp_path, policy_folder)
    out = ["--out", str(tmp_path / "run")] if verb == "train" else []
    assert main([verb, str(recipe), override, *out]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_recipe_s_key_reaches_the_pictures(policy):
    hidden = torch.randn(2, 37, policy.ar.config.hidden_size)
    recipe = load_recipe("geneval-scenes", ["decode.train.tile=32"]).recipe
    found = rendered(policy, hidden, [1, 2], decoding(recipe, recipe.decode.train))
    options = {"noise": policy.noise([1, 2]), "guidance": recipe.decode.train.guidance}
    options["steps"] = recipe.decode.train.steps
    assert found == to_images(policy.render(hidden, tile=32, **options))
    assert found != to_images(policy.render(hidden, **options))
    assert decoding(recipe, recipe.decode.eval).tile is None


def test_a_run_in_tiles_is_checked_against_whole_pictures(policy_folder, tmp_path):
    """Tiles are all that is cheap here; a limit of 1 drops them at the first difference."""
    recipe = write_recipe(tmp_path, policy_folder)
    asked = ["decode.train.tile=16", "decode.check={every: 1, limit: 1.0}", "train.steps=2"]
    assert main(["train", str(recipe), *asked, "--out", str(tmp_path / "run")]) == 0
    rows = read_journal(tmp_path / "run" / "metrics.jsonl")
    [check] = [row for row in rows if row.get("event") == "decode_check"]
    assert -1 <= check["rank_correlation"] < 1
    assert check["raised"]
    assert check["tile"] is None  # and the second step has nothing to compare
    assert check["steps"] == 2


# --- what they cost -------------------------------------------------------------------------------


def test_operations_in_tiles_are_those_that_the_counter_sees(policy, policy_folder):
    anatomy = read_anatomy(policy_folder)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decode_latents(policy.vae, latents_of(policy, 6, 6), 32)
    assert flops.autoencoder_flops(anatomy, 32) == pytest.approx(
        counter.get_total_flops(), rel=1e-6
    )
    assert flops.autoencoder_flops(anatomy, 32) * 36 == flops.autoencoder_flops(anatomy, None) * 49
