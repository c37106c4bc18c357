"""Layout diversity against distances worked out by hand."""

import math

import numpy as np
import pytest

from evals.diversity import layout, layout_distance, prompt_diversity


def details(*objects: tuple[str, float, float]) -> dict:
    """Objects of 10 x 10 pixels with the given centres in a picture of 100 x 100."""
    return {
        "size": [100, 100],
        "objects": [
            {"label": label, "box": [x - 5, y - 5, x + 5, y + 5]} for label, x, y in objects
        ],
    }


def test_distance_of_one_object_in_picture_widths() -> None:
    value = prompt_diversity([details(("ring", 20, 20)), details(("ring", 50, 60))])
    assert value == pytest.approx(0.5)  # 30 and 40 pixels: 50 of 100


def test_equal_objects_are_matched_to_the_nearest_sum() -> None:
    first = details(("ring", 10, 10), ("ring", 90, 90))
    second = details(("ring", 90, 80), ("ring", 10, 20))
    assert prompt_diversity([first, second]) == pytest.approx(0.1)


def test_classes_are_not_mixed_and_extra_objects_left_out() -> None:
    first = details(("ring", 10, 10), ("cross", 90, 90))
    second = details(("ring", 10, 40), ("square", 90, 90), ("ring", 90, 90))
    assert prompt_diversity([first, second]) == pytest.approx(0.3)


def test_mean_over_all_pairs() -> None:
    pictures = [details(("ring", x, 50)) for x in (10, 20, 40)]
    assert prompt_diversity(pictures) == pytest.approx((0.1 + 0.3 + 0.2) / 3)


def test_nothing_to_compare_is_none() -> None:
    assert prompt_diversity([details(("ring", 1, 1))]) is None
    assert prompt_diversity([details(("ring", 9, 9)), details(("cross", 9, 9))]) is None
    assert prompt_diversity([{}, {"text": "CAB"}]) is None
    assert layout({}) is None


@pytest.mark.parametrize("far", [1e308, -1e308, 10**400])
def test_boxes_beyond_every_picture_are_left_out(far: float) -> None:
    odd = details(("ring", 20, 20))
    odd["objects"].append({"label": "ring", "box": [far, far, far, far]})
    value = prompt_diversity([odd, details(("ring", 50, 60), ("ring", 90, 90))])
    assert value == pytest.approx(0.5)


def test_independent_uniform_objects_are_half_a_picture_apart() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 100, size=(400, 2))
    pairs = zip(points[:200], points[200:], strict=True)
    layouts = [(layout(details(("ring", *a))), layout(details(("ring", *b)))) for a, b in pairs]
    distances = [layout_distance(a, b) for a, b in layouts if a is not None and b is not None]
    mean = np.mean([d for d in distances if d is not None])
    # mean distance of two uniform points in the unit square
    known = (2 + math.sqrt(2) + 5 * math.log(1 + math.sqrt(2))) / 15
    assert mean == pytest.approx(known, abs=0.05)
