"""The demo's choice of a temperature and its result line, also where something has no score."""

from pathlib import Path
from typing import Any

import pytest

from cli import demo
from common.errors import RunError
from common.progress import SilentProgress
from data.scenes import scene_prompts

ENTRY = {"before": 0.25, "after": 0.5, "mean": 0.25, "low": 0.125, "high": 0.375}


@pytest.mark.parametrize(
    ("overall", "said"),
    [
        (ENTRY, "base=0.25 trained=0.50 delta=+0.25 ci95=[+0.12, +0.38] prompts=92 images=8"),
        (ENTRY | {"low": None, "high": None}, "delta=+0.25 ci95=none prompts=92 images=8"),
        (None, "base=none trained=none delta=none ci95=none prompts=92 images=8"),
    ],
)
def test_the_result_line_without_an_interval_or_a_score(overall: Any, said: str) -> None:
    line = demo.result_line("R", {"overall": overall, "prompts": 92, "pairs": 4})
    assert line.endswith(said)


def chosen(monkeypatch, folder: Path, scores: dict[float, float | None]) -> tuple[float, Any]:
    suites = []

    def evaluate(policy: Any, suite: Any, out: Path, *, temperature: float, **_: Any) -> Any:
        suites.append(suite)
        mean = scores[temperature]
        return {"overall": {suite.headline: None if mean is None else {"mean": mean}}}

    monkeypatch.setattr("evals.run.evaluate", evaluate)
    return demo.best_temperature(object(), "base", folder, SilentProgress()), suites[0]  # type: ignore[arg-type]


def test_temperatures_without_a_score_are_left_out(monkeypatch, tmp_path: Path) -> None:
    best, _ = chosen(monkeypatch, tmp_path, {1.0: 0.2, 0.7: 0.6, 0.4: None})
    assert best == 0.7
    with pytest.raises(RunError, match="no temperature has a score"):
        chosen(monkeypatch, tmp_path, dict.fromkeys(demo.TEMPERATURES))


def test_temperatures_are_chosen_on_prompts_that_are_not_evaluated(
    monkeypatch, tmp_path: Path
) -> None:
    _, tune = chosen(monkeypatch, tmp_path, dict.fromkeys(demo.TEMPERATURES, 0.5))
    tasks = tuple({record["metadata"]["tag"] for record in tune.records} | {"single_object"})
    evaluated = {record["prompt"] for record in scene_prompts("held_out", tasks)}
    assert len(tune.records) == demo.TUNE_PROMPTS
    assert not evaluated & {record["prompt"] for record in tune.records}
