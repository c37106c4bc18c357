"""Layout diversity: does a policy still place things differently from picture to picture?"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from evals.located import found_in, picture_size

Layout = dict[str, np.ndarray]


def layout(details: Mapping[str, Any]) -> Layout | None:
    """Return the object centres of one picture by class, [n, 2] in fractions of its width.

    None where the scorer located nothing or does not locate objects.
    """
    size, found = picture_size(details), found_in(details)
    if size is None or not found:
        return None
    centres: dict[str, list[tuple[float, float]]] = {}
    for item, (left, top, right, bottom) in found:
        centres.setdefault(str(item.get("label")), []).append(
            ((left + right) / 2 / size[0], (top + bottom) / 2 / size[0])
        )
    return {label: np.array(points) for label, points in centres.items()}


def layout_distance(first: Layout, second: Layout) -> float | None:
    """Return how far apart two pictures place the same objects, in fractions of the width.

    Objects of one class are matched one to one so that the sum of distances is smallest (objects
    that only one picture has are left out); the result is the mean distance of all matched
    pairs. None if the pictures share no class.
    """
    distances: list[float] = []
    for label in first.keys() & second.keys():
        table = np.linalg.norm(first[label][:, None] - second[label][None], axis=-1)
        rows, columns = linear_sum_assignment(table)
        distances += table[rows, columns].tolist()
    return float(np.mean(distances)) if distances else None


def prompt_diversity(details_of_pictures: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean `layout_distance` over all pairs of pictures of one prompt.

    0 means that every picture has the same layout; objects placed independently and uniformly in
    a square would be 0.52 apart. Pairs without a common class are left out; None if no
    pair is left.
    """
    layouts = [found for details in details_of_pictures if (found := layout(details)) is not None]
    distances = [layout_distance(first, second) for first, second in combinations(layouts, 2)]
    known = [distance for distance in distances if distance is not None]
    return float(np.mean(known)) if known else None
