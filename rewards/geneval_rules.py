"""GenEval's rules, apart from any detector: what was asked, what was found, is it right?

Source: the official `evaluation/evaluate_images.py` (djghosh13/geneval) for what is correct, and
the GenEval reward server used by flow_grpo for the soft score.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import RewardError
from rewards.detector import Detection

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_MARGIN = 0.1
DIRECTION = 0.5
_NO_OFFSET = 1e-3

ClassifyColors = Callable[[Sequence[Detection]], list[str]]


@dataclass(frozen=True)
class GenEvalResult:
    """Verdict on one picture: correct or not, why not ("" if correct), and the soft score.

    `soft` is at most 1 and falls below 0 when there are more than twice as many objects as asked.
    """

    correct: bool
    reason: str
    soft: float


def evaluate_detections(
    metadata: Mapping[str, Any],
    detections: Sequence[Detection],
    classify_colors: ClassifyColors,
) -> GenEvalResult:
    """Judge the raw detections of one picture, of any score and in any order.

    `classify_colors` gets the detections a colour is asked of and returns one name for each. It is
    called only where the rules need a colour.

    `correct`: every `include` clause holds for the `count` most confident detections of its class
    and no `exclude` clause does. `soft`: the mean over the clauses' parts, which are
    1 - |asked - found| / asked for the number, the same for the colour, and 1 or 0 for the
    position; colour and position are 0 when the number is wrong.
    """
    objects = keep_detections(metadata, detections)
    colors = _ColorMemo(classify_colors)
    _, soft = _evaluate_soft(metadata, objects, colors, quirk=False)
    reasons = _official_failures(metadata, objects, colors)
    return GenEvalResult(not reasons, "\n".join(reasons), soft)


def evaluate_like_flow_grpo(
    metadata: Mapping[str, Any],
    detections: Sequence[Detection],
    classify_colors: ClassifyColors,
) -> GenEvalResult:
    """Judge as `evaluate_detections` does, but return the numbers of flow_grpo's reward server.

    `correct` is its strict score (exactly `count` objects, `exclude` not looked at). In `soft` a
    wrong position counts as a 0 and a 1, which raises the mean.
    """
    objects = keep_detections(metadata, detections)
    reasons, soft = _evaluate_soft(metadata, objects, _ColorMemo(classify_colors), quirk=True)
    return GenEvalResult(not reasons, "\n".join(reasons), soft)


def keep_detections(
    metadata: Mapping[str, Any], detections: Sequence[Detection]
) -> dict[str, list[Detection]]:
    """Return the detections that count, by class, best first.

    Kept are scores above 0.3 (above 0.9 for the task "counting"), at most 16 of a class. Of equal
    scores the later detection comes first, as in the official script.
    """
    threshold = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        if detection.score > threshold:
            by_class.setdefault(detection.label, []).append(detection)
    return {
        label: [found[i] for i in np.argsort([d.score for d in found], kind="stable")[::-1]][
            :MAX_OBJECTS
        ]
        for label, found in by_class.items()
    }


def extra_objects(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> int:
    """Return how many kept detections go beyond what `include` asks for, over all classes."""
    asked = Counter[str]()
    for clause in metadata["include"]:
        asked[clause["class"]] += clause["count"]
    kept = keep_detections(metadata, detections)
    return sum(max(0, len(found) - asked[label]) for label, found in kept.items())


def relative_position(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """Return the relations in which `box` stands to `target` (x0, y0, x1, y1; y grows downward).

    A tenth of the summed widths (heights) is taken off the distance of the centres; what is left,
    divided by the whole distance, must exceed 0.5 along an axis.
    """
    a, b = np.asarray(box, float).reshape(2, 2), np.asarray(target, float).reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    left_over = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0)
    if np.all(np.abs(left_over) < _NO_OFFSET):
        return set()
    dx, dy = left_over / np.linalg.norm(offset)
    holds = {
        "left of": dx < -DIRECTION,
        "right of": dx > DIRECTION,
        "above": dy < -DIRECTION,
        "below": dy > DIRECTION,
    }
    return {relation for relation, true in holds.items() if true}


class _ColorMemo:
    """Asks for the colours of the same detections once only: a classifier may be a large model."""

    def __init__(self, classify: ClassifyColors) -> None:
        self._classify = classify
        self._known: dict[tuple[int, ...], list[str]] = {}

    def __call__(self, detections: Sequence[Detection]) -> list[str]:
        key = tuple(id(detection) for detection in detections)
        if key not in self._known:
            colors = list(self._classify(detections))
            if len(colors) != len(detections):
                raise RewardError(
                    f"classify_colors returned {len(colors)} colours for {len(detections)} "
                    "detections. Fix: return one for each."
                )
            self._known[key] = colors
        return self._known[key]


def _official_failures(
    metadata: Mapping[str, Any], objects: Mapping[str, list[Detection]], colors: ClassifyColors
) -> list[str]:
    """Return one reason for each clause that fails (official `evaluate`)."""
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        label, count = clause["class"], clause["count"]
        found = objects.get(label, [])[:count]
        failure: str | None = None
        if len(found) < count:
            failure = f"expected at least {count} {label}, found {len(found)}"
        elif "color" in clause and (got := colors(found)).count(clause["color"]) < count:
            failure = _color_failure(clause, got)
        elif "position" in clause:
            failure = _position_failure(clause, found, groups)
        if failure is not None:
            reasons.append(failure)
        groups.append(found if failure is None else None)
    for clause in metadata.get("exclude", []):
        found = objects.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reasons.append(
                f"expected fewer than {clause['count']} {clause['class']}, found {len(found)}"
            )
    return reasons


def _evaluate_soft(
    metadata: Mapping[str, Any],
    objects: Mapping[str, list[Detection]],
    colors: ClassifyColors,
    quirk: bool,
) -> tuple[list[str], float]:
    """Return why the server's strict score is 0 (nothing if it is 1), and the soft score."""
    parts: list[float] = []
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        label, count = clause["class"], clause["count"]
        found = objects.get(label, [])
        failure: str | None = None
        parts.append(1 - abs(count - len(found)) / count)
        if len(found) != count:
            failure = f"expected exactly {count} {label}, found {len(found)}"
            if "color" in clause or "position" in clause:
                parts.append(0.0)
        else:
            if "color" in clause:
                got = colors(found)
                parts.append(1 - abs(count - got.count(clause["color"])) / count)
                if got.count(clause["color"]) != count:
                    failure = _color_failure(clause, got)
            if "position" in clause and failure is None:
                failure = _position_failure(clause, found, groups)
                target_found = groups[clause["position"][1]] is not None
                parts.append(0.0 if failure else 1.0)
                if quirk and failure and target_found:
                    parts.append(1.0)
        if failure is not None:
            reasons.append(failure)
        groups.append(found if failure is None else None)
    return reasons, sum(parts) / len(parts)


def _color_failure(clause: Mapping[str, Any], got: Sequence[str]) -> str:
    seen = ", ".join(f"{n} {color}" for color, n in sorted(Counter(got).items()))
    return f"expected {clause['count']} {clause['color']} {clause['class']}, found {seen}"


def _position_failure(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[list[Detection] | None],
) -> str | None:
    """Every pair of an object and a target must stand in the relation asked for."""
    relation, target_index = clause["position"]
    targets = groups[target_index]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    for item in found:
        for target in targets:
            true = relative_position(item.box_xyxy, target.box_xyxy)
            if relation not in true:
                seen = " and ".join(sorted(true)) or "in no clear relation to"
                return f"expected {clause['class']} {relation} {target.label}, found it {seen} it"
    return None
