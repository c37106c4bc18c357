"""A reward in one file: pictures whose reds outweigh their blues by the wanted amount score 1."""

import numpy as np

from rewards import reward


@reward(name="warmth")
def warmth(images, prompts, *, target=0.5):
    """Return 1 - |warmth - target| for each picture; warmth is mean red - mean blue, in [-1, 1]."""
    scores = []
    for image in images:
        red, _, blue = np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1)) / 255
        scores.append(1 - abs(red - blue - target))
    return scores
