"""Pictures as they come: any mode, depth and orientation to square RGB, or a reason why not."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

# What Pillow's decoders raise on bytes that are no picture, or only the beginning of one.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadablePicture(Exception):
    """Bytes that cannot be shown as a picture; the text says why."""


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


def read_picture(data: bytes) -> Image.Image:
    """Return the whole picture as RGB, upright.

    Grayscale, palette and CMYK pictures are converted, 16-bit ones scaled to 8 bits, transparent
    ones laid on white, and EXIF rotation is applied. Raises UnreadablePicture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        raise UnreadablePicture(str(error) or type(error).__name__) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert() would clip everything above 255 to white
        wide = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(wide.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadablePicture("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, side: int) -> np.ndarray:
    """Return uint8 [side, side, 3]: the short side resized to `side`, the middle cut out.

    Image tokens and latents are both made from this square, so that they describe the same picture
    (the published code squashed for the one and cropped for the other; spec section 1.3).
    """
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC))
