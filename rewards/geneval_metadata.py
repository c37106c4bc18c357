"""GenEval's vocabulary, and the check that a prompt record can be scored by its rules.

Class names, colours and metadata keys are those of the official repository (djghosh13/geneval,
`evaluation/object_names.txt`, `evaluation/evaluate_images.py`, `prompts/create_prompts.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from common import scene_world
from common.errors import RewardError
from common.registry import nearest

RELATIONS = ("left of", "right of", "above", "below")
COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_OWN_VOCABULARY = {"scenes": (scene_world.CLASSES, tuple(scene_world.COLORS))}
"""Class and colour names of the detectors that do not use GenEval's."""


def vocabulary(
    detector: Any, detector_args: Mapping[str, Any] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the (class names, colour names) of a detector named as in a recipe.

    Detectors that look for any words take the classes they are given under `detector_args`.
    """
    own = _OWN_VOCABULARY.get(detector) if isinstance(detector, str) else None
    classes, colors = own or (CLASSES, COLORS)
    return tuple((detector_args or {}).get("classes", classes)), colors


def check_metadata(
    record: Mapping[str, Any],
    detector: str = "scenes",
    detector_args: Mapping[str, Any] | None = None,
) -> None:
    """Raise RewardError if GenEval's rules cannot score this prompt record with that detector.

    `record` has the keys prompt, metadata and perhaps prompt_id. The message names the record, the
    key and a fix. Checked: `tag`; `include` is there and not empty; known class, colour and
    relation; counts are positive integers; `position` points to an earlier clause.
    """
    metadata = record.get("metadata")
    where = f"prompt record `{record.get('prompt_id') or record.get('prompt') or metadata}`"
    if not isinstance(metadata, Mapping):
        raise RewardError(
            f"{where}: no metadata. Fix: give it a `metadata` object in GenEval's format, with "
            "`tag` and `include`."
        )
    check_clauses(metadata, where, *vocabulary(detector, detector_args))


def check_clauses(
    metadata: Mapping[str, Any],
    where: str,
    classes: tuple[str, ...] | None = None,
    colors: tuple[str, ...] | None = None,
) -> None:
    """Raise RewardError, its message beginning with `where`, unless the metadata is well formed.

    Without `classes` or `colors` any name goes.
    """
    if not isinstance(metadata.get("tag"), str):
        raise RewardError(
            f"{where}: metadata.tag is missing. Fix: name the task, as in `counting`."
        )
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        raise RewardError(
            f"{where}: metadata.include is missing or empty, so there is nothing to look for. "
            'Fix: list what the picture must show, as in [{"class": "circle", "count": 1}], or '
            f"leave prompts of task `{metadata['tag']}` out of this run."
        )
    exclude = metadata.get("exclude", [])
    if not isinstance(exclude, list):
        raise RewardError(f"{where}: metadata.exclude is not a list. Fix: make it one.")
    for key, clauses in (("include", include), ("exclude", exclude)):
        for index, clause in enumerate(clauses):
            place = f"{where}: metadata.{key}[{index}]"
            check_clause(clause, place, classes)
            if key == "include":
                check_color(clause, place, colors)
                _check_position(clause, place, index)


def check_clause(clause: Any, place: str, classes: Sequence[str] | None) -> None:
    """Raise RewardError unless `clause` is {"class": a known name, "count": 1 or more}."""
    if not isinstance(clause, Mapping):
        raise RewardError(f'{place} is not an object. Fix: write {{"class": ..., "count": ...}}.')
    label, count = clause.get("class"), clause.get("count")
    if not isinstance(label, str):
        raise RewardError(f"{place}.class is missing. Fix: name the class to look for.")
    if classes is not None and label not in classes:
        raise RewardError(f"{place}.class: {_unknown('class', label, classes)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RewardError(f"{place}.count is {count!r}. Fix: write an integer of 1 or more.")


def check_color(clause: Mapping[str, Any], place: str, colors: Sequence[str] | None) -> None:
    """Raise RewardError if the clause names a colour that is not known."""
    color = clause.get("color")
    if "color" not in clause:
        return
    if not isinstance(color, str) or (colors is not None and color not in colors):
        raise RewardError(f"{place}.color: {_unknown('color', str(color), colors or ())}")


def _check_position(clause: Mapping[str, Any], place: str, index: int) -> None:
    if "position" not in clause:
        return
    position = clause["position"]
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise RewardError(f'{place}.position is {position!r}. Fix: write ["left of", 0].')
    relation, target = position
    if relation not in RELATIONS:
        raise RewardError(f"{place}.position: {_unknown('relation', str(relation), RELATIONS)}")
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        raise RewardError(
            f"{place}.position points to clause {target!r}. Fix: give the index of a clause that "
            f"stands before this one (0 to {index - 1})."
            if index
            else f"{place}.position: the first clause has nothing before it to stand beside. Fix: "
            "put the clause of the reference object first."
        )


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    fix = f"Did you mean `{close}`?" if close else f"Fix: use one of {', '.join(known)}."
    return f"the {kind} `{name}` is unknown to this detector. {fix}"
