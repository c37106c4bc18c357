"""Facts of the scene world that its painter (`data.scene_painting`) and its detector share.

The world is 48 x 48 pixels. Objects sit on a lattice of 8 pixels, one object covers a block of
16 x 16 pixels, and signs are plaques of 48 x 16 pixels in the middle of the picture.
"""

import numpy as np

IMAGE_SIZE = 48
LATTICE = 8
BLOCK = 16
BACKGROUND = (226, 226, 220)
CLASSES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLORS = {
    "red": (214, 30, 36),
    "orange": (245, 138, 20),
    "yellow": (240, 214, 30),
    "green": (28, 148, 62),
    "blue": (30, 84, 214),
    "purple": (138, 44, 170),
}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

PLAQUE = (250, 250, 250)
INK = (24, 24, 28)
PLAQUE_ROWS = (16, 32)
"""First and one-past-last pixel row of a sign's plaque; it spans the full width."""
LETTERS = "ABCDEFHJKLMNPRSTUVXYZ"
"""Letters without pairs that are ambiguous at eight pixels (I, O, Q, G and W are left out)."""
MAX_LETTERS = 4

OBJECT_HALF_EXTENT = 6.5
_OVERSAMPLE = 4


def shape_coverage(label: str, center_x: float, center_y: float, size: int) -> np.ndarray:
    """Return how much of each pixel of a `size` x `size` block the shape covers, in [0, 1].

    The centre is in pixels from the block's corner; shapes have a half-extent of
    `OBJECT_HALF_EXTENT` pixels. Coverage is averaged over 4 x 4 sub-pixels.
    """
    steps = (np.arange(size * _OVERSAMPLE) + 0.5) / _OVERSAMPLE
    x = (steps[None, :] - center_x) / OBJECT_HALF_EXTENT
    y = (steps[:, None] - center_y) / OBJECT_HALF_EXTENT
    radius = np.hypot(x, y)
    box = np.maximum(np.abs(x), np.abs(y))
    inside = {
        "circle": lambda: radius <= 1,
        "square": lambda: box <= 0.95,
        "triangle": lambda: (y <= 1) & (y >= -1) & (np.abs(x) <= (y + 1) / 2),
        "cross": lambda: (box <= 1) & (np.minimum(np.abs(x), np.abs(y)) <= 0.34),
        "ring": lambda: (radius <= 1) & (radius >= 0.55),
        "diamond": lambda: np.abs(x) + np.abs(y) <= 1,
    }[label]()
    cells = inside.reshape(size, _OVERSAMPLE, size, _OVERSAMPLE)
    return cells.mean(axis=(1, 3))
