"""The suites: registry, limits, and scorers on pictures whose truth is known."""

import pytest
from eval_stand_in import StandInPolicy

from common.errors import AtelierError
from data.scenes import Scene, render_scene
from evals.suites import Suite, list_suites, load_suite, task_of


def scores(suite: Suite, error: float) -> list[dict[str, float | None]]:
    policy = StandInPolicy(suite.records, error)
    prompts = [record["prompt"] for record in suite.records]
    images = policy.generate(
        prompts, steps=1, guidance=1.0, temperature=1.0, seeds=list(range(len(prompts)))
    )
    return [
        suite.score(image, record).values
        for image, record in zip(images, suite.records, strict=True)
    ]


def test_built_in_suites_are_listed() -> None:
    assert {"geneval-scenes", "ocr-scenes"} <= set(list_suites())


def test_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(AtelierError, match="geneval-scenes"):
        load_suite("geneval-scene")


def test_limit_takes_tasks_in_turn_and_nests() -> None:
    whole = load_suite("geneval-scenes")
    six, twelve = whole.limited(6), whole.limited(12)
    assert len({task_of(record) for record in six.records}) == 6
    assert twelve.records[:6] == six.records
    assert whole.limited(10_000) == whole


def test_prompt_ids_are_unique() -> None:
    for name in ("geneval-scenes", "ocr-scenes"):
        ids = [record["prompt_id"] for record in load_suite(name).records]
        assert len(ids) == len(set(ids))


def test_right_pictures_score_one_and_wrong_ones_zero() -> None:
    suite = load_suite("geneval-scenes")
    right, wrong = scores(suite, 0.0), scores(suite, 1.0)
    assert sum(v["strict"] or 0 for v in right) >= 0.99 * len(right)
    assert sum(v["strict"] or 0 for v in wrong) <= 0.06 * len(wrong)
    assert all(value["extra_objects"] == 0 for value in right)


def test_sign_is_read_letter_by_letter() -> None:
    suite = load_suite("ocr-scenes", 3)
    record = next(r for r in suite.records if len(r["metadata"]["text"]) >= 2)
    word = record["metadata"]["text"]
    asked = suite.score(render_scene(Scene("text", word=word)), record)
    assert asked.values == {"exact": 1.0, "ocr": 1.0}
    last = "A" if word[-1] != "A" else "X"
    other = suite.score(render_scene(Scene("text", word=word[:-1] + last)), record)
    # one wrong letter of n: the published score is 1 - 1 / n
    assert other.values["exact"] == 0.0
    assert other.values["ocr"] == pytest.approx(1 - 1 / len(word))
    assert word in other.reason
