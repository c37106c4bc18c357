"""`atelier compare`: the table, the JSON, and gates that end with exit code 1 and a reason."""

import json
from pathlib import Path

import pytest
from eval_stand_in import StandInPolicy, toy_suite

from cli.compare import table
from cli.main import main
from common.errors import UsageError
from evals.compare import compare
from evals.gate import apply_gate, parse_gate
from evals.run import evaluate


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("gate")
    suite = toy_suite(36)
    for name, error in (("a", 0.0), ("b", 0.5)):
        policy = StandInPolicy(suite.records, error)
        evaluate(policy, suite, place / name, seeds=2, weights=name)
    return place / "a", place / "b"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("geneval.overall < -0.01", ("geneval.overall", "<", -0.01)),
        ("toy-scenes.two_object.low<=-1e-3", ("toy-scenes.two_object.low", "<=", -0.001)),
        ("prompt-file/my v1.2.overall >= .5", ("prompt-file/my v1.2.overall", ">=", 0.5)),
    ],
)
def test_conditions_are_read(text: str, parts: tuple) -> None:
    gate = parse_gate(text)
    assert (gate.target, gate.relation, gate.threshold) == parts


def test_names_of_suites_and_tasks_may_have_dots_and_spaces() -> None:
    named = COMPARISON | {"suite": "prompt-file/my v1.2", "tasks": {"v1.low": entry(mean=0.3)}}
    for text, value in (
        ("prompt-file/my v1.2.overall.high > 1", 0.01),
        ("prompt-file/my v1.2.v1.low > 1", 0.3),
        ("prompt-file/my v1.2.v1.low.low > 1", -0.05),
    ):
        assert apply_gate(parse_gate(text), named).value == value


@pytest.mark.parametrize(
    "text", ["", "overall < 1", "s.overall = 1", "s.overall < x", "s.o < 1..2"]
)
def test_other_text_is_no_condition(text: str) -> None:
    with pytest.raises(UsageError, match="not a condition"):
        parse_gate(text)


def test_results_of_another_suite_are_told_with_the_whole_rest_of_the_condition() -> None:
    with pytest.raises(UsageError, match=r"write toy\.overall\.high\."):
        apply_gate(parse_gate("geneval.overall.high < 0"), COMPARISON | {"suite": "toy"})


def entry(**numbers: float | None) -> dict:
    known = {"mean": -0.02, "low": -0.05, "high": 0.01, "p_adjusted": 0.2, "before": 0.5}
    return known | {"after": 0.48} | numbers


COMPARISON = {
    "suite": "s",
    "overall": entry(),
    "tasks": {"colors": entry(low=None, high=None)},
    "others": {"soft": entry(mean=0.1)},
    "layout_diversity": None,
    "not_scored": {},
}


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("s.overall < -0.01", True),
        ("s.overall < -0.02", False),
        ("s.overall <= -0.02", True),
        ("s.overall.low < -0.04", True),
        ("s.overall.high < 0", False),
        ("s.overall.after < 0.5", True),
        ("s.soft > 0.05", True),
        ("s.colors < -0.01", True),
        # What is not known cannot pass.
        ("s.colors.low < -1", True),
        ("s.layout_diversity < -1", True),
    ],
)
def test_conditions_are_applied(text: str, failed: bool) -> None:
    assert apply_gate(parse_gate(text), COMPARISON).failed == failed


def test_a_condition_on_something_else_is_wrong_use() -> None:
    with pytest.raises(UsageError, match=r"write s\.overall"):
        apply_gate(parse_gate("geneval.overall < 0"), COMPARISON)
    with pytest.raises(UsageError, match="write colors"):
        apply_gate(parse_gate("s.color < 0"), COMPARISON)


def test_a_failed_gate_ends_with_1_and_the_reason(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *map(str, folders), "--fail-if", "toy-scenes.overall < -0.01"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "toy-scenes.overall.mean is -0." in captured.err
    assert "< -0.01" in captured.err
    assert main([*words[:3], "--fail-if", "toy-scenes.overall > 0.01"]) == 0
    assert "passed: toy-scenes.overall.mean is -0." in capsys.readouterr().out
    assert main([*words[:3], "--fail-if", "nonsense"]) == 2


def test_json_has_difference_interval_p_and_detectable_effect_per_task(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *map(str, folders), "--json", "--fail-if", "toy-scenes.overall < -0.01"]
    assert main(words) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["schema"] == "atelier.comparison/1"
    assert len(found["tasks"]) == 6
    numbers = {"mean", "low", "high", "p_value", "p_adjusted", "minimum_detectable"}
    for part in [found["overall"], *found["tasks"].values()]:
        assert numbers <= part.keys()
    [gate] = found["gates"]
    assert gate["failed"]
    assert gate["value"] == found["overall"]["mean"]


def test_the_table_fits_80_columns_and_says_what_differs(folders: tuple[Path, Path]) -> None:
    comparison = compare(*folders)
    comparison["settings_that_differ"] = {"temperature": [1.0, 0.7]}
    lines = table(comparison)
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("overall"))
    overall = comparison["overall"]
    for number in (f"{overall['mean']:+.3f}", f"{overall['low']:+.3f}", overall["verdict"]):
        assert number in row
    assert "sampled differently: temperature 1.0 -> 0.7" in lines
