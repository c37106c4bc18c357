"""What a scene truly shows and what a prompt states, worked out apart from the code under test.

Facts are tuples that begin with their kind. GenEval's rules decide (`evaluate_images.py` of the
official repository): number, colour, and the official position rule on the objects' true boxes.
"""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import permutations
from typing import Any

from data.scenes import Scene, SceneObject

Fact = tuple[Any, ...]

PLURALS = {
    "circles": "circle",
    "squares": "square",
    "triangles": "triangle",
    "crosses": "cross",
    "rings": "ring",
    "diamonds": "diamond",
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
NUMBERS = {"two": 2, "three": 3, "four": 4}

_COLOR = rf"(?:(?P<color{{0}}>{'|'.join(COLORS)}) )?"
_ARTICLE = "(?:an (?=[aeiou])|a (?![aeiou]))"
_NOUN = _ARTICLE + _COLOR + rf"(?P<class{{0}}>{'|'.join(PLURALS.values())})"
_TEMPLATES = (
    r'a photo of a sign that says "(?P<word>[A-Z]{1,4})"',
    rf"a photo of (?P<number>{'|'.join(NUMBERS)}) (?P<classes>{'|'.join(PLURALS)})",
    f"a photo of {_NOUN.format(0)}",
    f"a photo of {_NOUN.format(0)} and {_NOUN.format(1)}",
    f"a photo of {_NOUN.format(0)} (?P<relation>left of|right of|above|below) {_NOUN.format(1)}",
)


def stated(prompt: str) -> dict[str, str]:
    """Return the slots of a prompt: class0, color0, relation, number, letter0 and so on."""
    for template in _TEMPLATES:
        match = re.fullmatch(template, prompt)
        if match:
            slots = {name: text for name, text in match.groupdict().items() if text}
            if "word" in slots:
                return {f"letter{i}": letter for i, letter in enumerate(slots["word"])}
            if "classes" in slots:
                slots["class0"] = PLURALS[slots.pop("classes")]
            return slots
    raise AssertionError(f"`{prompt}` follows none of GenEval's templates")


def center(item: SceneObject) -> tuple[float, float]:
    """Return the middle of an object in pixels."""
    return item.cell[0] * 8 + item.jitter[0], item.cell[1] * 8 + item.jitter[1]


def official_relations(a: SceneObject, b: SceneObject) -> set[str]:
    """Return where `a` stands from `b` by the official position rule."""
    size = [6.5 * 2 * (0.95 if item.label == "square" else 1.0) for item in (a, b)]
    offset = [p - q for p, q in zip(center(a), center(b), strict=True)]
    rest = [max(abs(d) - 0.1 * sum(size), 0.0) * (1 if d > 0 else -1) for d in offset]
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = rest[0] / length, rest[1] / length
    rules = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in rules.items() if holds}


def shown(scene: Scene) -> set[Fact]:
    """Return every fact a prompt of any task could state about the picture."""
    if scene.word is not None:
        return {("text", scene.word)}
    facts: set[Fact] = set()
    for label, number in Counter(item.label for item in scene.objects).items():
        facts |= {("single_object", label), ("counting", label, number)}
    for item in scene.objects:
        facts.add(("colors", item.label, item.color))
    for a, b in permutations(scene.objects, 2):
        if a.label != b.label:
            facts.add(("color_attr", frozenset(((a.label, a.color), (b.label, b.color)))))
            facts |= {("position", a.label, rule, b.label) for rule in official_relations(a, b)}
    if scene.task == "two_object":  # the sentence, in its order
        facts.add(("two_object", *(item.label for item in scene.objects)))
    return facts


def asked(metadata: Mapping[str, Any]) -> Fact:
    """Return the fact that a prompt's metadata states."""
    task = metadata["tag"]
    if task == "text":
        return (task, metadata["text"])
    include = metadata["include"]
    labels = [clause["class"] for clause in include]
    if task == "single_object":
        return (task, labels[0])
    if task == "colors":
        return (task, labels[0], include[0]["color"])
    if task == "counting":
        return (task, labels[0], include[0]["count"])
    if task == "two_object":
        return (task, *labels)
    if task == "position":
        relation, target = include[1]["position"]
        return (task, labels[1], relation, labels[target])
    return (task, frozenset((clause["class"], clause["color"]) for clause in include))
