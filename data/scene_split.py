"""Which combinations are held out from training, for a picture and for a prompt.

A held-out pair of classes, relation of two classes, pair of coloured shapes, number of a class or
word is in no training picture, whatever the task that the picture belongs to, and pretraining never
states one in a wrong caption either. The combination of the colours task is one object of a class
and a colour alone in the picture: training pictures of several objects do show that class in that
colour, because tokens that never occur in training could not be learnt.
"""

from common.scene_world import OPPOSITE
from common.seeds import counter_seed
from data.scene_content import Record, Scene, relations


def _chosen(kind: str, *parts: object, share: float) -> bool:
    return counter_seed(2026, f"held-out/{kind}", *map(str, parts)) / 2**63 < share


# Class pairs that never share a training picture; each class is in one or two.
_HELD_OUT_PAIRS = {
    frozenset(pair)
    for pair in (
        ("circle", "cross"),
        ("square", "ring"),
        ("triangle", "diamond"),
        ("circle", "diamond"),
    )
}
_HELD_OUT_COUNTS = {
    ("circle", 3),
    ("square", 4),
    ("triangle", 2),
    ("cross", 4),
    ("ring", 2),
    ("diamond", 3),
}
_HELD_OUT_COLORS = {
    ("circle", "green"),
    ("circle", "purple"),
    ("square", "red"),
    ("square", "yellow"),
    ("triangle", "blue"),
    ("triangle", "orange"),
    ("cross", "purple"),
    ("ring", "red"),
    ("diamond", "yellow"),
    ("diamond", "green"),
}


def _relation_held_out(first: str, relation: str, second: str) -> bool:
    """True for one of (first, relation, second) and its mirror statement alike."""
    if first > second:
        first, second, relation = second, first, OPPOSITE[relation]
    return _chosen("relation", first, relation, second, share=0.12)


def is_held_out(scene: Scene) -> bool:
    """Return whether the picture shows a combination reserved for evaluation.

    With several objects the colour of a single one does not count.
    """
    if scene.word is not None:
        return _chosen("word", scene.word, share=0.15)
    objects = scene.objects
    if len(objects) == 1:
        return (objects[0].label, objects[0].color) in _HELD_OUT_COLORS
    if scene.task == "counting":
        return (objects[0].label, len(objects)) in _HELD_OUT_COUNTS
    first, second = objects
    if frozenset((first.label, second.label)) in _HELD_OUT_PAIRS:
        return True
    if any(_relation_held_out(first.label, r, second.label) for r in relations(first, second)):
        return True
    pair = sorted(f"{o.color} {o.label}" for o in objects)
    return _chosen("color_attr", *pair, share=0.12)


def asks_for_new_pair(record: Record) -> bool:
    """Return whether a prompt names two classes that never share a training picture."""
    return frozenset(clause["class"] for clause in record.get("include", ())) in _HELD_OUT_PAIRS


def metadata_held_out(record: Record) -> bool:
    """Return whether a prompt states a held-out combination (see `is_held_out`)."""
    if record["tag"] == "text":
        return _chosen("word", record["text"], share=0.15)
    include: list[dict[str, object]] = record["include"]
    labels = [str(clause["class"]) for clause in include]
    if record["tag"] == "single_object":
        return False
    if record["tag"] == "colors":
        return (labels[0], include[0]["color"]) in _HELD_OUT_COLORS
    if record["tag"] == "counting":
        return (labels[0], include[0]["count"]) in _HELD_OUT_COUNTS
    if frozenset(labels) in _HELD_OUT_PAIRS:
        return True
    if record["tag"] == "position":
        relation: list[object] = include[1]["position"]  # type: ignore[assignment]
        return _relation_held_out(labels[1], str(relation[0]), labels[0])
    if record["tag"] == "color_attr":
        pair = sorted(f"{c['color']} {c['class']}" for c in include)
        return _chosen("color_attr", *pair, share=0.12)
    return False
