"""Where a training run stands, read from its folder alone: the run does not know it is watched."""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from common.errors import UsageError
from common.journal import read_journal
from evals.alarms import alarms
from evals.stage_chart import step_seconds
from recipes import load_recipe

QUIET_STEPS, QUIET_SECONDS = 10, 120.0
"""A run without news for that many steps' time, and at least that long, is said to be quiet."""
_RECENT = 20

Phase = Literal["starting", "running", "quiet", "finished"]
Row = dict[str, Any]


@dataclass(frozen=True)
class RunState:
    """A run at one moment. `steps` and `held_out` are the rows of its metrics.jsonl."""

    run_dir: Path
    name: str
    kind: str
    total: int
    """Steps that the recipe asks for."""
    phase: Phase
    steps: list[Row]
    held_out: list[Row]
    silent_seconds: float
    """Since the last row was written."""
    alarms: dict[str, str]
    """A sentence for each kind of thing that looks wrong."""

    @property
    def step(self) -> int:
        """The newest step; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of a recent step, where the run tells the time of its stages."""
        whole = [step_seconds(row) for row in self._timed()]
        return median(whole) if whole else None

    @property
    def stages(self) -> dict[str, float]:
        """Mean seconds of each stage over the recent steps."""
        timed = self._timed()
        names = dict.fromkeys(name for row in timed for name in row["seconds"])
        return {
            name: sum(row["seconds"].get(name, 0.0) for row in timed) / len(timed) for name in names
        }

    def series(self, key: str) -> list[float]:
        """Return the values of one number over the steps that have it."""
        return [float(row[key]) for row in self.steps if row.get(key) is not None]

    def _timed(self) -> list[Row]:
        return [row for row in self.steps if row.get("seconds")][-_RECENT:]


def read_run(run_dir: Path, now: float) -> RunState:
    """Read a run's folder at the time `now` (seconds since 1970).

    Raises UsageError if it is not a run, RunError if its journal is damaged.
    """
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        what = "holds no recipe.yaml" if run_dir.is_dir() else "is not a folder"
        raise UsageError(
            f"{run_dir} is not a run: it {what}.\n"
            "    Fix: give the folder that `atelier train` made, such as runs/NAME."
        )
    recipe = load_recipe(file).recipe
    journal = run_dir / "metrics.jsonl"
    rows = read_journal(journal)
    steps = [row for row in rows if "event" not in row]
    held_out = [row for row in rows if row.get("event") == "eval"]
    silent = max(0.0, now - (journal if journal.exists() else file).stat().st_mtime)
    finished = (run_dir / "policy" / "policy.json").is_file()
    groups, kept, rounded = None, 1.0, False
    if recipe.kind == "grpo":
        groups = recipe.rollout.prompts_per_step
        kept = 0.0 if recipe.rollout.top_k else recipe.rollout.top_p
        rounded = recipe.rollout.rounds_cache
    state = RunState(
        run_dir,
        recipe.name,
        recipe.kind,
        recipe.train.steps,
        "starting",
        steps,
        held_out,
        silent,
        alarms(steps, held_out, groups, kept, rounded),
    )
    return _with_phase(state, finished)


def _with_phase(state: RunState, finished: bool) -> RunState:
    if finished:
        return replace(state, phase="finished")
    limit = max(QUIET_SECONDS, QUIET_STEPS * (state.step_seconds or 0.0))
    if state.silent_seconds > limit:
        text = f"no news for {state.silent_seconds / 60:.0f} min"
        advice = f"if it was stopped, go on with `atelier resume {state.run_dir}`"
        return replace(state, phase="quiet", alarms={"quiet": f"{text}: {advice}", **state.alarms})
    return replace(state, phase="running" if state.steps else "starting")
