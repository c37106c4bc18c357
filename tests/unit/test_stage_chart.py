"""The Gantt chart of a step: bars where the stages were at work, and the page that shows them."""

import json
import re
from pathlib import Path

import pytest

from evals.report import build_report
from evals.run_state import read_run
from evals.stage_chart import stage_chart, step_seconds

STAGES = [
    ["sync", 0, 0.0, 0.5],
    ["rollout", 0, 0.5, 2.5],
    ["render", 0, 2.5, 5.5],
    ["rollout", 1, 2.5, 4.5],
    ["render", 1, 5.5, 8.5],
    ["update", 0, 8.5, 10.0],
]
"""10 s of which two waves overlap for 2 s."""


def row(step: int, slower: float = 1.0) -> dict:
    stages = [[stage, wave, slower * a, slower * b] for stage, wave, a, b in STAGES]
    seconds = {"sync": 0.5, "rollout": 4.0, "render": 6.0, "update": 1.5}
    return {"step": step, "reward": 0.5, "stages": stages, "seconds": seconds}


def test_the_step_of_median_time_is_drawn():
    chart = stage_chart([{"step": 1, "reward": 0.1}, row(2, 50.0), row(3), row(4, 0.5)])
    assert chart is not None
    assert (chart.step, chart.seconds, chart.waves) == (3, 10.0, 2)
    assert chart.overlap == pytest.approx(1.2)
    bars = {stage.name: stage.bars for stage in chart.rows}
    assert bars == {
        "sync": [(0.0, 5.0)],
        "rollout": [(5.0, 20.0), (25.0, 20.0)],
        "render": [(25.0, 30.0), (55.0, 30.0)],
        "update": [(85.0, 15.0)],
    }
    assert len({stage.css for stage in chart.rows}) == 4
    assert chart.workers == []


def test_workers_have_rows_of_their_own_that_count_for_no_stage():
    busy = [["decode 0", 2.5, 5.0], ["decode 1", 3.0, 5.5], ["decode 0", 5.5, 8.5]]
    chart = stage_chart([row(1) | {"workers": busy}])
    assert chart is not None
    assert [stage.name for stage in chart.rows] == ["sync", "rollout", "render", "update"]
    assert chart.overlap == pytest.approx(1.2)
    bars = {worker.name: (worker.bars, worker.seconds) for worker in chart.workers}
    assert bars == {
        "decode 0": ([(25.0, 25.0), (55.0, 30.0)], 5.5),
        "decode 1": ([(30.0, 25.0)], 2.5),
    }


def test_a_step_takes_the_time_that_passed_not_the_sum_of_its_stages():
    assert step_seconds(row(1)) == 10.0
    assert step_seconds({"seconds": {"rollout": 1.5, "update": 2.0}}) == 3.5
    assert stage_chart([{"step": 1, "reward": 0.1, "seconds": {"rollout": 1.5}}]) is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [json.dumps(row(step)) + "\n" for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text("extends: geneval-scenes\n")
    return folder


def test_watching_tells_the_time_that_passes(run):
    assert read_run(run, now=0).step_seconds == 10.0


def test_the_report_shows_the_chart(run, tmp_path):
    page = build_report([], tmp_path / "out", run).read_text()
    [caption] = re.findall(r"When each stage of step \d+ was at work: [^<]*", page)
    assert "10.0 s" in caption
    assert "2 waves, 1.20 stages at a time" in caption
    assert '<rect class="c1" x="25.0%" y="3" width="20.0%" height="14"/>' in page
