"""Samples of captioned pictures, and how a picture becomes the square that is learnt from."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Sample:
    """A picture with its caption; of an edit, the edited picture with instruction and reference."""

    image: np.ndarray
    """uint8 [side, side, 3]."""
    caption: str
    reference: np.ndarray | None = None
    """uint8 [side, side, 3]: the picture before the edit."""
    skipped: tuple[str, ...] = ()
    """Unreadable samples whose place this one takes: `shard: key: reason`."""
    squashed: np.ndarray | None = None
    """uint8 [other side, other side, 3]: all of the picture, for the switch `squashed_tokens`."""
    squashed_reference: np.ndarray | None = None


def centre_square(picture: Image.Image, side: int) -> np.ndarray:
    """Return uint8 [side, side, 3]: the short side resized to `side`, the middle cut out.

    Resized as the published code does it (torchvision's Resize and CenterCrop on a PIL picture;
    spec section 1.3): linearly, with a low-pass filter.
    """
    width, height = picture.size
    scale = side / min(width, height)
    wide, high = max(side, int(width * scale)), max(side, int(height * scale))
    left, top = round((wide - side) / 2), round((high - side) / 2)
    box = (left, top, left + side, top + side)
    # Of the original's pixels, so that a very long picture is never resized whole.
    x, y = width / wide, height / high
    box_there = (box[0] * x, box[1] * y, min(width, box[2] * x), min(height, box[3] * y))
    resized = picture.resize((side, side), Image.Resampling.BILINEAR, box=box_there)
    return np.asarray(resized)


def squashed(picture: Image.Image, side: int) -> np.ndarray:
    """Return uint8 [side, side, 3]: the whole picture, whatever its shape was."""
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
