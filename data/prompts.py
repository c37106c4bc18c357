"""Prompt records for training: from the scene world or from a JSONL file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.scenes import TASKS, scene_prompts

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
        raise DataError(f"{path}: no such file.\n    Fix: correct prompts.source in the recipe.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            records.append(_record(path, number, line))
    if tasks is not None:
        records = [r for r in records if r["metadata"].get("tag") in tasks]
    if not records:
        raise DataError(f"{path}: no prompts are left.\n    Fix: check prompts.tasks and the file.")
    return records


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
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
