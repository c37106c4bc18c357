"""Scores that fail or cannot be stored: none and the reason, and tried again."""

import itertools
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_stand_in import StandInPolicy, toy_suite, without_first
from PIL import Image

from cli.eval import summary
from evals.results import load_results
from evals.run import evaluate
from evals.suites import Metric, SampleScore


def test_a_failed_score_is_tried_again_on_the_stored_picture(tmp_path: Path) -> None:
    suite = toy_suite(3)
    away = without_first(suite)
    evaluate(StandInPolicy(suite.records, 0.4), away, tmp_path / "a", seeds=2, weights="w")
    policy = StandInPolicy(suite.records, 0.4)
    evaluate(policy, away, tmp_path / "b", seeds=2, weights="w")
    assert len(policy.generated) == 2  # what has no score is not taken over
    policy = StandInPolicy(suite.records, 0.4)
    again = evaluate(policy, suite, tmp_path / "a", seeds=2, weights="w")
    assert policy.generated == []
    assert again["unscored"]["strict"] == 0
    whole = evaluate(policy, suite, tmp_path / "elsewhere" / "c", seeds=2, weights="w")
    assert again["overall"] == whole["overall"]
    assert len(load_results(tmp_path / "a").samples) == 6


def test_a_run_cut_off_after_scoring_again_leaves_no_old_summary(tmp_path, monkeypatch) -> None:
    suite = toy_suite(1)
    policy = StandInPolicy(suite.records, 0.0)
    nothing = SampleScore(dict.fromkeys(suite.metrics), "the detector is away")
    away = replace(suite, score=lambda image, record: nothing)
    evaluate(policy, away, tmp_path / "a", seeds=1, weights="w")

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("evals.run.write_results", cut)
        with pytest.raises(KeyboardInterrupt):
            evaluate(policy, suite, tmp_path / "a", seeds=1, weights="w")
    results = evaluate(policy, suite, tmp_path / "a", seeds=1, weights="w")
    assert results["unscored"]["strict"] == 0


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (SampleScore({"strict": float("nan"), "extra_objects": 0.0}, ""), "nan for `strict`"),
        (SampleScore({"strict": 1.0}, ""), "no value for `extra_objects`"),
        (SampleScore({"strict": "1", "extra_objects": 0}, ""), "'1' for `strict`"),  # type: ignore[dict-item]
        (SampleScore({"strict": 1.0, "extra_objects": 0}, "", {"x": float("inf")}), "no JSON"),
        (SampleScore({"strict": 1.0, "extra_objects": 0}, "\ud800"), "no JSON"),
        (SampleScore({"strict": 1.0, "extra_objects": 0}, "", [1]), "no dictionary"),  # type: ignore[arg-type]
    ],
)
def test_a_score_that_cannot_be_stored_is_none(tmp_path: Path, told: SampleScore, why: str) -> None:
    suite = replace(toy_suite(1), score=lambda image, record: told)
    results = evaluate(StandInPolicy(suite.records, 0), suite, tmp_path / "a", seeds=1, weights="w")
    assert results["unscored"] == {"strict": 1, "extra_objects": 1}
    [row] = load_results(tmp_path / "a").samples
    assert row["reason"].startswith("could not be scored: ")
    assert why in row["reason"]


def test_a_note_of_any_type_tells_why_results_are_not_comparable(tmp_path: Path) -> None:
    score = SampleScore({"strict": 1.0, "extra_objects": 0.0}, "", {"not_comparable": ["mine"]})
    suite = replace(toy_suite(1), score=lambda image, record: score)
    results = evaluate(StandInPolicy(suite.records, 0), suite, tmp_path / "a", seeds=1, weights="w")
    assert "['mine']" in results["suite"]["not_comparable"]


@pytest.mark.parametrize(
    ("sizes", "overall", "first"),
    [
        ((2, 2), "it takes 5 independent prompts", "it takes 5 independent prompts"),
        ((6, 1), "a task has a single prompt", "amounts are all alike"),
        ((6, 6), "amounts are all alike", "amounts are all alike"),
    ],
)
def test_a_score_without_an_interval_says_why(
    tmp_path: Path, sizes: tuple[int, int], overall: str, first: str
) -> None:
    records = tuple(
        {
            "prompt": f"{task} {i}",
            "prompt_id": f"{task}{i}",
            "metadata": {"tag": task, "include": [{"class": "circle", "count": 1}]},
        }
        for task, size in zip(("one", "two"), sizes, strict=True)
        for i in range(size)
    )
    suite = replace(
        toy_suite(1),
        records=records,
        metrics={"marks": Metric("Marks", "amount")},
        score=lambda image, record: SampleScore({"marks": 3.0}, ""),
    )
    evaluate(StandInPolicy(records, 0.0), suite, tmp_path / "a", seeds=1, weights="a")
    lines = summary(load_results(tmp_path / "a").results)
    assert lines[1].endswith(f"no interval: {overall}")
    assert lines[2].endswith(f"no interval: {first}")


def test_ctrl_c_waits_for_none_of_several_judges_that_hang(tmp_path: Path) -> None:
    suite = toy_suite(8)
    right, released = SampleScore({"strict": 1.0, "extra_objects": 0.0}, ""), threading.Event()
    numbers = itertools.count(1)

    def score(image: Image.Image, record: Mapping[str, Any]) -> SampleScore:
        number = next(numbers)
        if number > 4:  # of the second batch
            if number == 7:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            released.wait(30)
        return right

    policy = StandInPolicy(suite.records, 0.4)
    before, started = set(threading.enumerate()), time.monotonic()
    slow = replace(suite, score=score, workers=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(policy, slow, tmp_path / "a", seeds=1, batch_size=4, weights="w")
    assert time.monotonic() - started < 20
    assert len((tmp_path / "a" / "samples.jsonl").read_text().splitlines()) == 4
    hanging = set(threading.enumerate()) - before
    assert len(hanging) == 3
    assert all(thread.daemon for thread in hanging)  # the interpreter's end waits for no daemon
    released.set()
    for thread in hanging:
        thread.join(10)
    assert next(numbers) == 8  # the eighth picture was not judged any more
