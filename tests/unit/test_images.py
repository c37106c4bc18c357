"""Pictures from elsewhere: what is opened, and what is refused with a reason."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from common.images import open_image, refusal


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


NOISE = Image.effect_noise((40, 30), 80).convert("RGB")


def huge_png(width, height):
    """A PNG by its specification whose header claims a size; its data are a few bytes."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def animated():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


BAD = {
    "0 bytes": (b"", "0 bytes"),
    "text": (b"hello", "not a whole"),
    "truncated PNG": (encoded(NOISE)[:-900], "cannot be read"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:-300], "cannot be read"),
    "truncated WebP": (encoded(NOISE, "WEBP", lossless=True)[:-900], "whole|cannot be read"),
    "header alone": (encoded(NOISE)[:20], "whole|cannot be read"),
    "65,535 px wide": (huge_png(65_535, 2), "65535 x 2"),
    "a line": (encoded(Image.new("RGB", (1, 101))), "1 x 101"),
    "bomb": (huge_png(12_000, 12_000), "12000 x 12000"),
    "a larger bomb": (huge_png(60_000, 60_000), "cannot be read"),
    "CMYK": (encoded(NOISE.convert("CMYK"), "JPEG"), "CMYK"),
    "16 bits": (encoded(Image.new("I;16", (4, 4))), "I;16"),
    "animated": (animated(), "animated"),
    "GIF": (encoded(NOISE, "GIF"), "not a whole"),
}


@pytest.mark.parametrize(("data", "word"), BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_refused_by_name(data, word, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(data)
    with pytest.raises(DataError, match=f"picture.png: (?s:.*)({word})"):
        open_image(file)
    with pytest.raises(DataError, match="upload 3"):
        open_image(data, "upload 3")


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
def test_good_pictures_come_as_rgb(form, mode):
    image = NOISE.convert(mode)
    opened = open_image(encoded(image, form, **({"lossless": True} if form == "WEBP" else {})))
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


def test_transparent_pixels_are_white_and_a_turned_picture_is_upright():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    assert np.asarray(open_image(encoded(clear))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the top of the picture is its right side
    turned = open_image(encoded(NOISE, "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(NOISE), -1))


def test_what_is_no_picture_is_refused():
    assert "str" in refusal("a.png")
    assert "no pixels" in refusal(Image.new("RGB", (0, 4)))
    assert "CMYK" in refusal(NOISE.convert("CMYK"))
    assert refusal(NOISE) is None


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png"):
        open_image(tmp_path / "gone.png")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_end_in_a_picture_or_a_data_error(data):
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    picture = bytearray(encoded(NOISE, form))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(picture) - 1))
        picture[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert open_image(bytes(picture)).mode == "RGB"
