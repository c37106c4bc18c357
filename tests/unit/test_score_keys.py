"""What tells one score from another in the cache."""

import numpy as np
from PIL import Image

from rewards.cache import image_digest, score_key


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
