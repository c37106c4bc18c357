"""The autoencoder's tiles: squares of a picture that are decoded one by one, overlap and blend.

Decoding in tiles is diffusers' `AutoencoderDC.tiled_decode`; here stand its geometry and what it
takes. A tile sees nothing of the others, so that memory falls and the picture is another one where
the autoencoder looks further (`docs/rollouts.md` has figures). Nothing in this file imports torch.
"""

from collections.abc import Mapping
from typing import Any

from common.errors import RecipeError


def pixels_per_cell(vae_config: Mapping[str, Any]) -> int:
    """Return how many pixels, along a side, one latent cell of the autoencoder stands for."""
    return int(2 ** (len(vae_config["encoder_block_out_channels"]) - 1))


def stride_of(tile: int, ratio: int) -> int:
    """Return the pixels from one tile to the next: an eighth overlaps, at least one latent cell.

    That is the library's own proportion (tiles of 512 px, 448 px apart).
    """
    return tile - max(ratio, tile // 8 // ratio * ratio)


def tile_sides(latent_size: int, tile: int, ratio: int) -> list[int]:
    """Return the sides, in latent cells, of the tiles along one side of the picture."""
    starts = range(0, latent_size, stride_of(tile, ratio) // ratio)
    return [min(tile // ratio, latent_size - start) for start in starts]


def check_tile(key: str, tile: int, latent_size: int, ratio: int) -> None:
    """Raise RecipeError unless a picture of so many cells a side can be decoded in such tiles."""
    side, cells = latent_size * ratio, tile // ratio
    if tile >= side:
        message = f"a picture has {side} px a side, no more than a tile of {tile}"
        fix = f"set {key} to null, for whole pictures, or to less than {side}"
    elif tile % ratio:
        message = f"{tile} px are not a multiple of the autoencoder's {ratio}"
        fix = f"set {key} to {max(2, cells) * ratio}"
    elif cells < 2:
        message = f"tiles overlap by a latent cell of {ratio} px, and {tile} px are no more"
        fix = f"set {key} to {2 * ratio} or more"
    else:
        return
    raise RecipeError(f"{key}: {message}.\n    Fix: {fix}.")
