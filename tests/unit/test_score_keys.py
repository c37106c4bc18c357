"""What tells one score from another in the cache."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards.cache import image_digest, score_key
from rewards.plugins import load_reward
from rewards.source import source_code


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


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose reward imports a module that imports another; a stranger lies beside it."""
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "deep" / "__init__.py").write_text("")
    (folder / "deep" / "warm.py").write_text("from ..marks import MARK\nimport stranger\n")
    (folder / "marks.py").write_text("MARK = 1\n")
    (folder / "unused.py").write_text("")
    (folder / "good.py").write_text("import numpy\n\nfrom mine.deep import warm\n\n\n"
                                    "def good(images, prompts):\n    return [1.0]\n")  # fmt: skip
    (tmp_path / "stranger.py").write_text("")
    return folder


@pytest.mark.parametrize(
    ("changed", "noticed"),
    [
        ("good.py", True),
        ("deep/warm.py", True),
        ("marks.py", True),
        ("unused.py", False),
        ("../stranger.py", False),  # another package, such as an installed library
    ],
)
def test_a_change_in_what_a_reward_imports_is_noticed(
    package: Path, monkeypatch: pytest.MonkeyPatch, changed: str, noticed: bool
) -> None:
    monkeypatch.syspath_prepend(package.parent)
    good = importlib.import_module("mine.good").good
    for name in [name for name in sys.modules if name.split(".")[0] in ("mine", "stranger")]:
        del sys.modules[name]
    before = source_code(good)
    assert before == source_code(good)
    with (package / changed).open("a") as file:
        file.write("\n# another\n")
    assert (source_code(good) != before) is noticed


def test_a_file_alone_counts_the_same_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("import numpy\ndef good(): ...\n")
    first, second = (
        source_code(load_reward(f"{tmp_path / name / name}.py:good").function)
        for name in ("a", "b")
    )
    assert first == second == b"import numpy\ndef good(): ...\n"


def test_a_module_beside_a_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("import helper_of_mine\ndef good(): ...\n")
    (tmp_path / "helper_of_mine.py").write_text("X = 1\n")
    function = load_reward(f"{tmp_path}/mine.py:good").function
    before = source_code(function)
    (tmp_path / "helper_of_mine.py").write_text("X = 2\n")
    assert source_code(function) != before
