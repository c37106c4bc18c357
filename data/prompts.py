"""Prompt records for training: from the scene world or from a JSONL file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from common.seeds import counter_seed
from data.scenes import TASKS, scene_prompts
from recipes.schema_grpo import GrpoRecipe

GENEVAL_TASKS = tuple(task for task in TASKS if task != "text")


def training_records(
    source: str, split: str, tasks: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return all prompt records of a source: `prompt`, `prompt_id`, `metadata`, further columns.

    `source` is "scenes" or a .jsonl file with one object a line that has at least `prompt`; a
    GenEval metadata line (tag, include, prompt) is taken as it is. Raises DataError naming file
    and line.
    """
    if source == "scenes":
        return scene_prompts(split, tuple(tasks or GENEVAL_TASKS), n=100_000)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file.\n    Fix: correct the path (`prompts.source` in a recipe)."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}.\n    Fix: make it a UTF-8 text file.") from error
    records = []
    # Not splitlines(): a JSON text may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(_record(path, number, line))
    if not records:
        raise DataError(f"{path}: no prompts.\n    Fix: give it one JSON object a line.")
    if tasks is None:
        return records
    found = {record["metadata"].get("tag") for record in records}
    for task in tasks:
        if task not in found:
            there = ", ".join(sorted(str(tag) for tag in found if tag)) or "none"
            raise DataError(
                f"prompts.tasks.{task}: no record of {path} has this tag (it has {there}).\n"
                "    Fix: take the task out of the recipe, or add prompts of it."
            )
    return [record for record in records if record["metadata"].get("tag") in tasks]


def draw_records(
    source: str,
    split: str,
    tasks: Mapping[str, float] | None,
    *,
    steps: int,
    per_step: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the records of every step in order, `per_step` each; a step's draw has its own seed.

    With `tasks`, a task is drawn by its weight and then one of its records. Without, the scene
    world's tasks are drawn alike, and of a file every record is as likely as every other.
    """
    wanted = None if tasks is None else [task for task, weight in tasks.items() if weight > 0]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for record in training_records(source, split, wanted):
        alike = tasks is None and source != "scenes"
        by_task.setdefault("" if alike else record["metadata"]["tag"], []).append(record)
    weights = tasks or dict.fromkeys(by_task, 1.0)
    names = list(by_task)
    shares = np.array([weights[name] for name in names], dtype=float)
    chosen = []
    for step in range(steps):
        rng = np.random.default_rng(counter_seed(seed, "prompts", step))
        for task in rng.choice(names, size=per_step, p=shares / shares.sum()):
            records = by_task[str(task)]
            chosen.append(records[int(rng.integers(len(records)))])
    return chosen


def records_of_run(recipe: GrpoRecipe) -> list[dict[str, Any]]:
    """Return the records that a run draws, `rollout.prompts_per_step` for each of its steps."""
    return draw_records(
        recipe.prompts.source,
        recipe.prompts.split,
        recipe.prompts.tasks,
        steps=recipe.train.steps,
        per_step=recipe.rollout.prompts_per_step,
        seed=recipe.seed,
    )


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}).\n    Fix: one object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise DataError(f'{where}: no prompt.\n    Fix: give each line a text under "prompt".')
    metadata = row.get("metadata", {k: v for k, v in row.items() if k != "prompt_id"})
    if not isinstance(metadata, dict):
        raise DataError(f'{where}: "metadata" is not an object.\n    Fix: write it as {{...}}.')
    return {
        **row,
        "prompt_id": str(row.get("prompt_id", f"{path.stem}-{number:06d}")),
        "metadata": metadata,
    }
