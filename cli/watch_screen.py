"""What `atelier watch` shows: one frame for a terminal, one line for a pipe."""

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.chart import Point, line_chart, sparkline
from cli.console import duration, facts_text
from evals.alarms import headline
from evals.stage_chart import step_seconds

if TYPE_CHECKING:
    from evals.run_state import RunState

_NOT_SHOWN = (
    "step", "reward", "lr", "missing_rewards", "importance_ratio_mean", "standard_error"
)  # fmt: skip
_FIRST = ("strict", "extra_objects", "reward_std", "kl", "entropy", "clip_fraction", "grad_norm")
"""Numbers of a step that are shown before any others."""
_MOST_SAMPLES = 3
_SMALLEST_CHART, _LARGEST_CHART = 4, 14
_PHASES = {"running": "green", "finished": "bold green", "starting": "", "quiet": "bold red"}


def frame(state: "RunState", width: int, height: int) -> RenderableType:
    """Return the screen for a terminal of that size; the chart takes what height is left.

    Alarms come first: a terminal that is too low loses its last lines.
    """
    head: list[RenderableType] = [_head(state, width), *map(_alarm, state.alarms.values())]
    columns = (width - 3) // 2
    series = _series(state, columns, 6 if height < 30 else 9)
    stages = _stages(state, columns)
    below: list[RenderableType] = []
    if series or stages:
        table = Table.grid(padding=(0, 3, 0, 0))
        table.add_row(Group(*series), Group(*stages))
        below += [Text(), table]
    notes = [*_tasks(state, width), *_samples(state)]
    if notes:
        below += [Text(), *notes]
    alarm_lines = sum(1 + (2 + len(text)) // width for text in state.alarms.values())
    taken = 1 + alarm_lines + max(len(series), len(stages)) + len(notes) + 2
    room = height - 4 - taken  # the legend, the axis, an empty line, the prompt's line
    chart = _chart(state, width, min(max(room, _SMALLEST_CHART), _LARGEST_CHART))
    return Group(*head, *chart, *below)


def step_line(state: "RunState", row: Mapping[str, Any]) -> str:
    """Return one step as a plain line."""
    names = ("reward", "reward_std", "strict", "extra_objects")
    facts = {key: row[key] for key in names if key in row} or _numbers(row)
    parts = [f"step {row['step']}/{state.total}", facts_text(facts)]
    if row.get("seconds"):
        seconds = step_seconds(row)
        parts.append(f"{seconds:.1f}s")
        if left := state.total - row["step"]:
            parts.append(f"eta {duration(left * (state.step_seconds or seconds))}")
    return "  ".join(part for part in parts if part)


def held_out_line(row: Mapping[str, Any]) -> str:
    """Return an evaluation on held-out prompts as a plain line."""
    return f"held-out at step {row['step']}  {facts_text(_numbers(row))}"


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in row.items()
        if key not in _NOT_SHOWN and isinstance(value, int | float)
    }


def _head(state: "RunState", width: int) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    name, room = str(state.run_dir), max(16, width - 52)
    text.append(name if len(name) <= room else f"…{name[1 - room :]}", style="bold")
    text.append(f"  {state.phase}", style=_PHASES[state.phase])
    text.append(f"  step {state.step}/{state.total}")
    if (seconds := state.step_seconds) is not None:
        text.append(f"  {seconds:.1f}s a step")
        if state.phase == "running":
            text.append(f"  {duration((state.total - state.step) * seconds)} left")
    if state.phase == "running" and state.steps:
        text.append(f"  ({duration(state.silent_seconds)} ago)", style="dim")
    return text


def _chart(state: "RunState", width: int, height: int) -> list[Text]:
    key = "reward" if state.series("reward") else next(iter(_shown(state)), None)
    points = [
        (float(r["step"]), float(r[key])) for r in state.steps if key and r.get(key) is not None
    ]
    name = headline(state.held_out[-1]) if state.held_out else None
    dots = [
        (float(row["step"]), float(row[name]))
        for row in state.held_out
        if name and row.get(name) is not None
    ]
    if not points and not dots:
        return [Text(), Text("no step yet", style="dim")]
    legend = Text(no_wrap=True, overflow="ellipsis")
    if points:
        legend.append(f"{key} {points[0][1]:.3f} to {points[-1][1]:.3f}", style="bold")
    if dots:
        legend.append("   ")
        legend.append(f"● held-out {name} {dots[0][1]:.3f} to {dots[-1][1]:.3f}", style="magenta")
    return [Text(), legend, *line_chart(_smooth(points), dots, width, height, "magenta")]


def _smooth(points: list[Point]) -> list[Point]:
    """A running mean over about a twentieth of the run, centred, so that the trend is seen."""
    half = len(points) // 40
    return [
        (x, fmean(y for _, y in points[max(0, i - half) : i + half + 1]))
        for i, (x, _) in enumerate(points)
    ]


def _shown(state: "RunState") -> list[str]:
    """Names of the numbers that change, the telling ones first."""
    known = dict.fromkeys(key for row in state.steps[-20:] for key in _numbers(row))
    names = [*(name for name in _FIRST if name in known), *(n for n in known if n not in _FIRST)]
    return [name for name in names if len(set(state.series(name))) > 1]


def _series(state: "RunState", width: int, most: int) -> list[Text]:
    names = _shown(state)[:most]
    label = max(map(len, names), default=0)
    lines = []
    for name in names:
        values = state.series(name)
        line = Text(f"{name:<{label}} ", no_wrap=True, overflow="crop")
        line.append(f"{values[-1]:>8.3g} ", style="bold")
        line.append(sparkline(values, max(4, width - label - 10)), style="dim")
        lines.append(line)
    return lines


def _stages(state: "RunState", width: int) -> list[Text]:
    stages = state.stages
    total = sum(stages.values()) or 1.0
    label = max(map(len, stages), default=0)
    lines = []
    for name, seconds in stages.items():
        line = Text(f"{name:<{label}} ", no_wrap=True, overflow="crop")
        line.append(f"{seconds:>6.2f}s {seconds / total:>4.0%} ", style="bold")
        line.append("█" * round(max(0, width - label - 14) * seconds / total), style="dim")
        lines.append(line)
    return lines


def _tasks(state: "RunState", width: int) -> list[Text]:
    """The newest evaluation's tasks."""
    if not state.held_out or not state.held_out[-1].get("per_task"):
        return []
    newest = state.held_out[-1]
    lines = [Text(f"held-out at step {newest['step']}")]
    for task, value in newest["per_task"].items():
        if lines[-1].cell_len + len(task) + 7 > width:
            lines.append(Text())
        lines[-1].append(f"  {task} ")
        lines[-1].append(f"{value:.2f}", style="bold")
    return lines


def _samples(state: "RunState") -> list[Text]:
    """The newest step's samples, where the run wrote some into its row."""
    samples = state.steps[-1].get("samples", []) if state.steps else []
    lines = []
    for sample in samples[:_MOST_SAMPLES]:
        reward = sample["reward"]
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append("unscored" if reward is None else f"{reward:>+8.3f}", style="bold")
        line.append(f"  {_one_line(sample['prompt'])}")
        if sample.get("reason"):
            line.append(f"  {_one_line(sample['reason'])}", style="dim")
        lines.append(line)
    return lines


def _one_line(text: str) -> str:
    """Text from outside on one line, without characters that would steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text.replace("\n", "; "))


def _alarm(text: str) -> Text:
    line = Text("! ", style="bold red")
    line.append(text, style="not bold default")
    return line
