"""Comparisons: what is paired, what is counted, and what a verdict may say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_stand_in import GENEVAL_TASKS, StandInPolicy, toy_suite

from cli.compare import table
from common.errors import RunError
from common.statistics import Difference, minimum_detectable_effect, paired_difference
from evals.compare import compare, compare_all, verdict
from evals.gate import apply_gate, parse_gate
from evals.report import build_report
from evals.results import load_results
from evals.run import evaluate


def run(folder: Path, error: float, prompts: int = 18, **options: object) -> Path:
    suite = toy_suite(prompts)
    policy = StandInPolicy(suite.records, error, one_layout=bool(options.pop("one_layout", False)))
    evaluate(policy, suite, folder, **{"seeds": 2, "weights": folder.name, **options})
    return folder


def mean_over_tasks(folder: Path) -> float:
    rates: dict[str, list[float]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        rates.setdefault(row["task"], []).append(row["values"]["strict"])
    return sum(sum(values) / len(values) for values in rates.values()) / len(rates)


def test_a_large_improvement_is_found(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", 0.9, prompts=36), run(tmp_path / "b", 0.0, prompts=36)
    found = compare(before, after)
    overall = found["overall"]
    assert overall["verdict"] == "better"
    expected = mean_over_tasks(after) - mean_over_tasks(before)
    assert overall["mean"] == pytest.approx(expected, abs=1e-6)
    # The stand-in errs with the same random number for both, so right stays right.
    assert overall["low"] < overall["mean"] < overall["high"]
    assert overall["loss"] == 0
    assert overall["win"] + overall["tie"] == found["prompts"] == 36
    assert found["pairs"] == 72
    assert compare(after, before)["overall"]["verdict"] == "worse"
    assert compare(after, before)["overall"]["mean"] == -overall["mean"]


def test_equal_policies_cannot_be_told_apart(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", 0.4), run(tmp_path / "b", 0.4)
    found = compare(before, after)
    assert found["overall"]["mean"] == 0
    assert found["overall"]["verdict"] == "not shown"
    assert {entry["verdict"] for entry in found["tasks"].values()} == {"not shown"}


def test_task_p_values_are_adjusted(tmp_path: Path) -> None:
    found = compare(run(tmp_path / "a", 0.7), run(tmp_path / "b", 0.3))
    for entry in found["tasks"].values():
        assert entry["p_adjusted"] >= entry["p_value"]
    smallest = min(entry["p_value"] for entry in found["tasks"].values())
    adjusted = min(entry["p_adjusted"] for entry in found["tasks"].values())
    assert adjusted == pytest.approx(min(1.0, 6 * smallest), abs=1e-5)


def test_several_candidates_are_adjusted_together(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, error) for name, error in (("a", 0.5), ("b", 0.3), ("c", 0.1))]
    baseline, *candidates = map(load_results, folders)
    one, both = compare(baseline, candidates[0]), compare_all(baseline, candidates)
    assert both[0]["overall"]["p_adjusted"] >= one["overall"]["p_value"]


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", 0.4), run(tmp_path / "b", 0.4, temperature=0.7)
    assert compare(before, after)["settings_that_differ"] == {"temperature": [1.0, 0.7]}


def test_only_shared_pictures_are_compared(tmp_path: Path) -> None:
    before = run(tmp_path / "a", 0.4, prompts=12)
    after = run(tmp_path / "b", 0.4, seeds=1)
    found = compare(before, after)
    assert found["pairs"] == 12
    assert found["unpaired"] == {"before": 12, "after": 6}


def test_lost_diversity_is_found(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", 0.0), run(tmp_path / "b", 0.0, one_layout=True)
    entry = compare(before, after)["layout_diversity"]
    assert entry["before"] > 0.2
    assert entry["after"] == 0
    assert entry["verdict"] == "worse"


def without_scores(folder: Path, task: str) -> None:
    """Make a finished evaluation one in which the scorer failed on a task."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        if row["task"] == task:
            row["values"] = dict.fromkeys(row["values"])
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("broken", ["a", "b"])
def test_a_task_unscored_on_one_side_leaves_no_overall_difference(
    tmp_path: Path, broken: str
) -> None:
    before, after = run(tmp_path / "a", 0.4), run(tmp_path / "b", 0.4)
    without_scores(tmp_path / broken, "position")
    found = compare(before, after)
    assert found["overall"] is None
    assert found["others"] == {"extra_objects": None}
    assert found["tasks"]["position"] is None
    assert [task for task, entry in found["tasks"].items() if entry is None] == ["position"]
    assert f"0 of 6 pictures scored in {tmp_path / broken}" in found["not_scored"]["position"]
    outcome = apply_gate(parse_gate("toy-scenes.overall < -0.9"), found)
    assert outcome.failed
    assert "position has no pair that was scored in both" in outcome.reason
    assert not apply_gate(parse_gate("toy-scenes.colors < -0.9"), found).failed
    assert any(line.startswith("position") and "not scored" in line for line in table(found))


def test_an_evaluation_in_which_nothing_was_scored_can_be_compared_and_reported(
    tmp_path: Path,
) -> None:
    before, after = run(tmp_path / "a", 0.4), run(tmp_path / "b", 0.4)
    for task in GENEVAL_TASKS:
        without_scores(after, task)
    found = compare(before, after)
    assert found["overall"] is None
    assert set(found["tasks"].values()) == {None}
    [again] = compare_all(load_results(before), [load_results(after)])
    assert again["not_scored"].keys() == set(GENEVAL_TASKS)
    page = build_report([before, after], tmp_path / "page")
    for file in (page, page.with_name("report.md")):
        assert "cannot be compared overall" in file.read_text()


def test_prompts_of_one_name_and_different_content_are_not_paired(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", 0.4), run(tmp_path / "b", 0.4)
    records = [json.loads(line) for line in (after / "prompts.jsonl").read_text().splitlines()]
    records[3]["metadata"]["include"][0]["count"] += 1
    (after / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(
        RunError, match=f"different prompts under the id '{records[3]['prompt_id']}"
    ):
        compare(before, after)


def test_evaluations_with_other_judges_are_not_paired(tmp_path: Path) -> None:
    suite = toy_suite(6)
    for name, rules in (("a", "old"), ("b", "new")):
        judged = replace(suite, settings={"rules": rules})
        evaluate(StandInPolicy(suite.records, 0.4), judged, tmp_path / name, seeds=1, weights=name)
    with pytest.raises(RunError, match="rules is 'old' there and 'new' now"):
        compare(tmp_path / "a", tmp_path / "b")


def test_suites_are_not_mixed(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", 0.4), run(tmp_path / "b", 0.4)
    text = (after / "results.json").read_text().replace('"toy-scenes"', '"other-scenes"')
    (after / "results.json").write_text(text)
    with pytest.raises(RunError, match="other-scenes"):
        compare(before, after)


def test_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="atelier eval"):
        load_results(tmp_path / "nothing")


def difference(**facts: float | None) -> Difference:
    values = {
        "mean": 0.2, "low": 0.1, "high": 0.3, "standard_error": 0.05,
        "clusters": 40, "samples": 160, "p_value": 0.001, "minimum_detectable": 0.14,
    }  # fmt: skip
    return Difference(**(values | facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "p_value", "code"),
    [
        ({}, 0.001, "better"),
        ({"mean": -0.2, "low": -0.3, "high": -0.1}, 0.001, "worse"),
        ({"low": -0.01}, 0.001, "not shown"),
        ({"low": 0.0}, 0.001, "not shown"),
        ({}, 0.06, "not shown"),
        ({"mean": 0.13}, 0.001, "not shown"),
        ({"low": None, "high": None, "minimum_detectable": None}, 0.001, "not shown"),
        ({"minimum_detectable": None}, 0.001, "not shown"),
    ],
)
def test_verdict_never_says_more_than_the_numbers(facts: dict, p_value: float, code: str) -> None:
    found, sentence = verdict(difference(**facts), p_value)
    assert found == code
    assert ("etter" in sentence) == (code == "better")
    assert ("orse" in sentence) == (code == "worse")


def test_verdict_of_a_metric_that_should_fall() -> None:
    assert verdict(difference(), 0.001, better="lower")[0] == "worse"


def test_a_true_difference_of_the_detectable_size_is_named_every_second_time() -> None:
    """Normal differences of 60 prompts: the interval tells them from 0 in 4 of 5 samples."""
    rng = np.random.default_rng(0)
    prompts, runs = 60, 300
    effect = minimum_detectable_effect(1 / prompts**0.5, prompts - 1)
    told = named = 0
    for _ in range(runs):
        after = effect + rng.standard_normal(prompts)
        found = paired_difference(np.zeros(prompts), after, range(prompts), resamples=500)
        told += found.low > 0
        named += verdict(found, found.p_value)[0] == "better"
    assert 0.73 < told / runs < 0.87  # 3 standard errors of 0.8
    assert 0.41 < named / runs < 0.62
