"""Which combinations are held out from training, for a picture and for a prompt.

A held-out relation of two classes, pair of coloured shapes, number of a class or word is in no
training picture, whatever the task that the picture belongs to, and pretraining never states one in
a wrong caption either. Two tasks are held out by less, because what they ask for has to occur in
training if it is to be learnt at all:

- colours: the combination is one object of a class and a colour alone in the picture; training
  pictures of several objects do show that class in that colour.
- two objects: the combination is the sentence, two classes in one order. Classes that never share
  a picture would be a harder test, but captions with wrong words (which pretraining ends with, and
  the web is full of) teach that such a caption is wrong: the policy would have nothing left to
  improve (LOG.md).
"""

from common.scene_world import OPPOSITE
from common.seeds import counter_seed
from data.scene_content import Record, Scene, relations


def _chosen(kind: str, *parts: object, share: float) -> bool:
    return counter_seed(2026, f"held-out/{kind}", *map(str, parts)) / 2**63 < share


# "a photo of a FIRST and a SECOND", which the other order of the two is not.
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
    if record["tag"] == "color_attr":
        pair = sorted(f"{c['color']} {c['class']}" for c in include)
        return _chosen("color_attr", *pair, share=0.25)
    return False
