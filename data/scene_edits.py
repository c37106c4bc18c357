"""Edits of the scene world: a scene, an instruction, and the scene that it asks for."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from common.scene_world import CLASSES, COLORS, IMAGE_SIZE, LATTICE
from common.seeds import counter_seed
from data.pictures import Sample
from data.scenes import Scene, SceneObject, is_held_out, paint, sample_scene

EDITS = ("recolor", "remove", "add")


@dataclass(frozen=True)
class SceneEdit:
    """`after` is `before` with one object changed as `instruction` says."""

    before: Scene
    instruction: str
    after: Scene

    @property
    def kind(self) -> str:
        """One of `EDITS`."""
        words = {"make": "recolor", "remove": "remove", "add": "add"}
        return words[self.instruction.split()[0]]


class SceneEdits:
    """Endless training edits; the one at a position depends on the seed and the position alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, position: int) -> Sample:
        """Return the edited picture, the instruction and the reference."""
        rng = np.random.default_rng(counter_seed(self.seed, "edits", position))
        edit = sample_edit(rng, "train")
        return Sample(paint(edit.after), edit.instruction, paint(edit.before))


def sample_edit(rng: np.random.Generator, split: str) -> SceneEdit:
    """Draw an edit: "make the circle red", "remove the square" or "add a green ring".

    `split` is "train" (neither picture shows a held-out combination) or "held_out" (the edited one
    does, its reference does not).
    """
    kind = str(rng.choice(EDITS))
    task = {"recolor": rng.choice(["colors", "two_object"]), "remove": "two_object"}
    while True:
        before = sample_scene(rng, {str(task.get(kind, "colors")): 1.0}, "train")
        instruction, after = _apply(rng, kind, before)
        if is_held_out(after) == (split == "held_out"):
            return SceneEdit(before, instruction, after)


def edit_records(split: str, each: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Return `each` prompt records of every kind of edit, no two alike; the kinds take turns.

    Beside `prompt`, `prompt_id`, `cluster` (records of one instruction) and `metadata` (tag, and
    `add` and `remove` as `rewards.edit_rules` reads them), a record has `before` and `after`: the
    objects of both pictures.
    """
    rng = np.random.default_rng(counter_seed(seed, "edit records", split))
    found: dict[str, dict[SceneEdit, None]] = {kind: {} for kind in EDITS}
    while min(map(len, found.values())) < each:
        edit = sample_edit(rng, split)
        if len(found[edit.kind]) < each:
            found[edit.kind][edit] = None
    turns = zip(*found.values(), strict=True)
    return [_record(edit, number) for number, turn in enumerate(turns) for edit in turn]


def scene_of(objects: list[dict[str, Any]]) -> Scene:
    """Return the scene of a record's `before` or `after`."""
    return Scene(
        "edit",
        tuple(
            SceneObject(o["label"], o["color"], tuple(o["cell"]), tuple(o["jitter"]))
            for o in objects
        ),
    )


def _record(edit: SceneEdit, number: int) -> dict[str, Any]:
    before, after = set(edit.before.objects), set(edit.after.objects)
    changes = {"add": after - before, "remove": before - after}
    asked = {
        name: [{"class": o.label, "count": 1, "color": o.color} for o in objects]
        for name, objects in changes.items()
        if objects
    }
    return {
        "prompt": edit.instruction,
        "prompt_id": f"{edit.kind}-{number:03d}",
        "cluster": edit.instruction,
        "metadata": {"tag": edit.kind, **asked},
        "before": [asdict(o) for o in edit.before.objects],
        "after": [asdict(o) for o in edit.after.objects],
    }


def _apply(rng: np.random.Generator, kind: str, scene: Scene) -> tuple[str, Scene]:
    objects = list(scene.objects)
    chosen = int(rng.integers(len(objects)))
    victim = objects[chosen]
    if kind == "remove":
        del objects[chosen]
        return f"remove the {victim.label}", Scene("colors", tuple(objects))
    if kind == "recolor":
        color = str(rng.choice([c for c in COLORS if c != victim.color]))
        objects[chosen] = replace(victim, color=color)
        return f"make the {victim.label} {color}", replace(scene, objects=tuple(objects))
    label = str(rng.choice([x for x in CLASSES if x != victim.label]))
    color = str(rng.choice(list(COLORS)))
    added = SceneObject(label, color, _free_cell(rng, victim.cell))
    article = "an" if color[0] in "aeiou" else "a"
    return f"add {article} {color} {label}", Scene("two_object", (victim, added))


def _free_cell(rng: np.random.Generator, taken: tuple[int, int]) -> tuple[int, int]:
    """Return a lattice cell whose block does not overlap the one at `taken`."""
    cells = range(1, IMAGE_SIZE // LATTICE)
    free = [(x, y) for x in cells for y in cells if max(abs(x - taken[0]), abs(y - taken[1])) >= 2]
    return free[int(rng.integers(len(free)))]
