"""What tells one score from another in the cache."""

import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import RewardError
from rewards.cache import image_digest, score_key
from rewards.plugins import load_reward
from rewards.source import source_code

GOOD = "def good(images): return [1.0] * len(images)\n"


def test_pictures_are_told_by_their_colours_not_by_palette_places():
    pictures = []
    for color in ((255, 0, 0), (0, 0, 255)):
        picture = Image.new("P", (4, 4), 0)
        picture.putpalette(color)
        pictures.append(picture)
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert image_digest(pictures[0]) != image_digest(pictures[1])
    assert image_digest(pictures[0]) == image_digest(pictures[0].copy())


def key(value) -> str:
    return score_key("reward", "picture", "prompt", {"column": value})


def test_arrays_are_told_by_every_value():
    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1
    assert repr(long) == repr(other)  # elided
    assert key(long) != key(other)
    assert key(long) == key(long.copy())
    assert key(np.zeros(3)) != key(np.zeros(3, dtype=np.float32))


def test_pictures_in_columns_are_told_by_what_they_show():
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    assert key(red) != key(blue)
    assert key(red) == key(red.copy())


def test_what_cannot_be_told_is_never_the_same():
    nameless = lambda: None  # noqa: E731
    assert key(nameless) != key(nameless)


@pytest.mark.parametrize(
    ("changed", "noticed"),
    [
        ("good.py", True),
        ("beside.py", True),
        ("new.py", True),
        ("notes.txt", False),
        ("below/deep.py", False),
        ("../stranger.py", False),
    ],
)
def test_a_change_in_the_folder_of_a_reward_is_noticed(
    tmp_path: Path, changed: str, noticed: bool
) -> None:
    folder = tmp_path / "mine"
    (folder / "below").mkdir(parents=True)
    (folder / "good.py").write_text(GOOD)
    (folder / "beside.py").write_text("X = 1\n")
    function = load_reward(f"{folder}/good.py:good").function
    before = source_code(function)
    assert before == source_code(function)
    with (folder / changed).open("a") as file:
        file.write("\n# another\n")
    assert (source_code(function) != before) is noticed


def test_a_file_alone_counts_the_same_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(GOOD)
    first, second = (
        source_code(load_reward(f"{tmp_path / name / name}.py:good").function)
        for name in ("a", "b")
    )
    assert first == second == GOOD.encode()


def test_a_linked_file_belongs_to_the_folder_of_the_link(tmp_path: Path) -> None:
    for name in ("store", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / "good.py").write_text(GOOD)
    (tmp_path / "mine" / "good.py").symlink_to(tmp_path / "store" / "good.py")
    function = load_reward(f"{tmp_path}/mine/good.py:good").function
    before = source_code(function)
    (tmp_path / "store" / "other.py").write_text("")
    assert source_code(function) == before
    (tmp_path / "mine" / "other.py").write_text("")
    assert source_code(function) != before


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_file_beside_a_reward_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    function = load_reward(f"{tmp_path}/good.py:good").function
    (tmp_path / os.fsdecode(b"\xff.py")).write_text("")
    assert source_code(function) == GOOD.encode() + b"\0\xff.py\0"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_a_file_beside_a_reward_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    function = load_reward(f"{tmp_path}/good.py:good").function
    (tmp_path / "locked.py").symlink_to("/proc/self/mem")  # not even root reads its first page
    with pytest.raises(RewardError, match=r"locked\.py cannot be read"):
        source_code(function)


def test_a_single_module_of_site_packages_counts_alone() -> None:
    import typing_extensions

    file = Path(typing_extensions.__file__)
    if str(file.parent) != sysconfig.get_path("purelib"):
        pytest.skip("typing_extensions is not installed as a single file in site-packages")
    assert source_code(typing_extensions.IntVar) == file.read_bytes()
