"""The detector of the scene world against the objects that were really painted."""

from itertools import product

import numpy as np
import pytest
from PIL import Image
from scene_oracle import COLORS, PLURALS, asked, center, shown

from data.scenes import Scene, SceneObject, metadata, render_scene, sample_scene
from rewards.contract import Score
from rewards.detector import Detection
from rewards.geneval import geneval
from rewards.scene_detector import SceneDetector

PICTURES = 500
"""For each of the six tasks."""
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLASSES = tuple(PLURALS.values())
JITTERS = (-0.25, 0.0, 0.25)


def scenes(n: int, seed: int, task: str) -> list[Scene]:
    """Training and held-out scenes in turn."""
    rng = np.random.default_rng(seed)
    splits = ("train", "held_out")
    return [sample_scene(rng, {task: 1.0}, splits[i % 2]) for i in range(n)]


def strict(found: list[Score]) -> float:
    return float(np.mean([score.details["strict"] for score in found]))


@pytest.mark.parametrize("task", GENEVAL_TASKS)
def test_right_pictures_are_accepted(task: str) -> None:
    pictured = scenes(PICTURES, 11, task)
    images = [render_scene(scene) for scene in pictured]
    right = geneval(images, metadata=[metadata(scene) for scene in pictured])
    assert np.mean([score.details["extra"] for score in right]) <= 0.01
    assert strict(right) >= 0.99


@pytest.mark.parametrize("task", GENEVAL_TASKS)
def test_mismatched_pictures_are_not_accepted(task: str) -> None:
    """A prompt of another scene of the task, which the picture's true objects do not fulfil."""
    pictured = scenes(PICTURES, 11, task)
    others = np.random.default_rng(12).permutation(PICTURES)
    mismatched = [
        (render_scene(scene), metadata(pictured[other]))
        for scene, other in zip(pictured, others, strict=True)
        if asked(metadata(pictured[other])) not in shown(scene)
    ]
    assert len(mismatched) > 0.7 * PICTURES
    wrong = geneval([image for image, _ in mismatched], metadata=[m for _, m in mismatched])
    assert strict(wrong) <= 0.06


def test_every_shape_that_can_be_painted_passes_the_counting_threshold() -> None:
    low = []
    for label, color, x, y in product(CLASSES, COLORS, JITTERS, JITTERS):
        item = SceneObject(label, color, (3, 3), (x, y))
        (found,) = SceneDetector().detect([render_scene(Scene("colors", (item,)))])
        if [(d.label, d.score > 0.9) for d in found] != [(label, True)]:
            low.append(item)
    assert low == []


@pytest.mark.parametrize("task", GENEVAL_TASKS)
def test_every_object_is_found_with_its_class_color_and_place(task: str) -> None:
    detector = SceneDetector()
    exact = 0
    pictured = scenes(200, 21, task)
    for scene in pictured:
        image = render_scene(scene)
        (found,) = detector.detect([image])
        colors = detector.classify_colors(image, found)
        seen = sorted((d.label, c) for d, c in zip(found, colors, strict=True))
        exact += seen == sorted((item.label, item.color) for item in scene.objects)
        for detection in found:
            x0, y0, x1, y1 = detection.box_xyxy
            middle = ((x0 + x1) / 2, (y0 + y1) / 2)
            distances = [np.subtract(center(item), middle) for item in scene.objects]
            assert min(np.abs(distance).max() for distance in distances) <= 1.0
            assert 11 <= x1 - x0 <= 14
            assert 11 <= y1 - y0 <= 14
            assert detection.mask is not None
            rows, columns = np.where(detection.mask)
            assert detection.box_xyxy == (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )
    assert exact >= 0.99 * len(pictured)


def test_grey_pictures_and_signs_hold_no_objects() -> None:
    grey = Image.new("RGB", (48, 48), (226, 226, 220))
    sign = render_scene(Scene("text", word="CAB"))
    noise = np.random.default_rng(0).integers(200, 230, (48, 48, 1)).repeat(3, axis=2)
    rough = Image.fromarray(noise.astype(np.uint8))
    assert SceneDetector().detect([grey, sign, rough]) == [[], [], []]


def test_pixel_noise_does_not_hide_objects() -> None:
    rng = np.random.default_rng(4)
    pictured = [scene for task in GENEVAL_TASKS for scene in scenes(40, 31, task)]
    noisy = []
    for scene in pictured:
        pixels = np.asarray(render_scene(scene)) + rng.normal(0, 8, (48, 48, 3))
        noisy.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert strict(geneval(noisy, metadata=[metadata(scene) for scene in pictured])) >= 0.95


@pytest.mark.parametrize(("wide", "tall"), [(0, 0), (4, 4), (4, 8), (4, 10)])
def test_the_score_falls_with_the_overlap(wide: int, tall: int) -> None:
    """A square of 12 x 12 pixels with a notch cut into its upper edge."""
    image = render_scene(Scene("colors", (SceneObject("square", "blue", (3, 3)),)))
    pixels = np.asarray(image).copy()
    pixels[18 : 18 + tall, 24 - wide // 2 : 24 + wide // 2] = (226, 226, 220)
    ((found,),) = SceneDetector().detect([Image.fromarray(pixels)])
    assert found.label == "square"
    assert found.box_xyxy == (18, 18, 30, 30)
    overlap = 1 - wide * tall / 144
    assert found.score == pytest.approx(min((overlap - 0.4) / 0.4, 1.0), abs=1e-9)


def test_colors_are_those_of_the_picture_that_is_handed_in() -> None:
    detector = SceneDetector()
    red, green = (
        render_scene(Scene("colors", (SceneObject("square", color, (2, 4)),)))
        for color in ("red", "green")
    )
    (found,) = detector.detect([red])
    assert detector.classify_colors(red, found) == ["red"]
    assert detector.classify_colors(green, found) == ["green"]
    by_hand = Detection("square", 1.0, found[0].box_xyxy, found[0].mask)
    assert detector.classify_colors(red, [by_hand]) == ["red"]


def test_enlarged_pictures_and_other_modes_are_understood() -> None:
    scene = Scene("color_attr", (SceneObject("circle", "red", (1, 2)),
                                 SceneObject("cross", "blue", (4, 4))))  # fmt: skip
    image = render_scene(scene)
    for other in (image.resize((192, 192), Image.Resampling.NEAREST), image.convert("RGBA")):
        (found,) = SceneDetector().detect([other])
        colors = SceneDetector().classify_colors(other, found)
        seen = {(d.label, c) for d, c in zip(found, colors, strict=True)}
        assert seen == {("circle", "red"), ("cross", "blue")}


@pytest.mark.parametrize(("side", "scores"), [(3, []), (5, [0.0])])
def test_specks_are_dropped_and_small_shapes_score_nothing(side: int, scores: list[float]) -> None:
    pixels = np.full((48, 48, 3), (226, 226, 220), np.uint8)
    pixels[10 : 10 + side, 20 : 20 + side] = (214, 30, 36)
    (found,) = SceneDetector().detect([Image.fromarray(pixels)])
    assert [detection.score for detection in found] == scores
