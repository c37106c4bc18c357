"""Opening pictures that somebody else made: what is accepted, and a typed refusal of the rest."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 64 * 2**20
MAX_SIDE = 16_384
MAX_PIXELS = 2**26
MAX_RATIO = 100
"""Networks scale the shorter side up: a picture of 16,384 x 1 pixels would take gigabytes."""
_MODES = {"1", "L", "P", "RGB", "LA", "PA", "RGBA"}
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for a damaged file; SyntaxError is its word for a broken PNG chunk."""


def open_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Return the picture in a file, or in its bytes, as upright RGB.

    Transparent pixels are laid over white, as viewers show them. `name` stands in messages. Raises
    DataError for what is empty, over 64 MiB, damaged, cut off, animated, wider or higher than
    16,384 pixels, over 2^26 pixels in all, over 100 times as long as wide, in a colour space other
    than grey, palette and RGB, or no PNG, JPEG or WebP.
    """
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    try:
        data = _read(source) if isinstance(source, Path) else source
        if not data:
            raise _refused(name, "it is empty (0 bytes)")
        if len(data) > MAX_BYTES:
            raise _refused(name, f"it has more than {MAX_BYTES // 2**20} MiB")
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise _refused(name, f"it is not a whole {', '.join(FORMATS)} file") from None
    except _UNREADABLE as error:
        why = getattr(error, "strerror", None) or error  # without the path, which stands before it
        raise _refused(name, f"it cannot be read: {why}") from None
    problem = refusal(image)
    if problem is not None:
        raise _refused(name, problem)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def refusal(image: Any) -> str | None:
    """Return why this is no picture that a reward can look at, or None. Reads its pixels.

    The size is looked at before anything is decompressed. The error of `open_image` may stand for
    a picture, and is then the reason.
    """
    if isinstance(image, DataError):
        return str(image)
    if not isinstance(image, Image.Image):
        return f"it is a {type(image).__name__}, not a PIL image"
    width, height = image.size
    if min(width, height) == 0:
        return "it has no pixels"
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        return f"it is {width} x {height} pixels; {MAX_SIDE} a side and {MAX_PIXELS} are allowed"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"it is {width} x {height} pixels: over {MAX_RATIO} times as long as wide"
    if image.mode not in _MODES:
        return f"its colour mode is {image.mode}; convert it to RGB"
    try:
        if getattr(image, "n_frames", 1) > 1:
            return f"it is animated ({getattr(image, 'n_frames', 1)} frames)"
        image.load()
    except _UNREADABLE as error:
        return f"the image cannot be read: {error}"
    return None


def _read(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _refused(name: str, problem: str) -> DataError:
    return DataError(
        f"{name}: {problem}.\n    Fix: replace it by a still RGB picture, or leave it out."
    )
