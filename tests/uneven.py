"""A reward that tells pictures apart in the first process of a run alone."""

import os

import numpy as np

from rewards import reward


@reward(name="uneven")
def uneven(images, prompts):
    """Return the mean brightness in process 0, 0.5 in the others."""
    if os.environ["RANK"] != "0":
        return [0.5] * len(images)
    return [float(np.asarray(image).mean()) / 255 for image in images]
