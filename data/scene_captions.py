"""Captions and GenEval metadata of scenes, right ones and, for noisy captions, wrong ones."""

from dataclasses import replace

import numpy as np

from common.scene_world import CLASSES, COLORS, LETTERS, NUMBER_WORDS, RELATIONS
from data.scene_content import Record, Scene


def caption(scene: Scene) -> str:
    """Return the prompt of a scene, after GenEval's templates."""
    return str(metadata(scene)["prompt"])


def metadata(scene: Scene) -> Record:
    """Return GenEval metadata: tag, include clauses (and exclude for counting), prompt."""
    if scene.word is not None:
        return text_metadata(scene.word)
    objects = scene.objects
    labels = [o.label for o in objects]
    if scene.task == "single_object":
        return geneval_metadata("single_object", labels[:1])
    if scene.task == "colors":
        return geneval_metadata("colors", labels[:1], [objects[0].color])
    if scene.task == "counting":
        return geneval_metadata("counting", labels[:1], count=len(objects))
    if scene.task == "position":
        return geneval_metadata("position", labels, relation=scene.relation)
    colors = [o.color for o in objects] if scene.task == "color_attr" else None
    return geneval_metadata(scene.task, labels, colors)


def geneval_metadata(
    task: str,
    labels: list[str],
    colors: list[str] | None = None,
    count: int = 1,
    relation: str | None = None,
) -> Record:
    """Build the metadata record of a prompt (official keys: tag, include, exclude, prompt)."""
    include: list[Record] = [{"class": label, "count": 1} for label in labels]
    extra: Record = {}
    named = [_with_article(label) for label in labels]
    if colors:
        for clause, color in zip(include, colors, strict=True):
            clause["color"] = color
        named = [_with_article(f"{c} {x}") for c, x in zip(colors, labels, strict=True)]
    if task == "counting":
        include[0]["count"] = count
        extra["exclude"] = [{"class": labels[0], "count": count + 1}]
        text = f"a photo of {NUMBER_WORDS[count]} {_plural(labels[0])}"
    elif task == "position":
        # The official order: the reference object first, then the one that is placed.
        include = [include[1], {**include[0], "position": [relation, 0]}]
        text = f"a photo of {named[0]} {relation} {named[1]}"
    else:
        text = "a photo of " + " and ".join(named)
    return {"tag": task, "include": include, **extra, "prompt": text}


def text_metadata(word: str) -> Record:
    """Build the record of a sign prompt."""
    return {"tag": "text", "text": word, "prompt": f'a photo of a sign that says "{word}"'}


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def misdescribe(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with one stated fact changed, as in captions found on the web.

    The result is meant for `caption` only: number, class, colour, relation or one letter is wrong.
    What it states may be a held-out combination.
    """
    if scene.word is not None:
        place = int(rng.integers(len(scene.word)))
        other = str(rng.choice([x for x in LETTERS if x != scene.word[place]]))
        return replace(scene, word=scene.word[:place] + other + scene.word[place + 1 :])
    objects = list(scene.objects)
    kinds = {
        "single_object": ["class"],
        "colors": ["class", "color"],
        "counting": ["class", "count"],
        "two_object": ["class"],
        "position": ["class", "relation"],
        "color_attr": ["class", "color"],
    }[scene.task]
    kind = str(rng.choice(kinds))
    if kind == "relation":
        wrong = [r for r in RELATIONS if r != scene.relation]
        return replace(scene, relation=str(rng.choice(wrong)))
    if kind == "count":
        wrong_count = int(rng.choice([n for n in NUMBER_WORDS if n != len(objects)]))
        return replace(scene, objects=tuple((objects * 2)[:wrong_count]))
    victim = int(rng.integers(len(objects)))
    if kind == "class":
        stated = {o.label for o in objects}
        label = str(rng.choice([x for x in CLASSES if x not in stated]))
        many = scene.task == "counting"
        changed = [
            replace(o, label=label) if many or i == victim else o for i, o in enumerate(objects)
        ]
    else:
        color = str(rng.choice([c for c in COLORS if c != objects[victim].color]))
        changed = [replace(o, color=color) if i == victim else o for i, o in enumerate(objects)]
    return replace(scene, objects=tuple(changed))
