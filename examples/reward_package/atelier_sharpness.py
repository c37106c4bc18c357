"""Sharpness: how much a picture changes from pixel to pixel, as a share of what counts as sharp."""

import numpy as np

from rewards import Score, reward


@reward(name="sharpness")
def sharpness(images, *, sharp=0.1):
    """Return the mean step in brightness between neighbours, divided by `sharp`, at most 1."""
    scores = []
    for image in images:
        grey = np.asarray(image.convert("L"), dtype=float) / 255
        step = (np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2
        scores.append(Score(min(step / sharp, 1.0), f"mean step {step:.3f}"))
    return scores
