"""Read a picture file as it was meant to be seen, or say what is wrong with it."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.errors import DataError

MOST_PIXELS = 2**27
"""A larger picture is refused: it is a mistake or an attack on the memory."""
LARGEST_SIDE = 4096
"""A picture whose shorter side is longer is reduced by a whole factor."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def read_picture(file: Path) -> Image.Image:
    """Return a picture file as 8-bit RGB, turned upright by its EXIF orientation.

    Grayscale becomes gray RGB, CMYK and palettes are converted, 16 bits are scaled to 8, alpha is
    laid over white and the first frame of an animation is taken. Raises `DataError` naming the
    file for one that is missing, truncated, no picture, of 32-bit pixels or over `MOST_PIXELS`.
    """
    if not file.is_file():
        raise DataError(f"there is no picture {file}.\n    Fix: check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file)
        with opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            opened.load()
            picture = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError:
        raise DataError(
            f"{file} has more than {MOST_PIXELS // 10**6} million pixels.\n"
            "    Fix: make it smaller first."
        ) from None
    except _BROKEN as error:
        raise DataError(
            f"{file} cannot be read as a picture ({error}).\n    Fix: copy or export it again."
        ) from error
    picture = _eight_bit_rgb(picture, file)
    factor = min(picture.size) // LARGEST_SIDE
    return picture.reduce(factor) if factor > 1 else picture


def _eight_bit_rgb(picture: Image.Image, file: Path) -> Image.Image:
    if picture.mode in _SIXTEEN_BIT:
        # Pillow's own conversion would cut every value above 255 to white.
        values = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(values.round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise DataError(
            f"{file} has 32-bit pixels ({picture.mode}), whose range is unknown.\n"
            "    Fix: save it with 8 or 16 bits."
        )
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, over)
    return picture.convert("RGB")
