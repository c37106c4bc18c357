"""Which evaluation a result folder belongs to, and which pictures its neighbours have already."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.atomic import write_text
from common.errors import RunError
from common.lock import LOCK
from common.progress import Progress
from evals.results import (
    IMAGES,
    SETTINGS,
    Sample,
    append_samples,
    differences_of,
    finished_samples,
    read_records,
    unscored,
)
from evals.suites import Suite

_HOW_MANY = ("limit", "seeds", "prompts")
"""Which pictures an evaluation makes, not how: a picture's seed depends on its prompt and index."""


def claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder this evaluation's; RunError if it is another's, naming what differs."""
    file = out / SETTINGS
    if not file.exists():
        if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
            raise RunError(
                f"{out} holds other files.\n    Fix: give --out a new or an empty folder."
            )
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(identity, indent=2) + "\n")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(
            f"{file} is damaged ({error}).\n    Fix: give --out a new folder."
        ) from error
    if differing := differences_of(before, identity):
        raise RunError(
            f"{out} holds another evaluation: {'; '.join(differing)}.\n"
            "    Fix: give --out another folder."
        )


def take_over(
    out: Path,
    identity: Mapping[str, Any],
    missing: set[tuple[str, int]],
    suite: Suite,
    progress: Progress,
) -> dict[tuple[str, int], Sample]:
    """Copy missing pictures (prompt id, index) from the folders beside `out`; return their rows.

    Taken are those of the same policy, suite and settings whose whole prompt record is the same,
    however many prompts and seeds the other evaluation has and whether or not it was finished, and
    which have a score.
    """
    own = read_records(out)
    wanted, found = set(missing), dict[tuple[str, int], Sample]()
    for file in sorted(out.parent.glob(f"*/{SETTINGS}")):
        other = file.parent
        if not wanted or other == out:
            continue
        try:
            if _making(json.loads(file.read_text(encoding="utf-8"))) != _making(identity):
                continue
            records, samples = read_records(other), finished_samples(other)
        except (ValueError, OSError, RunError) as error:
            progress.line(f"passed over {other}: {error}")
            continue
        rows = {
            key: row
            for key, row in samples.items()
            if key in wanted and records.get(key[0]) == own[key[0]] and not unscored(row, suite)
        }
        for row in rows.values():
            shutil.copyfile(other / row["image"], out / row["image"])
        append_samples(out, list(rows.values()))
        if rows:
            progress.line(f"took {len(rows)} pictures of the same policy and prompts from {other}")
        found |= rows
        wanted -= rows.keys()
    return found


def _making(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in _HOW_MANY}
