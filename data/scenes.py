"""The scene world: procedural pictures with GenEval metadata, and signs with short words.

Six tasks follow GenEval's prompt templates (`prompts/create_prompts.py` of the official
repository); the seventh, `text`, asks for a sign. Train and held-out prompts are split by
combination; `data.scene_split` says which pictures training never shows.
"""

from collections.abc import Mapping
from itertools import permutations

import numpy as np

from common.scene_world import (
    CLASSES,
    COLORS,
    IMAGE_SIZE,
    LATTICE,
    LETTERS,
    MAX_LETTERS,
    NUMBER_WORDS,
    RELATIONS,
)
from common.seeds import counter_seed
from data.scene_captions import caption, geneval_metadata, metadata, misdescribe, text_metadata
from data.scene_content import TASKS, Record, Scene, SceneObject, relations
from data.scene_painting import paint, render_scene
from data.scene_split import is_held_out, metadata_held_out

__all__ = [
    "TASKS",
    "Scene",
    "SceneObject",
    "caption",
    "geneval_metadata",
    "is_held_out",
    "metadata",
    "metadata_held_out",
    "misdescribe",
    "paint",
    "relations",
    "render_scene",
    "sample_scene",
    "scene_prompts",
    "text_metadata",
]

_JITTERS = (-0.25, 0.0, 0.25)
_CENTERS = range(1, IMAGE_SIZE // LATTICE)


# --- drawing scenes at random ----------------------------------------------------------------


def sample_scene(rng: np.random.Generator, tasks: Mapping[str, float], split: str) -> Scene:
    """Draw a scene of a task chosen by weight, by rejection until it belongs to `split`.

    `split` is "train" or "held_out". Single-object pictures of every class are in both splits
    (a class alone cannot be held out); only their colour is split.
    """
    names = list(tasks)
    weights = np.array([tasks[name] for name in names], dtype=float)
    task = str(rng.choice(names, p=weights / weights.sum()))
    while True:
        scene = _any_scene(rng, task)
        if is_held_out(scene) == (split == "held_out"):
            return scene


def _any_scene(rng: np.random.Generator, task: str) -> Scene:
    if task == "text":
        length = int(rng.integers(1, MAX_LETTERS + 1))
        word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))
        return Scene(task, word=word)
    if task in ("single_object", "colors"):
        return Scene(task, _place(rng, [_label(rng)]))
    if task == "counting":
        label, color = _label(rng), _color(rng)
        return Scene(task, _place(rng, [label] * int(rng.integers(2, 5)), [color] * 4))
    first, second = (str(label) for label in rng.choice(CLASSES, size=2, replace=False))
    colors = [str(color) for color in rng.choice(list(COLORS), size=2, replace=False)]
    while True:
        objects = _place(rng, [first, second], colors)
        shown = relations(*objects)
        if task != "position":
            return Scene(task, objects)
        if len(shown) == 1:  # captions state a relation only where it is unambiguous
            return Scene(task, objects, shown[0])


def _label(rng: np.random.Generator) -> str:
    return str(rng.choice(CLASSES))


def _color(rng: np.random.Generator) -> str:
    return str(rng.choice(list(COLORS)))


def _place(
    rng: np.random.Generator, labels: list[str], colors: list[str] | None = None
) -> tuple[SceneObject, ...]:
    """Put objects on free lattice cells whose blocks do not overlap."""
    taken: list[tuple[int, int]] = []
    while len(taken) < len(labels):
        cell = (int(rng.choice(_CENTERS)), int(rng.choice(_CENTERS)))
        if all(max(abs(cell[0] - x), abs(cell[1] - y)) >= 2 for x, y in taken):
            taken.append(cell)
        elif len(taken) > 2 and rng.random() < 0.1:
            taken.clear()
    return tuple(
        SceneObject(
            label,
            colors[i] if colors else _color(rng),
            taken[i],
            (float(rng.choice(_JITTERS)), float(rng.choice(_JITTERS))),
        )
        for i, label in enumerate(labels)
    )


# --- prompt lists ------------------------------------------------------------------------------


def scene_prompts(
    split: str, tasks: tuple[str, ...] = TASKS, n: int | None = None, seed: int = 0
) -> list[Record]:
    """Return prompt records (`prompt`, `prompt_id`, `metadata`) of a split.

    `split` is "train", "tune" (training combinations under other seeds, for choosing settings
    without touching held-out prompts) or "held_out". With `n` given, tasks take turns until
    `n` prompts are chosen; without it, every distinct prompt is returned, at most
    40 for the tasks that have more.
    """
    lists = {task: _task_prompts(split, task, seed) for task in tasks}
    chosen: list[Record] = []
    if n is None:
        chosen = [record for task in tasks for record in lists[task][:40]]
    else:
        for turn in range(max(map(len, lists.values()))):
            chosen += [lists[task][turn] for task in tasks if turn < len(lists[task])]
        chosen = chosen[:n]
    return chosen


def _task_prompts(split: str, task: str, seed: int) -> list[Record]:
    """All distinct prompts of a task in a split, in a seeded order."""
    held_out = split == "held_out"
    records = [m for m in _all_metadata(task, seed) if metadata_held_out(m) == held_out]
    if task == "single_object":
        records = _all_metadata(task, seed)
    rng = np.random.default_rng(counter_seed(seed, f"prompts/{split}", task))
    rng.shuffle(records)
    return [
        {"prompt": m["prompt"], "prompt_id": str(m["prompt"]).replace(" ", "-"), "metadata": m}
        for m in records
    ]


def _all_metadata(task: str, seed: int) -> list[Record]:
    if task == "single_object":
        return [geneval_metadata(task, [label]) for label in CLASSES]
    if task == "colors":
        return [geneval_metadata(task, [label], [c]) for label in CLASSES for c in COLORS]
    if task == "counting":
        return [geneval_metadata(task, [x], count=n) for x in CLASSES for n in NUMBER_WORDS]
    pairs = list(permutations(CLASSES, 2))
    if task == "two_object":
        return [geneval_metadata(task, list(pair)) for pair in pairs]
    if task == "position":
        return [geneval_metadata(task, list(p), relation=r) for p in pairs for r in RELATIONS]
    if task == "color_attr":
        colors = list(permutations(COLORS, 2))
        return [geneval_metadata(task, list(p), list(c)) for p in pairs for c in colors]
    rng = np.random.default_rng(counter_seed(seed, "words"))
    words = {_any_scene(rng, "text").word for _ in range(600)}
    return [text_metadata(str(word)) for word in sorted(map(str, words))]
