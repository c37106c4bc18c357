"""A policy whose error rate is known: it paints the scene that was asked for, or a wrong one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from common.errors import RewardError
from common.scene_world import CLASSES, COLORS
from data.scenes import Scene, SceneObject, misdescribe, relations, render_scene, scene_prompts
from evals.suites import Metric, SampleScore, Suite
from rewards.scene_detector import SceneDetector

GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class StandInPolicy:
    """Right with probability 1 - `error`; `spray` is the chance of one extra object."""

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        error: float,
        *,
        spray: float = 0.0,
        one_layout: bool = False,
    ) -> None:
        self.config = SimpleNamespace(steps=6, guidance=1.5)
        self.metadata = {record["prompt"]: record["metadata"] for record in records}
        self.error = error
        self.spray = spray
        self.one_layout = one_layout
        self.generated: list[tuple[str, int]] = []

    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Image.Image]:
        """Return one 48 px picture for each prompt."""
        self.generated += zip(prompts, seeds, strict=True)
        return [self._paint(p, s) for p, s in zip(prompts, seeds, strict=True)]

    def _paint(self, prompt: str, seed: int) -> Image.Image:
        rng = np.random.default_rng(seed)
        wrong, sprayed = rng.random() < self.error, rng.random() < self.spray
        layout = np.random.default_rng(0) if self.one_layout else rng
        scene = scene_of(self.metadata[prompt], layout)
        if wrong:
            scene = misdescribe(scene, rng)
            if scene.task == "position":  # only the stated relation was changed: move the objects
                scene = Scene(scene.task, scene.objects[::-1])
                cells = [item.cell for item in scene.objects]
                labels = [item.label for item in scene.objects]
                scene = Scene(
                    scene.task,
                    tuple(
                        SceneObject(label, item.color, cell)
                        for label, cell, item in zip(
                            labels[::-1], cells, scene.objects, strict=True
                        )
                    ),
                )
            if scene.task == "counting":
                first = scene.objects[0]
                cells = spread(layout, len(scene.objects))
                scene = Scene(
                    scene.task, tuple(SceneObject(first.label, first.color, c) for c in cells)
                )
        if sprayed and len(scene.objects) < 3:
            taken = [item.cell for item in scene.objects]
            free = spread(rng, 1, taken)
            scene = Scene(scene.task, (*scene.objects, SceneObject("ring", "purple", free[0])))
        return render_scene(scene)


def scene_of(metadata: Mapping[str, Any], rng: np.random.Generator) -> Scene:
    """Return a scene that fulfils the metadata, its open choices drawn at random."""
    clauses = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    shared = str(rng.choice(list(COLORS)))
    colors = [
        c.get("color") or (shared if metadata["tag"] == "counting" else None) for c in clauses
    ]
    while True:
        cells = spread(rng, len(clauses))
        objects = tuple(
            SceneObject(clause["class"], color or str(rng.choice(list(COLORS))), cell)
            for clause, color, cell in zip(clauses, colors, cells, strict=True)
        )
        if metadata["tag"] != "position":
            return Scene(metadata["tag"], objects)
        relation = clauses[1]["position"][0]
        if relations(objects[1], objects[0]) == [relation]:
            return Scene("position", objects[::-1], relation)


def spread(
    rng: np.random.Generator, count: int, taken: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """Return lattice cells whose blocks overlap neither each other nor those taken."""
    while True:
        cells: list[tuple[int, int]] = []
        for _ in range(60):
            cell = (int(rng.integers(1, 6)), int(rng.integers(1, 6)))
            if all(max(abs(cell[0] - x), abs(cell[1] - y)) >= 2 for x, y in [*taken, *cells]):
                cells.append(cell)
            if len(cells) == count:
                return cells


def toy_score(image: Image.Image, record: Mapping[str, Any]) -> SampleScore:
    """A short scorer for tests: the classes asked for, each as often as asked, and no other."""
    detector = SceneDetector()
    found = [d for d in detector.detect([image])[0] if d.score > 0.3]
    colors = detector.classify_colors(image, found)
    asked = {c["class"]: c["count"] for c in record["metadata"]["include"]}
    seen = {label: sum(d.label == label for d in found) for label in CLASSES}
    wrong = [
        f"{n} {label}, asked {asked.get(label, 0)}"
        for label, n in seen.items()
        if n != asked.get(label, 0)
    ]
    extra = sum(max(0, n - asked.get(label, 0)) for label, n in seen.items())
    objects = [
        {"label": d.label, "color": c, "score": d.score, "box": list(d.box_xyxy)}
        for d, c in zip(found, colors, strict=True)
    ]
    return SampleScore(
        {"strict": float(not wrong), "extra_objects": float(extra)},
        "found " + "; ".join(wrong) if wrong else "all clauses hold",
        {"objects": objects, "size": list(image.size)},
    )


def toy_suite(prompts: int = 24) -> Suite:
    """A suite over held-out scene prompts with the short scorer."""
    records = scene_prompts("held_out", tasks=GENEVAL_TASKS)
    return Suite(
        "toy-scenes",
        "Toy scenes",
        1,
        tuple(records),
        toy_score,
        {
            "strict": Metric("All clauses hold"),
            "extra_objects": Metric("Extra objects a picture", "amount", "lower"),
        },
        "it is made for tests",
    ).limited(prompts)


def without_first(suite: Suite) -> Suite:
    """The suite with a scorer that fails on its first prompt."""
    broken = suite.records[0]["prompt_id"]

    def score(image: Image.Image, record: Mapping[str, Any]) -> SampleScore:
        if record["prompt_id"] == broken:
            raise RewardError("the detector is away")
        return suite.score(image, record)

    return replace(suite, score=score)
