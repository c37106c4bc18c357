"""The scene world: captions, the split, misdescriptions, layout, signs."""

import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scene_oracle import COLORS, NUMBERS, Fact, asked, official_relations, shown, stated

from common.scene_world import COLORS as RGB
from data.scenes import (
    TASKS,
    Scene,
    SceneObject,
    caption,
    is_held_out,
    metadata,
    misdescribe,
    paint,
    relations,
    render_scene,
    sample_scene,
    scene_prompts,
)
from rewards.ocr import ocr

ALL = 10**6
COMBINATIONS = tuple(task for task in TASKS if task != "single_object")


def scenes(n: int, seed: int, split: str, tasks: tuple[str, ...] = TASKS) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, dict.fromkeys(tasks, 1.0), split) for _ in range(n)]


def prompts(split: str, task: str, seed: int = 0) -> list[dict[str, Any]]:
    return scene_prompts(split, (task,), n=ALL, seed=seed)


@pytest.fixture(scope="module")
def training() -> list[Scene]:
    return scenes(10_000, seed=0, split="train")


@pytest.fixture(scope="module")
def mixed() -> list[Scene]:
    """Two hundred pictures of each task, half of them held out."""
    return [
        scene
        for i, task in enumerate(TASKS)
        for split in ("train", "held_out")
        for scene in scenes(100, 100 + i, split, (task,))
    ]


# --- captions and metadata ----------------------------------------------------------------------


def pair(*words: str) -> tuple[SceneObject, ...]:
    """Objects from "red circle" and so on, each left of the next."""
    cells = [(1, 3), (3, 3), (5, 3)]
    named = [text.split() for text in words]
    return tuple(SceneObject(x, c, cell) for (c, x), cell in zip(named, cells, strict=False))


@pytest.mark.parametrize(
    ("scene", "record"),
    [
        (
            Scene("single_object", pair("orange ring")),
            {
                "tag": "single_object",
                "include": [{"class": "ring", "count": 1}],
                "prompt": "a photo of a ring",
            },
        ),
        (
            Scene("colors", pair("orange ring")),
            {
                "tag": "colors",
                "include": [{"class": "ring", "count": 1, "color": "orange"}],
                "prompt": "a photo of an orange ring",
            },
        ),
        (
            Scene("counting", pair("red cross", "red cross", "red cross")),
            {
                "tag": "counting",
                "include": [{"class": "cross", "count": 3}],
                "exclude": [{"class": "cross", "count": 4}],
                "prompt": "a photo of three crosses",
            },
        ),
        (
            Scene("two_object", pair("red circle", "blue square")),
            {
                "tag": "two_object",
                "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
                "prompt": "a photo of a circle and a square",
            },
        ),
        (
            Scene("position", pair("red circle", "blue square"), "left of"),
            {
                "tag": "position",
                "include": [
                    {"class": "square", "count": 1},
                    {"class": "circle", "count": 1, "position": ["left of", 0]},
                ],
                "prompt": "a photo of a circle left of a square",
            },
        ),
        (
            Scene("color_attr", pair("red circle", "orange square")),
            {
                "tag": "color_attr",
                "include": [
                    {"class": "circle", "count": 1, "color": "red"},
                    {"class": "square", "count": 1, "color": "orange"},
                ],
                "prompt": "a photo of a red circle and an orange square",
            },
        ),
        (
            Scene("text", word="CAB"),
            {"tag": "text", "text": "CAB", "prompt": 'a photo of a sign that says "CAB"'},
        ),
    ],
    ids=lambda value: value.task if isinstance(value, Scene) else "",
)
def test_metadata_has_the_official_form(scene: Scene, record: dict[str, object]) -> None:
    assert metadata(scene) == record
    assert caption(scene) == record["prompt"]


def test_captions_state_what_the_picture_contains(mixed: list[Scene]) -> None:
    for scene in mixed:
        slots = stated(caption(scene))
        if scene.word is not None:
            assert slots == {f"letter{i}": x for i, x in enumerate(scene.word)}
            continue
        expected = {f"class{i}": item.label for i, item in enumerate(scene.objects)}
        if scene.task in ("colors", "color_attr"):
            expected |= {f"color{i}": item.color for i, item in enumerate(scene.objects)}
        if scene.task == "counting":
            number = {n: word for word, n in NUMBERS.items()}[len(scene.objects)]
            expected = {"class0": scene.objects[0].label, "number": number}
        if scene.task == "position":
            assert scene.relation is not None
            expected["relation"] = scene.relation
        assert slots == expected


def test_the_picture_fulfils_its_own_metadata_by_the_official_rules(mixed: list[Scene]) -> None:
    for scene in mixed:
        assert asked(metadata(scene)) in shown(scene)


def test_every_prompt_of_every_list_follows_a_template() -> None:
    for split in ("train", "tune", "held_out"):
        for task in TASKS:
            for record in prompts(split, task):
                stated(str(record["prompt"]))
                assert record["metadata"]["tag"] == task
                assert record["metadata"]["prompt"] == record["prompt"]


def test_relations_leave_out_none_that_the_official_rule_accepts() -> None:
    middle = SceneObject("square", "red", (3, 3))
    for x in range(1, 6):
        for y in range(1, 6):
            if max(abs(x - 3), abs(y - 3)) < 2:
                continue
            for jitter in (-0.25, 0.0, 0.25):
                other = SceneObject("circle", "red", (x, y), (jitter, -jitter))
                assert set(relations(other, middle)) >= official_relations(other, middle) != set()


# --- the split ------------------------------------------------------------------------------------


def held_out_facts(tasks: tuple[str, ...]) -> set[Fact]:
    return {
        asked(record["metadata"])
        for task in tasks
        for seed in (0, 1)
        for record in prompts("held_out", task, seed)
    }


def leaks(pictures: list[Scene], tasks: tuple[str, ...]) -> list[tuple[str, Fact]]:
    held_out = held_out_facts(tasks)
    return [(scene.task, fact) for scene in pictures for fact in shown(scene) & held_out]


def test_no_training_picture_shows_a_held_out_combination(training: list[Scene]) -> None:
    assert {scene.task for scene in training} == set(TASKS)
    assert leaks(training, ("two_object", "counting", "position", "color_attr", "text")) == []
    alone = [scene for scene in training if len(scene.objects) == 1]
    assert leaks(alone, ("colors",)) == []


def test_the_leak_check_sees_a_held_out_picture_among_training_ones(training: list[Scene]) -> None:
    for task in COMBINATIONS:
        strangers = scenes(400, 5, "held_out", (task,))
        assert leaks(training[:100] + strangers, (task,)) != [], task


def test_training_shows_every_class_color_and_relation(training: list[Scene]) -> None:
    facts = {fact for scene in training for fact in shown(scene)}
    assert {fact[1] for fact in facts if fact[0] == "single_object"} == set(
        ("circle", "square", "triangle", "cross", "ring", "diamond")
    )
    assert {fact[2] for fact in facts if fact[0] == "colors"} == set(COLORS)
    assert {fact[2] for fact in facts if fact[0] == "position"} == {
        "left of",
        "right of",
        "above",
        "below",
    }
    assert {fact[2] for fact in facts if fact[0] == "counting"} == {1, 2, 3, 4}


@pytest.mark.parametrize("task", COMBINATIONS)
def test_held_out_prompts_state_nothing_that_training_prompts_state(task: str) -> None:
    """Also in other words: "a circle above a ring" is "a ring below a circle"."""
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def facts(split: str) -> set[Fact]:
        found = {asked(r["metadata"]) for seed in (0, 1) for r in prompts(split, task, seed)}
        if task == "position":
            found |= {(kind, b, turned[rule], a) for kind, a, rule, b in found}
        return found

    assert facts("held_out")
    assert facts("train")
    assert facts("tune")
    assert not facts("held_out") & (facts("train") | facts("tune"))


def test_single_object_prompts_are_the_same_in_every_split() -> None:
    lists = [{r["prompt"] for r in prompts(s, "single_object")} for s in ("train", "held_out")]
    assert lists[0] == lists[1]
    assert len(lists[0]) == 6


def test_held_out_pictures_are_those_that_training_rejects(mixed: list[Scene]) -> None:
    assert [is_held_out(scene) for scene in mixed] == ([False] * 100 + [True] * 100) * len(TASKS)


def test_prompt_lists_take_turns_and_stop_at_n() -> None:
    records = scene_prompts("held_out", n=20)
    tags = [record["metadata"]["tag"] for record in records]
    assert tags[:14] == list(TASKS) * 2
    assert len(records) == len({record["prompt_id"] for record in records}) == 20
    sizes = [len(scene_prompts("train", (task,))) for task in TASKS]
    assert max(sizes) == 40


# --- wrong captions -------------------------------------------------------------------------------


def test_misdescribe_changes_exactly_one_stated_fact(mixed: list[Scene]) -> None:
    rng = np.random.default_rng(3)
    changed = defaultdict(set)
    for scene in mixed:
        for _ in range(3):
            wrong = misdescribe(scene, rng)
            right, other = stated(caption(scene)), stated(caption(wrong))
            assert right.keys() == other.keys()
            slots = [slot for slot in right if right[slot] != other[slot]]
            assert len(slots) == 1, (caption(scene), caption(wrong))
            changed[scene.task] |= set(slots)
            assert asked(metadata(wrong)) not in shown(scene)
    assert changed == {
        "single_object": {"class0"},
        "two_object": {"class0", "class1"},
        "counting": {"class0", "number"},
        "colors": {"class0", "color0"},
        "position": {"class0", "class1", "relation"},
        "color_attr": {"class0", "class1", "color0", "color1"},
        "text": {"letter0", "letter1", "letter2", "letter3"},
    }


# --- pictures -------------------------------------------------------------------------------------


def test_objects_stay_inside_and_their_blocks_do_not_overlap(training: list[Scene]) -> None:
    for scene in training:
        assert len(scene.objects) in ((0,) if scene.word else (1, 2, 3, 4))
        corners = [(8 * o.cell[0] - 8, 8 * o.cell[1] - 8) for o in scene.objects]
        for i, (x, y) in enumerate(corners):
            assert 0 <= x <= 32
            assert 0 <= y <= 32
            for other_x, other_y in corners[:i]:
                assert abs(x - other_x) >= 16 or abs(y - other_y) >= 16


def test_paint_is_in_the_object_blocks_and_in_the_object_colors(mixed: list[Scene]) -> None:
    for scene in mixed:
        picture = paint(scene)
        assert picture.shape == (48, 48, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(np.asarray(render_scene(scene)), picture)
        left = (picture != (226, 226, 220)).any(-1)
        if scene.word:
            assert not left[:16].any()
            assert not left[32:].any()
            continue
        for item in scene.objects:
            x, y = 8 * item.cell[0] - 8, 8 * item.cell[1] - 8
            block = picture[y : y + 16, x : x + 16]
            assert (block == RGB[item.color]).all(-1).sum() >= 30, item
            left[y : y + 16, x : x + 16] = False
        assert not left.any()


def fingerprint(seed: int) -> str:
    digest = hashlib.sha256()
    for scene in scenes(100, seed, "train") + scenes(100, seed, "held_out"):
        digest.update(caption(scene).encode() + paint(scene).tobytes())
    for split in ("train", "tune", "held_out"):
        digest.update(repr(scene_prompts(split, seed=seed)).encode())
    return digest.hexdigest()


def test_a_seed_gives_the_same_scenes_in_every_process() -> None:
    def elsewhere() -> Iterator[str]:
        code = "from test_scenes import fingerprint; print(fingerprint(1))"
        for hash_seed in ("1", "2"):
            environment = os.environ | {
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            yield subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()

    assert set(elsewhere()) == {fingerprint(1)}
    assert fingerprint(1) != fingerprint(2)


def test_signs_can_be_read() -> None:
    signs = [scene for split in ("train", "held_out") for scene in scenes(30, 8, split, ("text",))]
    assert {len(str(scene.word)) for scene in signs} == {1, 2, 3, 4}
    read = ocr(
        [render_scene(scene) for scene in signs],
        [caption(scene) for scene in signs],
        box=(0.0, 1 / 3, 1.0, 2 / 3),
        contains=False,
    )
    texts = [score.details["text"] for score in read]
    right = [text == scene.word for text, scene in zip(texts, signs, strict=True)]
    assert np.mean(right) >= 0.97
