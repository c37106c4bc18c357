"""When each stage of a training step was at work, as a Gantt chart that a template can draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageRow:
    """One stage: its colour's class, bars as (left, width) in per cent, and its seconds of work."""

    name: str
    css: str
    bars: list[tuple[float, float]]
    seconds: float


@dataclass(frozen=True)
class StageChart:
    """A step of a run; `overlap` is the stages' work over the time it took (1: no overlap).

    `workers` are rows of the same kind, one for each worker on Ray that did some of that work.
    """

    step: int
    seconds: float
    waves: int
    overlap: float
    rows: list[StageRow]
    workers: list[StageRow]


def step_seconds(row: Mapping[str, Any]) -> float:
    """Return how long a step of metrics.jsonl took; its stages may have worked side by side."""
    if row.get("stages"):
        return float(max(end for *_, end in row["stages"]))
    return float(sum(row["seconds"].values()))


def stage_chart(steps: Sequence[Mapping[str, Any]]) -> StageChart | None:
    """Return the chart of the step that took the median time; None if no step tells its stages."""
    told = sorted((row for row in steps if row.get("stages")), key=step_seconds)
    if not told:
        return None
    row = told[len(told) // 2]
    whole = step_seconds(row) or 1.0
    stages = [(stage, start, end) for stage, _, start, end in row["stages"]]
    rows = _rows(stages, whole)
    waves = 1 + max(wave for _, wave, *_ in row["stages"])
    overlap = sum(stage.seconds for stage in rows) / whole
    workers = _rows(row.get("workers", []), whole)
    return StageChart(int(row["step"]), step_seconds(row), waves, overlap, rows, workers)


def _rows(busy: Sequence[tuple[str, float, float]], whole: float) -> list[StageRow]:
    """Return a row for each name, in the order in which they were first at work."""
    rows = []
    for index, name in enumerate(dict.fromkeys(name for name, *_ in busy)):
        spans = [(start, end) for other, start, end in busy if other == name]
        bars = [
            (round(100 * start / whole, 2), round(100 * (end - start) / whole, 2))
            for start, end in spans
        ]
        rows.append(StageRow(name, f"c{index % 6}", bars, sum(end - start for start, end in spans)))
    return rows
