"""What a run's metrics.jsonl says about training, as numbers that a template can draw."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunError
from common.journal import read_journal
from evals.alarms import headline, parted
from evals.recipe_diff import settings_of
from evals.stage_chart import StageChart, stage_chart, step_seconds

SMALL_CHARTS = {
    "reward_std": "Spread of the reward",
    "kl": "KL to the reference",
    "extra_objects": "Extra objects per picture",
    "zero_variance_groups": "Groups without a signal",
    "clip_fraction": "Clipped tokens",
    "grad_norm": "Gradient norm",
}

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its name, CSS class and SVG points "x,y x,y" in per cent of the plot, y downward."""

    name: str
    css: str
    points: str
    dots: bool = False


@dataclass(frozen=True)
class LineChart:
    """A chart ready to be drawn; ticks are (position in per cent, label)."""

    title: str
    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Training:
    """The training part of a report."""

    name: str
    """The run folder's name."""
    steps: int
    reward: LineChart
    sentence: str
    small: list[LineChart]
    stages: list[tuple[str, float, float]]
    """Stage, mean seconds a step, share of the step in per cent."""
    step: StageChart | None
    """When each stage of a usual step was at work."""
    seconds: float
    """Seconds of all steps together, held-out evaluations and waiting left out."""
    device_hours: list[tuple[str, float]]
    """ "GPU-hours on NAME" or "CPU-hours on NAME" (hours of a process), and how many of them.

    Empty where a step was made before the run wrote its devices.
    """
    recipe: str | None


def load_training(run_dir: Path) -> Training:
    """Read `run_dir`/metrics.jsonl (and recipe.yaml if there is one).

    Raises RunError if there is no training row.
    """
    rows = read_journal(run_dir / "metrics.jsonl")
    steps = [row for row in rows if "event" not in row and row.get("reward") is not None]
    held_out = [row for row in rows if row.get("event") == "eval"]
    if not steps:
        raise RunError(
            f"{run_dir / 'metrics.jsonl'} has no training step yet.\n"
            "    Fix: train first, or leave --run out."
        )
    file = run_dir / "recipe.yaml"
    recipe = file.read_text(encoding="utf-8") if file.is_file() else None
    replay = (settings_of(recipe) or {}).get("rollout.replay", "null")
    whose = "training" if replay == "null" else "replayed rollouts'"
    reward = _points(steps, "reward")
    metric = headline(held_out[-1]) if held_out else None
    evaluated = _points(held_out, metric) if metric else []
    lines = {"reward, each step": ("raw", reward, False)}
    lines["reward, running mean"] = ("s1", _running_mean(reward, max(1, len(reward) // 12)), False)
    if evaluated:
        lines[f"held-out, {metric}"] = ("s2", evaluated, True)
    small = [
        line_chart(title, {title: ("s1", points, False)})
        for key, title in SMALL_CHARTS.items()
        if len(points := _points(steps, key)) > 1
    ]
    return Training(
        name=run_dir.resolve().name,
        steps=len(steps),
        reward=line_chart("Reward in training and score on held-out prompts", lines),
        sentence=_sentence(
            whose, [y for _, y in reward], [y for _, y in evaluated], steps, held_out
        ),
        small=small,
        stages=_stages(steps),
        step=stage_chart(steps),
        seconds=sum(step_seconds(row) for row in steps if row.get("seconds")),
        device_hours=_device_hours(rows),
        recipe=recipe,
    )


def _device_hours(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    hours: dict[str, float] = {}
    device, count = "", 0.0
    for row in rows:
        if row.get("event") == "devices":
            device, count = f"{row['kind']}-hours on {row['device']}", float(row["count"])
        elif "event" not in row and row.get("seconds"):
            if not device:
                return []  # a sum without the first steps would pass for that of the run
            hours[device] = hours.get(device, 0.0) + count * step_seconds(row) / 3600
    return list(hours.items())


def line_chart(title: str, lines: Mapping[str, tuple[str, Sequence[Point], bool]]) -> LineChart:
    """Scale lines, given as name -> (css, points, dots), to a common plot with readable ticks."""
    everything = [point for _, points, _ in lines.values() for point in points]
    x_ticks = nice_ticks(min(x for x, _ in everything), max(x for x, _ in everything))
    y_ticks = nice_ticks(min(y for _, y in everything), max(y for _, y in everything))
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    bottom = min(y_ticks[0], min(y for _, y in everything))
    top = max(y_ticks[-1], max(y for _, y in everything))

    def across(x: float) -> float:
        return round(100 * (x - left) / ((right - left) or 1), 2)

    def down(y: float) -> float:
        return round(100 - 100 * (y - bottom) / ((top - bottom) or 1), 2)

    return LineChart(
        title,
        [
            Series(name, css, " ".join(f"{across(x)},{down(y)}" for x, y in points), dots)
            for name, (css, points, dots) in lines.items()
        ],
        [(across(x), f"{x:g}") for x in x_ticks if left <= x <= right],
        [(down(y), f"{y:g}") for y in y_ticks],
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers (1, 2, 2.5, 5 times a power of ten) around the range."""
    span = (high - low) or (abs(high) or 1.0)
    rough = span / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return [(float(r["step"]), float(r[key])) for r in rows if r.get(key) is not None]


def _running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean of the last `window` values; fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    ends = np.arange(1, len(points) + 1)
    starts = np.maximum(0, ends - window)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def _sentence(
    whose: str,
    reward: Sequence[float],
    held_out: Sequence[float],
    steps: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """Say in words what the two curves do, and warn where they part by more than chance."""
    tenth = max(1, len(reward) // 10)
    first, last = float(np.mean(reward[:tenth])), float(np.mean(reward[-tenth:]))
    text = f"The {whose} reward went from {first:.3f} to {last:.3f} (first and last tenth)"
    if len(held_out) < 2:
        return f"{text}; the run made fewer than two held-out evaluations."
    text += f", the held-out score from {held_out[0]:.3f} to {held_out[-1]:.3f}."
    if warning := parted(steps, rows):
        text += f" They part ways: {warning}."
    return text


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    timed = [row["seconds"] for row in rows if row.get("seconds")]
    names = list(dict.fromkeys(name for seconds in timed for name in seconds))
    means = {name: sum(s.get(name, 0.0) for s in timed) / len(timed) for name in names}
    total = sum(means.values())
    return [(name, mean, 100 * mean / total) for name, mean in means.items() if mean > 0]
