"""What a picture of the scene world contains: its task, its objects, what its caption states."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.scene_world import LATTICE, OBJECT_HALF_EXTENT

TASKS = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
    "text",
)
Record = dict[str, Any]


@dataclass(frozen=True)
class SceneObject:
    """One object: its class, colour, lattice cell (column, row in 1..5) and jitter in pixels."""

    label: str
    color: str
    cell: tuple[int, int]
    jitter: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A picture's content together with the combination its caption states."""

    task: str
    objects: tuple[SceneObject, ...] = ()
    relation: str | None = None
    word: str | None = None


def relations(first: SceneObject, second: SceneObject) -> list[str]:
    """Return the relations from `first` to `second`: one on an axis, two near a diagonal.

    All that GenEval's position rule accepts are among them. Its margin, a tenth of the summed
    sizes, is taken off each offset; each component of what remains, divided by *its own* length,
    must exceed 0.5. The official script divides by the length of the full offset, which accepts
    less: of two objects three and two cells apart it sees one relation where this sees two.
    """
    margin = 0.1 * 4 * OBJECT_HALF_EXTENT
    offset = np.subtract(first.cell, second.cell) * float(LATTICE)
    offset = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    dx, dy = offset / np.hypot(*offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return [relation for relation, true in holds.items() if true]
