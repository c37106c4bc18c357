"""Shards: finding and indexing them, the order of samples, and every kind of bad input."""

import collections
import contextlib
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_folder import encoded, numbered, png, write_tar
from PIL import Image

from common.errors import DataError
from common.pictures import UnreadablePicture, decode_picture
from data.pictures import centre_square
from data.shards import Index, Shards, build_index, find_shards


def shards_of(paths: list[Path], seed: int = 0, **options) -> Shards:
    return Shards(build_index(paths, **options), 48, seed)


def number(sample) -> int:
    """Which of `numbered` a sample is, by its picture; its caption has to say the same."""
    red = int(sample.image[0, 0, 0])
    assert sample.caption == f"picture {red}"
    return red


# --- finding -----------------------------------------------------------------------------


def test_a_folder_a_glob_a_range_and_a_file_mean_shards(tmp_path):
    paths = [write_tar(tmp_path / f"s-{n:03d}.tar", numbered(1)) for n in range(3)]
    assert find_shards(str(tmp_path)) == paths
    assert find_shards(f"{tmp_path}/*.tar") == paths
    assert find_shards(f"{tmp_path}/s-{{000..002}}.tar") == paths
    assert find_shards(str(paths[1])) == [paths[1]]


@pytest.mark.parametrize("pattern", ["s-{000..004}.tar", "s-009.tar", "other-*.tar", "empty"])
def test_a_missing_shard_is_an_error_that_names_it(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    for n in range(4):
        write_tar(tmp_path / f"s-{n:03d}.tar", numbered(1))
    with pytest.raises(DataError, match=r"s-004|s-009|other-\*|empty") as caught:
        find_shards(f"{tmp_path}/{pattern}")
    assert "Fix:" in str(caught.value)


# --- the order ---------------------------------------------------------------------------


def test_an_epoch_has_every_sample_once_and_the_next_one_another_order(tmp_path):
    paths = [write_tar(tmp_path / f"{n}.tar", numbered(5, 5 * n)) for n in range(20)]
    shards = shards_of(paths)
    epochs = [[number(shards[p]) for p in range(e * 100, e * 100 + 100)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert [number(shards_of(paths)[p]) for p in (150, 3, 99)] == [
        epochs[1][50],
        epochs[0][3],
        epochs[0][99],
    ]
    assert [number(shards_of(paths, seed=1)[p]) for p in range(100)] != epochs[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=50).filter(any), st.integers(0, 2**40))
def test_every_place_of_an_epoch_is_another_row(counts, seed):
    numbers = np.repeat(np.arange(len(counts)), counts)
    rows = np.column_stack([numbers, np.ones((len(numbers), 6), np.int64)])
    shards = Shards(Index(tuple(Path(f"{n}") for n in range(len(counts))), rows), 48, seed)
    total = len(rows)
    assert sorted(shards.row(total + p) for p in range(total)) == list(range(total))


# --- what a sample is --------------------------------------------------------------------


def test_edits_have_a_reference(tmp_path):
    members = [
        ("dir/a.jpg", encoded(Image.new("RGB", (48, 48), (250, 0, 0)), "jpeg")),
        ("dir/a.txt", b"make it red\n"),
        ("dir/a.reference.png", png((0, 0, 250))),
    ]
    sample = shards_of([write_tar(tmp_path / "e.tar", members)], references=True)[0]
    assert sample.caption == "make it red"
    assert sample.image[20, 20, 0] > 240
    assert sample.reference is not None
    assert tuple(sample.reference[20, 20]) == (0, 0, 250)


def test_without_references_those_in_the_shards_are_left_alone(tmp_path):
    members = [*numbered(1), ("k0000.reference.png", b"no picture"), *numbered(1, 1)]
    shards = shards_of([write_tar(tmp_path / "e.tar", members)])
    for sample in (shards[0], shards[1]):
        assert sample.reference is None
        assert sample.skipped == ()


def test_a_sample_without_all_its_members_is_a_fault_with_its_key(tmp_path):
    members = [
        ("a.jpg", png()), ("a.txt", b"x"), ("b.jpg", png()), ("c.txt", b"x"), ("c.json", b"{}"),
        ("README", b"no sample"), ("d.png", png()), ("d.txt", b"y"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "s.tar", members)
    index = build_index([path])
    assert len(index.rows) == 2
    assert index.faults == ("s.tar: b: no caption", "s.tar: c: no picture")
    with pytest.raises(DataError, match=r"no shard has a whole sample[^$]*a: no reference"):
        build_index([path], references=True)


# --- shards that are damaged -------------------------------------------------------------


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "between samples", "no end mark"])
def test_a_shard_that_ends_early_is_reported_and_its_whole_samples_are_kept(tmp_path, cut):
    whole = write_tar(tmp_path / "whole.tar", numbered(10))
    with tarfile.open(whole) as tar:
        places = {m.name: m for m in tar}
    end = {
        "in a picture": places["k0007.png"].offset_data + 20,
        "in a header": places["k0007.png"].offset + 100,
        "between samples": places["k0007.png"].offset,
        "no end mark": places["k0009.txt"].offset_data + 512,
    }[cut]
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:end])
    index = build_index([tmp_path / "cut.tar"])
    assert len(index.rows) == (10 if cut == "no end mark" else 7)
    assert index.faults
    assert all("cut.tar: k000" in fault for fault in index.faults)
    assert any("ends early" in fault or "unexpected end" in fault for fault in index.faults)
    assert build_index([whole]).faults == ()


def test_a_shard_with_a_broken_header_or_none_is_reported(tmp_path):
    good = write_tar(tmp_path / "good.tar", numbered(10))
    data = bytearray(good.read_bytes())
    with tarfile.open(good) as tar:
        data[tar.getmember("k0004.png").offset + 148] ^= 1  # the checksum
    (tmp_path / "broken.tar").write_bytes(data)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    paths = [tmp_path / f"{name}.tar" for name in ("broken", "empty", "text", "good")]
    index = build_index(paths)
    assert len(index.rows) == 4 + 10
    for name in ("broken.tar: k0003: the shard ends early", "empty.tar: ", "text.tar: "):
        assert any(fault.startswith(name) for fault in index.faults), name
    assert not any("good" in fault for fault in index.faults)


# --- samples that are damaged ------------------------------------------------------------


BAD = {
    "cut off": (png()[:60], b"a"),
    "no picture": (b"GIF89a nonsense", b"a"),
    "empty file": (b"", b"a"),
    "empty caption": (png(), b" \n"),
    "caption not UTF-8": (png(), b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_sample_is_skipped_and_named(tmp_path, kind):
    image, text = BAD[kind]
    members = [*numbered(3), ("bad.png", image), ("bad.txt", text), *numbered(3, 3)]
    shards = shards_of([write_tar(tmp_path / "s.tar", members)])
    samples = [shards[p] for p in range(7)]
    [skipped] = [text for sample in samples for text in sample.skipped]
    assert skipped.startswith("s.tar: bad: ")
    assert len(skipped) > len("s.tar: bad: ")
    assert "0x" not in skipped
    # The next one takes its place; none is left out.
    counts = collections.Counter(number(s) for s in samples)
    assert set(counts) == set(range(6))
    assert shards[3 + 7 * 5] is not None


def test_nothing_but_bad_samples_is_an_error(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"x"), ("a.txt", b"x")])
    with pytest.raises(DataError, match=r"100 samples in a row.*s\.tar: a"):
        shards_of([path])[0]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.sampled_from(["png", "jpeg", "webp", "gif"]))
def test_damaged_bytes_are_a_picture_or_unreadable_and_nothing_else(seed, flips, kind):
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(Image.effect_mandelbrot((24, 18), (-3, -2.5, 2, 2.5), 40), kind))
    for _ in range(flips):
        data[rng.integers(len(data))] = rng.integers(256)
    with contextlib.suppress(UnreadablePicture):
        assert decode_picture(bytes(data)).mode == "RGB"


# --- pictures of every kind --------------------------------------------------------------


def test_a_grayscale_picture_is_gray_in_all_channels():
    picture = decode_picture(encoded(Image.new("L", (5, 4), 90)))
    assert picture.getpixel((2, 2)) == (90, 90, 90)


def test_a_16_bit_picture_is_scaled_not_clipped():
    wide = np.array([[0, 257 * 100], [65535, 257 * 200 + 100]], dtype=np.uint16)
    picture = decode_picture(encoded(Image.fromarray(wide)))
    assert [picture.getpixel((x, y))[0] for y in (0, 1) for x in (0, 1)] == [0, 100, 255, 200]


def test_a_cmyk_picture_keeps_its_colour():
    picture = decode_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg"))
    red, green, blue = picture.getpixel((4, 4))
    assert red > 230
    assert max(green, blue) < 40


def test_a_rotated_picture_stands_upright():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture is shown turned by 90 degrees
    picture = decode_picture(encoded(image, "png", exif=exif))
    assert picture.size == (20, 40)
    assert picture.getpixel((10, 2)) == (0, 0, 255)
    assert picture.getpixel((10, 37)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_transparent_picture_lies_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture = decode_picture(encoded(image.convert(mode) if mode != "P" else image.quantize()))
    assert picture.getpixel((1, 1)) == (255, 255, 255)


def test_a_huge_picture_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr("common.pictures.MOST_PIXELS", 100)
    with pytest.raises(UnreadablePicture, match="more than 0 million pixels"):
        decode_picture(png(size=(30, 30)))


@pytest.mark.parametrize("size", [(300, 100), (57, 48), (48, 49), (641, 427), (30, 40), (48, 48)])
def test_the_centre_square_is_that_of_the_published_preprocessing(size):
    """Spec section 1.3: Resize of the short side, then CenterCrop, by torchvision itself."""
    from torchvision.transforms import CenterCrop, Compose, Resize

    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    published = np.asarray(Compose([Resize(48), CenterCrop(48)])(image)).astype(int)
    assert np.abs(centre_square(image, 48).astype(int) - published).max() <= 1


def test_a_very_long_picture_is_not_resized_whole():
    assert centre_square(Image.new("RGB", (1, 60_000), "red"), 1024).shape == (1024, 1024, 3)


def test_samples_have_the_whole_picture_too_where_tokens_are_to_describe_it(tmp_path):
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    members = [("a.png", encoded(image)), ("a.txt", b"x"), ("a.reference.png", png((0, 0, 250)))]
    index = build_index([write_tar(tmp_path / "s.tar", members)], references=True)
    sample = Shards(index, 48, 0, squashed_side=30)[0]
    assert sample.squashed.shape == sample.squashed_reference.shape == (30, 30, 3)
    assert tuple(sample.squashed[15, 2]) == (255, 0, 0)
    assert tuple(sample.squashed[15, 15]) == (0, 0, 255)
    assert tuple(sample.image[20, 5]) == (0, 0, 255)
    plain = Shards(index, 48, 0)[0]
    assert plain.squashed is plain.squashed_reference is None


def test_shards_reach_a_spawned_process(tmp_path):
    shards = shards_of([write_tar(tmp_path / "s.tar", numbered(7))])
    assert number(shards[3]) == number(ForkingPickler.loads(ForkingPickler.dumps(shards))[3])


def test_the_middle_of_a_wide_picture_is_kept():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    pixels = centre_square(image, 48)
    assert pixels.shape == (48, 48, 3)
    assert (pixels[:, 2:-2] == (0, 0, 255)).all()
