"""Editing in the scene world: its records, its rules, and references on their way to the policy."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from published_checkpoint import edit_policy

from cli.main import main
from common.errors import PolicyError
from data.scene_edits import edit_records, scene_of
from data.scenes import Scene, SceneObject, is_held_out, render_scene
from evals.engines import EnginePolicy
from evals.report import build_report
from evals.results import load_results
from evals.run import evaluate
from evals.suites import load_suite, task_of
from evals.suites.edit_scenes import reference
from policy.pixels import to_images
from rollout.transformers_engine import TransformersEngine


def painted(objects: list[dict]) -> Image.Image:
    return render_scene(scene_of(objects))


class Editor:
    """Paints what each record asks for, found by the instruction and the reference's pixels."""

    def __init__(self, records: tuple) -> None:
        self.config = SimpleNamespace(steps=1, guidance=1.0, edit_template="{prompt}{references}")
        self.answers = {(r["prompt"], reference(r).tobytes()): painted(r["after"]) for r in records}

    def generate(self, prompts, *, references, steps, guidance, temperature, seeds):
        shown = to_images(references / 2 + 0.5)
        return [
            self.answers[prompt, picture.tobytes()]
            for prompt, picture in zip(prompts, shown, strict=True)
        ]


def test_records_are_held_out_edits_of_training_pictures() -> None:
    records = edit_records("held_out", each=12)
    assert [task_of(r) for r in records[:3]] == ["recolor", "remove", "add"]
    assert len(records) == 36
    assert len({r["prompt_id"] for r in records}) == 36
    assert len({json.dumps([r["prompt"], r["before"], r["after"]]) for r in records}) == 36
    for r in records:
        tasks = {1: "colors", 2: "two_object"}
        before, after = (
            Scene(tasks[len(r[key])], scene_of(r[key]).objects) for key in ("before", "after")
        )
        assert is_held_out(after)
        assert not is_held_out(before)
        assert (
            painted(json.loads(json.dumps(r["after"]))).tobytes() == painted(r["after"]).tobytes()
        )
    assert records[:9] == edit_records("held_out", each=3)
    assert records[0] != edit_records("held_out", each=1, seed=1)[0]


def test_an_editor_without_fault_gets_every_edit_right(tmp_path: Path) -> None:
    suite = load_suite("edit-scenes", limit=30)
    results = evaluate(Editor(suite.records), suite, tmp_path / "r", seeds=1, weights="w")
    for metric in ("exact", "success", "kept"):
        assert results["overall"][metric]["mean"] == 1.0
    assert set(results["tasks"]) == {"recolor", "remove", "add"}


def test_the_report_shows_the_picture_to_edit_beside_the_edits(tmp_path: Path) -> None:
    suite = load_suite("edit-scenes", limit=3)
    evaluate(Editor(suite.records), suite, tmp_path / "r", seeds=2, weights="w")
    page = build_report([tmp_path / "r"], tmp_path / "report")
    for number, record in enumerate(suite.records):
        with Image.open(page.parent / "images" / "0-reference" / f"{number}.webp") as shown:
            assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(reference(record)))
    assert "after the picture to edit" in page.read_text()


def test_a_copy_of_the_reference_gets_none_right() -> None:
    suite = load_suite("edit-scenes", limit=12)
    for record in suite.records:
        values = suite.score(reference(record), record).values
        assert (values["exact"], values["success"], values["kept"]) == (0.0, 0.0, 1.0)


BEFORE = (SceneObject("circle", "red", (1, 1)), SceneObject("ring", "green", (5, 5)))
RECOLOR = {"add": [{"class": "circle", "count": 1, "color": "blue"}],
           "remove": [{"class": "circle", "count": 1, "color": "red"}]}  # fmt: skip
BLUE = replace(BEFORE[0], color="blue")


def record_of(metadata: dict, after: tuple[SceneObject, ...]) -> dict:
    return {
        "metadata": {"tag": "edit", **metadata},
        "before": [vars(o) for o in BEFORE],
        "after": [vars(o) for o in after],
    }


@pytest.mark.parametrize(
    ("shown", "exact", "reason"),
    [
        ((BLUE, BEFORE[1]), 1.0, "as asked"),
        ((replace(BLUE, cell=(1, 4)), BEFORE[1]), 0.0, "blue circle moved by 24 of 48"),
        ((BLUE, replace(BEFORE[1], cell=(5, 4))), 0.0, "green ring moved by 8"),
        ((BLUE,), 0.0, "no green ring"),
        ((BLUE, BEFORE[1], SceneObject("cross", "red", (5, 1))), 0.0, "one red cross that nobody"),
        ((replace(BLUE, color="purple"), BEFORE[1]), 0.0, "no blue circle"),
        ((BLUE, replace(BEFORE[1], color="red")), 0.0, "one red ring that nobody"),
    ],
)
def test_the_exact_rule(shown: tuple, exact: float, reason: str) -> None:
    record = record_of(RECOLOR, (BLUE, BEFORE[1]))
    score = load_suite("edit-scenes").score(render_scene(Scene("edit", shown)), record)
    assert score.values["exact"] == exact
    assert reason in score.reason


def test_a_new_object_may_stand_anywhere() -> None:
    new = SceneObject("cross", "orange", (1, 5))
    record = record_of({"add": [{"class": "cross", "count": 1, "color": "orange"}]}, (*BEFORE, new))
    suite = load_suite("edit-scenes")
    for cell in ((1, 5), (5, 1), (3, 3)):
        shown = render_scene(Scene("edit", (*BEFORE, replace(new, cell=cell))))
        assert suite.score(shown, record).values["exact"] == 1.0


# --- references on their way -------------------------------------------------------------------


def test_a_policy_that_edits_sees_each_record_s_own_reference(tmp_path: Path) -> None:
    """As if every picture were edited alone, also where references differ in size."""
    model = edit_policy()
    suite = load_suite("edit-scenes", limit=3)
    sizes = {suite.records[1]["prompt_id"]: (64, 48)}

    def resized(record):
        return reference(record).resize(sizes.get(record["prompt_id"], (48, 48)))

    suite = replace(suite, reference=resized)
    evaluate(model, suite, tmp_path / "r", seeds=1, steps=2, weights="w")
    from policy.pixels import to_pixels

    for record, row in zip(suite.records, load_results(tmp_path / "r").samples, strict=True):
        alone = model.generate(
            [record["prompt"]], references=to_pixels(resized(record))[None], steps=2,
            guidance=model.config.guidance, seeds=[row["seed"]],
        )[0]  # fmt: skip
        with Image.open(tmp_path / "r" / row["image"]) as stored:
            change = np.asarray(stored, int) - np.asarray(alone, int)
        assert np.abs(change).max() <= 1


def test_an_engine_edits_as_the_policy_does() -> None:
    model = edit_policy()
    config = model.config
    engine = TransformersEngine(
        model.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    from policy.pixels import to_pixels

    shown = to_pixels(render_scene(Scene("edit", BEFORE)))[None]
    how = {"references": shown, "steps": 2, "guidance": 1.5, "temperature": 1.0, "seeds": [5]}
    own = model.generate(["make it blue"], **how)[0]
    drawn = EnginePolicy(model, engine).generate(["make it blue"], **how)[0]
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(own))


def test_training_does_not_take_a_suite_that_shows_pictures(capsys) -> None:
    """It would draw from the instructions alone, and score pictures of nothing."""
    assert main(["check", "geneval-scenes", "evals.suite=edit-scenes", "evals.every=5"]) != 0
    assert "shows the policy pictures" in "".join(capsys.readouterr())
    assert load_suite("geneval-scenes").from_prompts_alone()


def test_a_policy_that_draws_from_text_alone_is_refused_before_anything_is_written(
    policy, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match="asks for edits"):
        evaluate(policy, "edit-scenes", tmp_path / "r", seeds=1, weights="w")
    assert not (tmp_path / "r").exists()
