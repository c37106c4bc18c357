"""Between pictures, pixel tensors and latents."""

import copy

import numpy as np
import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.pictures import centre_square
from policy.config import PolicyConfig
from policy.tiling import check_tile, stride_of


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Return PIL pictures of pixels [B, 3, H, W] in [0, 1]."""
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def to_pixels(picture: Image.Image) -> Tensor:
    """Return pixels float32 [3, H, W] in [-1, 1] of an RGB picture."""
    array = np.array(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def reference_pixels(picture: Image.Image, config: PolicyConfig) -> Tensor:
    """Return pixels [1, 3, H, W] of a picture to edit, the square that training sees.

    For a policy with the switch `squashed_tokens` it stays whole: its tokens describe all of it.
    """
    if "squashed_tokens" not in config.compatibility:
        picture = Image.fromarray(centre_square(picture, config.image_size))
    return to_pixels(picture)[None]


def square(pixels: Tensor, side: int, crop: bool = True) -> Tensor:
    """Return pixels [B, 3, side, side]: the centre square, or with `crop` off all of it squashed.

    Resized as the published preprocessing does it, linearly and with a low-pass filter.
    """
    height, width = pixels.shape[-2:]
    if crop and height != width:
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        pixels = pixels[..., top : top + edge, left : left + edge]
    if pixels.shape[-2:] == (side, side):
        return pixels
    size = (side, side)
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)


def decode_latents(vae: AutoencoderDC, latents: Tensor, tile: int | None = None) -> Tensor:
    """Return pixels [B, 3, H, W] in [0, 1] of scaled latents [B, C, S, S].

    `tile` (pixels, `policy.tiling`): decode in tiles of this side, for less memory; None: whole.
    """
    latents = latents.contiguous(memory_format=torch.channels_last)  # faster convolutions
    if tile is not None:
        ratio = vae.spatial_compression_ratio
        check_tile("tile", tile, latents.shape[-1], ratio)
        stride = stride_of(tile, ratio)
        vae = copy.copy(vae)  # the same weights; other threads and calls decode as they did
        vae.enable_tiling(tile, tile, stride, stride)
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
