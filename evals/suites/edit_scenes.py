"""Editing in the scene world: held-out edits of painted pictures, judged by exact rules."""

from collections.abc import Mapping, Sequence
from math import hypot
from typing import Any

from PIL import Image

from common.scene_world import IMAGE_SIZE, LATTICE
from data.scene_edits import edit_records, scene_of
from data.scenes import SceneObject, render_scene
from evals.suites.suite import Metric, Record, SampleScore, Suite
from rewards.consistency import consistency

REACH = LATTICE / 2
"""How far, in pixels, the centre of an object that was to stay may be from where it was."""


def edit_scenes() -> Suite:
    """Build the suite: "make the circle red", "remove the square", "add a green ring".

    References show training combinations, the pictures asked for held-out ones
    (`data.scene_split`). Headline `exact`: the picture shows the objects asked for and no others,
    each in its colour, and what was there before is still in its place (1 or 0). `success` and
    `kept` are the two parts of the reward `consistency`.
    """
    return Suite(
        name="edit-scenes",
        title="Editing in the scene world",
        version=1,
        records=tuple(edit_records("held_out")),
        score=_score,
        metrics={
            "exact": Metric("Edits exactly as asked"),
            "success": Metric("Share of changes that are right", "amount"),
            "kept": Metric("The rest left alone", "amount"),
        },
        not_comparable="edits of the scene world are no published benchmark",
        settings={"detector": "scenes"},
        reference=reference,
    )


def reference(record: Record) -> Image.Image:
    """Return the picture to edit."""
    return render_scene(scene_of(record["before"]))


def _score(image: Image.Image, record: Record) -> SampleScore:
    [judged] = consistency([image], [reference(record)], [record["metadata"]], measures=("pixels",))
    if judged.value is None:
        return SampleScore(dict.fromkeys(("exact", "success", "kept")), judged.reason)
    stays = set(scene_of(record["before"]).objects)
    wrong = misplaced(judged.details["objects"], scene_of(record["after"]).objects, stays)
    values = {
        "exact": float(not wrong),
        "success": judged.details["success"],
        "kept": judged.details["kept"],
    }
    return SampleScore(values, "\n".join(wrong) or "the edit is as asked", judged.details)


def misplaced(
    found: Sequence[Mapping[str, Any]], wanted: Sequence[SceneObject], stays: set[SceneObject]
) -> list[str]:
    """Return what is wrong with the objects found; empty if they are the ones wanted.

    `found` has label, color and box in pixels of the reference. An object of a class that was
    there before, whatever its colour, has to be where it was; a new one may be anywhere.
    """
    places = {item.label: centre(item) for item in stays}
    left = [(item["label"], item["color"], item["box"]) for item in found]
    wrong = []
    for item in wanted:
        name = f"{item.color} {item.label}"
        same = [entry for entry in left if entry[:2] == (item.label, item.color)]
        if not same:
            wrong.append(f"no {name}")
            continue
        left.remove(same[0])
        x0, y0, x1, y1 = same[0][2]
        x, y = places.get(item.label, ((x0 + x1) / 2, (y0 + y1) / 2))
        moved = hypot((x0 + x1) / 2 - x, (y0 + y1) / 2 - y)
        if moved > REACH:
            wrong.append(f"the {name} moved by {moved:.0f} of {IMAGE_SIZE} pixels")
    return wrong + [f"one {color} {label} that nobody asked for" for label, color, _ in left]


def centre(item: SceneObject) -> tuple[float, float]:
    """Return where the middle of an object is, in pixels."""
    return (
        LATTICE * item.cell[0] + item.jitter[0],
        LATTICE * item.cell[1] + item.jitter[1],
    )
