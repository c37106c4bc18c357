"""How many prompts a difference needs: the plan against the statistics it plans for."""

import math
from pathlib import Path

import pytest
from eval_stand_in import StandInPolicy, toy_suite

from cli.main import main
from cli.power import lines
from common.errors import RunError
from common.statistics import Components, paired_difference
from evals.compare import compare
from evals.power import ASSUMED, pilot_components, plan, task_sizes
from evals.results import load_results
from evals.run import evaluate
from evals.suites.geneval import TASK_SIZES


def test_detectable_effect_of_one_task_by_the_normal_formula() -> None:
    found = plan({"a": 10**6}, seeds=4, components={"a": Components(0.05, 0.25)})
    # (1.959964 + 0.841621) * sqrt((0.05 + 0.25 / 4) / 1e6)
    expected = 2.801585 * math.sqrt(0.1125e-6)
    assert found.detectable == pytest.approx(expected, rel=1e-4)
    assert found.tasks["a"].detectable == pytest.approx(expected, rel=1e-4)
    assert found.prompts_needed(expected) == pytest.approx(10**6, rel=1e-3)


def test_the_mean_over_tasks_has_the_error_of_a_stratified_mean() -> None:
    parts = {"a": Components(0.04, 0.2), "b": Components(0.01, 0.1)}
    found = plan({"a": 40, "b": 160}, seeds=2, components=parts)
    error = math.sqrt((0.04 + 0.1) / 40 + (0.01 + 0.05) / 160) / 2
    assert found.spread / math.sqrt(200) == pytest.approx(error)
    assert found.prompts_needed_in("a", 0.1) > found.prompts_needed_in("b", 0.1)


def test_more_pictures_help_only_within_prompts() -> None:
    needed = [plan(TASK_SIZES, seeds).prompts_needed(0.05) for seeds in (1, 4, 10**6)]
    assert needed[0] > needed[1] > needed[2]
    without_noise = dict.fromkeys(TASK_SIZES, Components(ASSUMED.between, 0))
    assert needed[2] == plan(TASK_SIZES, 1, without_noise).prompts_needed(0.05)


def test_a_pilot_gives_the_detectable_effect_of_its_own_comparison(tmp_path: Path) -> None:
    """From a pilot, the plan for the pilot's own size is what `compare` computes directly."""
    suite = toy_suite(60)
    for name, error in (("a", 0.7), ("b", 0.3)):
        evaluate(StandInPolicy(suite.records, error), suite, tmp_path / name, seeds=4, weights=name)
    before, after = load_results(tmp_path / "a"), load_results(tmp_path / "b")
    sizes = {task: facts["prompts"] for task, facts in after.results["tasks"].items()}
    found = plan(sizes, 4, pilot_components(before, after))
    compared = compare(before, after)
    for task, facts in compared["tasks"].items():
        # Where the variance between prompts is estimated as 0 the plan is a little wider.
        assert found.tasks[task].detectable >= facts["minimum_detectable"] - 1e-5
    direct = compared["overall"]["minimum_detectable"]
    assert direct - 1e-5 <= found.detectable <= 1.3 * direct


def test_a_pilot_of_one_picture_per_prompt_says_nothing(tmp_path: Path) -> None:
    suite = toy_suite(6)
    for name in ("a", "b"):
        evaluate(StandInPolicy(suite.records, 0.5), suite, tmp_path / name, seeds=1, weights=name)
    with pytest.raises(RunError, match="too small for a pilot"):
        pilot_components(load_results(tmp_path / "a"), load_results(tmp_path / "b"))


def test_geneval_is_known_without_its_file_and_other_suites_are_counted() -> None:
    assert sum(task_sizes("geneval", {}).values()) == 553
    sizes = task_sizes("geneval-scenes", {})
    assert sizes["position"] == 12  # 24 prompts, each beside its mirror
    assert ASSUMED.cluster_variance(4) == pytest.approx(0.1125)


def test_the_verb_fits_80_columns_and_names_its_assumption(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["power", "--suite", "geneval"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "assumed" in shown
    assert "553 independent prompts x 4 pictures" in shown
    assert main(["power", "--suite", "geneval", "--difference", "0.02", "--seeds", "8"]) == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("overall"))
    needed = int(row.split()[-1].replace(",", ""))
    assert needed == plan(TASK_SIZES, 8).prompts_needed(0.02)


def test_a_task_that_did_not_vary_or_needs_more_than_a_rate_has_shows_no_number() -> None:
    parts = {"still": Components(0.0, 0.0), "wild": Components(0.6, 0.6)}
    found = plan({"still": 12, "wild": 5}, 4, parts)
    # (2.776445 + 0.940965) * sqrt((0.6 + 0.6 / 4) / 5) is 1.44: no rate differs by that
    assert found.tasks["still"].detectable is None
    assert found.tasks["wild"].detectable is None
    marks = plan({"wild": 5}, 4, parts, rates=False)
    assert marks.tasks["wild"].detectable == pytest.approx(1.4397, rel=1e-4)
    still = next(row for row in lines("toy", found, [0.05, 0.1]) if row.startswith("still"))
    assert still.split() == ["still", "12", "-", "-", "-"]


def test_the_plan_is_for_the_test_that_is_used() -> None:
    """The minimum detectable effect of `paired_difference` is the plan's for the same spread."""
    change = [0.5, -0.5] * 50
    found = paired_difference([0.0] * 100, change, list(range(100)), resamples=50)
    spread = math.sqrt(100 / 99 * 0.25)
    planned = plan({"a": 100}, 1, {"a": Components(0.0, spread**2)})
    assert planned.detectable == pytest.approx(found.minimum_detectable, rel=1e-6)
