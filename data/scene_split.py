"""Which combinations are held out from training, for a picture and for a prompt.

A held-out relation of two classes, pair of coloured shapes, number of a class or word is in no
training picture, whatever the task that the picture belongs to, and pretraining never states one in
a wrong caption either. Two combinations are narrower. For two objects it is the sentence: "a circle
and a square" is never a training caption or prompt, while "a square and a circle" is, so that the
task measures whether the words are understood in an order not seen. For colours it is one object of
a class and a colour alone in the picture: training pictures of several objects do show that class
in that colour, because tokens that never occur in training could not be learnt.
"""

from common.scene_world import OPPOSITE
from common.seeds import counter_seed
from data.scene_content import Record, Scene, relations


def _chosen(kind: str, *parts: object, share: float) -> bool:
    return counter_seed(2026, f"held-out/{kind}", *map(str, parts)) / 2**63 < share


# "A and B" of the two-objects task: each class is the first in one and the second in another, and
# "B and A" is in training. Classes that never share a training picture are no combination to hold
# out: captions with a wrong word then teach that such a pair is always wrong (LOG.md).
_HELD_OUT_SENTENCES = {
    ("circle", "square"),
    ("square", "triangle"),
    ("triangle", "cross"),
    ("cross", "ring"),
    ("ring", "diamond"),
    ("diamond", "circle"),
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
    return _chosen("relation", first, relation, second, share=0.27)


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
    if scene.task == "two_object" and (first.label, second.label) in _HELD_OUT_SENTENCES:
        return True
    if any(_relation_held_out(first.label, r, second.label) for r in relations(first, second)):
        return True
    pair = sorted(f"{o.color} {o.label}" for o in objects)
    return _chosen("color_attr", *pair, share=0.25)


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
    if record["tag"] == "two_object":
        return (labels[0], labels[1]) in _HELD_OUT_SENTENCES
    if record["tag"] == "position":
        relation: list[object] = include[1]["position"]  # type: ignore[assignment]
        return _relation_held_out(labels[1], str(relation[0]), labels[0])
    pair = sorted(f"{c['color']} {c['class']}" for c in include)
    return _chosen("color_attr", *pair, share=0.25)
