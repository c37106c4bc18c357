"""Did an edit do what was asked? The rules, apart from any detector.

An edit is described by the objects that must be new and those that must be gone:

    {"add": [{"class": "square", "count": 1, "color": "blue"}],
     "remove": [{"class": "circle", "count": 1, "color": "red"}]}

Replacing and recolouring are both. Counting what changed between two pictures, instead of what one
shows, means that a copy of the source earns nothing, however much of the result it had already.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import RewardError
from rewards.detector import Detection
from rewards.geneval_metadata import check_clause, check_color

Box = tuple[float, float, float, float]
Key = tuple[str, str | None]


@dataclass(frozen=True)
class EditResult:
    """How far what changed is what was asked to change.

    `success` is in [0, 1]: of all changes asked for or made, the share that was both. `boxes` are
    where the changes are that were both, in pixels.
    """

    success: float
    reason: str
    boxes: tuple[Box, ...]


def judge_edit(
    asked: Mapping[str, Any],
    before: Sequence[tuple[Detection, str | None]],
    after: Sequence[tuple[Detection, str | None]],
) -> EditResult:
    """Compare the objects, each with its colour, of the picture before and after the edit.

    Colours count only if some clause names one; pass None otherwise.
    """
    groups = {"add": _grouped(after), "remove": _grouped(before)}
    counts = {
        name: Counter({k: len(v) for k, v in group.items()}) for name, group in groups.items()
    }
    changed = {
        "add": counts["add"] - counts["remove"],
        "remove": counts["remove"] - counts["add"],
    }
    wanted = sum(clause["count"] for name in groups for clause in asked.get(name, []))
    made = sum(sum(counter.values()) for counter in changed.values())
    reasons: list[str] = []
    boxes: list[Box] = []
    both = 0
    for name, other in (("add", "remove"), ("remove", "add")):
        left = Counter(changed[name])
        for clause in sorted(asked.get(name, []), key=lambda c: "color" not in c):
            done = _take(left, clause)
            both += sum(done.values())
            for key, number in done.items():
                boxes += _least_like(groups[name][key], groups[other].get(key, []), number)
            if sum(done.values()) < clause["count"]:
                verb = "added" if name == "add" else "removed"
                what = " ".join(filter(None, [clause.get("color"), clause["class"]]))
                reasons.append(
                    f"expected {clause['count']} {what} {verb}, found {sum(done.values())}"
                )
        for (label, color), number in left.items():
            what = " ".join(filter(None, [color, label]))
            verb = "new" if name == "add" else "gone"
            reasons.append(f"{number} {what} {verb} that nobody asked for")
    return EditResult(both / (wanted + made - both), "\n".join(reasons), tuple(boxes))


def check_edit(
    record: Mapping[str, Any], classes: Sequence[str] | None, colors: Sequence[str] | None
) -> None:
    """Raise RewardError, naming the prompt record, unless its metadata describes an edit.

    Checked: `add` or `remove` is there, known class and colour, counts of 1 or more, and `region`,
    if given, is [left, top, right, bottom] in fractions of the picture.
    """
    metadata = record.get("metadata")
    where = f"prompt record `{record.get('prompt_id') or record.get('prompt') or metadata}`"
    if not isinstance(metadata, Mapping) or not (metadata.get("add") or metadata.get("remove")):
        raise RewardError(
            f"{where}: metadata says neither what to `add` nor what to `remove`. Fix: write, for "
            'example, {"add": [{"class": "circle", "count": 1}]}.'
        )
    for name in ("add", "remove"):
        clauses = metadata.get(name, [])
        if not isinstance(clauses, list):
            raise RewardError(f"{where}: metadata.{name} is not a list. Fix: make it one.")
        for index, clause in enumerate(clauses):
            place = f"{where}: metadata.{name}[{index}]"
            check_clause(clause, place, classes)
            check_color(clause, place, colors)
    if "region" in metadata and not _is_region(metadata["region"]):
        raise RewardError(
            f"{where}: metadata.region is {metadata['region']!r}. Fix: write [left, top, right, "
            "bottom] in fractions of the picture, each from 0 to 1."
        )


def _is_region(region: Any) -> bool:
    if not isinstance(region, list | tuple) or len(region) != 4:
        return False
    if not all(isinstance(edge, int | float) for edge in region):
        return False
    x0, y0, x1, y1 = region
    return bool(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1)


def _grouped(objects: Sequence[tuple[Detection, str | None]]) -> dict[Key, list[Detection]]:
    groups: dict[Key, list[Detection]] = {}
    for item, color in objects:
        groups.setdefault((item.label, color), []).append(item)
    return groups


def _take(left: Counter[Key], clause: Mapping[str, Any]) -> Counter[Key]:
    """Take from the changes `left` those that fulfil the clause, at most its count."""
    done: Counter[Key] = Counter()
    for key in list(left):
        fits = key[0] == clause["class"] and clause.get("color") in (None, key[1])
        number = min(left[key], clause["count"] - sum(done.values())) if fits else 0
        if number:
            done[key] += number
            left[key] -= number
            if not left[key]:
                del left[key]
    return done


def _least_like(
    objects: Sequence[Detection], others: Sequence[Detection], number: int
) -> list[Box]:
    """Return the boxes of the `number` objects that overlap least with any of the others."""
    return sorted(
        (item.box_xyxy for item in objects),
        key=lambda box: max((_overlap(box, other.box_xyxy) for other in others), default=0.0),
    )[:number]


def _overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return both / (areas - both)
