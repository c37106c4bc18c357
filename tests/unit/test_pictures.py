"""Reference pictures as people have them: each kind has one outcome."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.pictures import read_picture


def halves(left=(200, 40, 30), right=(20, 60, 220), size=(40, 20)) -> Image.Image:
    """A picture whose left and right halves differ."""
    picture = Image.new("RGB", size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def pixel(picture: Image.Image, x: float, y: float) -> tuple[int, ...]:
    return picture.getpixel((int(x * picture.width), int(y * picture.height)))


def near(found, expected, within: int = 6) -> bool:
    return all(abs(a - b) <= within for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_ordinary_pictures_are_read(suffix, tmp_path):
    halves().save(tmp_path / f"a.{suffix}", quality=95)
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert (picture.mode, picture.size) == ("RGB", (40, 20))
    assert near(pixel(picture, 0.1, 0.5), (200, 40, 30), 12)


def test_cmyk_becomes_rgb(tmp_path):
    halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert near(pixel(read_picture(tmp_path / "a.jpg"), 0.9, 0.5), (20, 60, 220), 12)


def test_grayscale_becomes_gray(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "a.png")
    assert pixel(read_picture(tmp_path / "a.png"), 0.5, 0.5) == (77, 77, 77)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_cut(suffix, tmp_path):
    gray = np.full((8, 8), 77 * 257, dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / f"gray.{suffix}"), gray)
    assert pixel(read_picture(tmp_path / f"gray.{suffix}"), 0.5, 0.5) == (77, 77, 77)


def test_sixteen_bit_colours_are_scaled(tmp_path):
    blue_green_red = np.full((8, 8, 3), (20 * 257, 60 * 257, 220 * 257), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), blue_green_red)
    assert near(pixel(read_picture(tmp_path / "a.png"), 0.5, 0.5), (220, 60, 20), 1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bit_pixels_are_refused(mode, tmp_path):
    Image.new(mode, (8, 8), 77).save(tmp_path / "a.tiff")
    with pytest.raises(
        DataError, match=r"a\.tiff cannot be read as a picture: it has 32-bit pixels"
    ):
        read_picture(tmp_path / "a.tiff")


@pytest.mark.parametrize(
    ("orientation", "left_is_at"),
    [(1, (0.1, 0.5)), (3, (0.9, 0.5)), (6, (0.5, 0.1)), (8, (0.5, 0.9))],
)
def test_a_rotated_picture_stands_upright(orientation, left_is_at, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves().save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.size == ((40, 20) if orientation < 5 else (20, 40))
    assert near(pixel(picture, *left_is_at), (200, 40, 30), 12)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode, tmp_path):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture.convert(mode).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png")
    assert (pixel(found, 0.1, 0.5), pixel(found, 0.9, 0.5)) == ((0, 0, 0), (255, 255, 255))


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(read_picture(tmp_path / "a.gif"), 0.5, 0.5) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_a_truncated_picture_is_refused(suffix, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, format={"jpg": "jpeg"}.get(suffix, suffix))
    file = tmp_path / f"a.{suffix}"
    for length in (0, 10, len(data.getvalue()) // 2):
        file.write_bytes(data.getvalue()[:length])
        with pytest.raises(DataError, match=rf"a\.{suffix} cannot be read as a picture"):
            read_picture(file)


def test_text_and_nothing_are_refused(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(DataError, match="cannot be read as a picture"):
        read_picture(tmp_path / "a.png")
    for place in (tmp_path / "b.png", tmp_path):
        with pytest.raises(DataError, match="there is no picture"):
            read_picture(place)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_gigantic_picture_is_refused(side, tmp_path):
    Image.new("1", (side, side)).save(tmp_path / "a.png", compress_level=1)
    with pytest.raises(DataError, match="more than 134 million pixels"):
        read_picture(tmp_path / "a.png")
