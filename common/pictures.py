"""Read a picture as it was meant to be seen, or say what is wrong with it.

Lenient, for the user's own files, such as training data. `common.images` is strict, for pictures
of anybody, also over a network, whose odd kinds are refused.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import DataError

MOST_PIXELS = 2**27
"""A larger picture is refused: it is a mistake or an attack on the memory."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
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
)


class UnreadablePicture(Exception):
    """Bytes that cannot be shown as a picture; the text says why."""


def read_picture(file: Path) -> Image.Image:
    """Return a picture file as `decode_picture` does; DataError names the file and the reason."""
    if not file.is_file():
        raise DataError(f"there is no picture {file}.\n    Fix: check the path.")
    try:
        return decode_picture(file.read_bytes())
    except UnreadablePicture as error:
        raise DataError(
            f"{file} cannot be read as a picture: {error}.\n    Fix: copy or export it again."
        ) from error


def decode_picture(data: bytes) -> Image.Image:
    """Return the whole picture as 8-bit RGB, turned upright by its EXIF orientation.

    Grayscale becomes gray RGB, CMYK and palettes are converted, 16 bits are scaled to 8, alpha is
    laid over white and the first frame of an animation is taken. Raises `UnreadablePicture` for
    what is truncated, no picture, of 32-bit pixels or over `MOST_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
        with opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            opened.load()
            return _eight_bit_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError:
        millions = MOST_PIXELS // 10**6
        raise UnreadablePicture(f"it has more than {millions} million pixels") from None
    except UnidentifiedImageError as error:  # its own text tells an address in memory
        raise UnreadablePicture("it is of no picture format that is known") from error
    except _BROKEN as error:
        raise UnreadablePicture(str(error) or type(error).__name__) from error


def _eight_bit_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _SIXTEEN_BIT:
        # Pillow's own conversion would cut every value above 255 to white.
        values = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(values.round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UnreadablePicture(f"it has 32-bit pixels ({picture.mode}), whose range is unknown")
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, over)
    return picture.convert("RGB")
