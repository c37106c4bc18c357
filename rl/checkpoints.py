"""Checkpoints of a run: written whole or not at all, verified before they are used."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.atomic import full_disk_named, sync_folder, write_text
from common.errors import RunError
from common.processes import process_count
from common.progress import Progress

if TYPE_CHECKING:
    from transformers import Trainer

MANIFEST = "manifest.json"


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def publish(staged: Path, checkpoints: Path, step: int, keep_last: int) -> Path:
    """Move a finished checkpoint from its staging folder into `checkpoints` and drop old ones.

    The manifest with every file's sha256 is written and flushed first, then one rename makes the
    checkpoint visible, so a kill at any moment leaves the older ones usable.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sums = {str(path.relative_to(staged)): _sha256(path) for path in files}
    facts = {"step": step, "processes": process_count(), "sha256": sums}
    write_text(staged / MANIFEST, json.dumps(facts, indent=2))
    checkpoints.mkdir(parents=True, exist_ok=True)
    target = checkpoints / checkpoint_name(step)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)
    sync_folder(checkpoints)
    for old in _folders(checkpoints)[:-keep_last]:
        shutil.rmtree(old)
    return target


@contextmanager
def published(trainer: "Trainer", checkpoints: Path, keep_last: int) -> Iterator[None]:
    """Let all processes of a trainer write a checkpoint in the block, and publish it whole."""
    own, staging = trainer.args.output_dir, checkpoints / ".staging"
    main, wait = trainer.accelerator.is_main_process, trainer.accelerator.wait_for_everyone
    if main:
        shutil.rmtree(staging, ignore_errors=True)
    wait()
    checkpoints.mkdir(parents=True, exist_ok=True)
    trainer.args.output_dir = str(staging)
    try:
        with full_disk_named(checkpoints):
            yield
    finally:
        trainer.args.output_dir = own
    wait()
    if main:
        step = trainer.state.global_step
        publish(staging / f"checkpoint-{step}", checkpoints, step, keep_last)
        shutil.rmtree(staging)
    wait()


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files match its manifest, and what was passed over.

    None if no checkpoint was ever written. Raises RunError if there are some and all are damaged.
    """
    passed_over: list[str] = []
    for folder in reversed(_folders(checkpoints)):
        fault = _fault(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder}: {fault}")
    if not passed_over:
        return None, []
    reasons = "".join(f"\n    {line}" for line in passed_over)
    raise RunError(
        f"{checkpoints} holds no usable checkpoint:{reasons}\n"
        "    Fix: start the run anew with `atelier train` and another --out."
    )


def checkpoint_to_resume(run_dir: Path, progress: Progress) -> Path | None:
    """Return the newest whole checkpoint of an unfinished run, and tell what was passed over.

    None: there is none yet, and the run starts anew. Raises RunError for a finished run.
    """
    if (run_dir / "policy").exists():
        raise RunError(
            f"{run_dir} is finished: its policy is {run_dir / 'policy'}.\n"
            "    Fix: to train longer, start a run with that policy.path and another --out."
        )
    checkpoint, passed_over = newest_valid(run_dir / "checkpoints")
    for line in passed_over:
        progress.line(f"passed over {line}")
    progress.line(f"resuming from {checkpoint or 'the start: there is no checkpoint yet'}")
    return checkpoint


def refuse_other_processes(checkpoint: Path) -> None:
    """Raise RunError unless this run has as many processes as the one that wrote the checkpoint."""
    ours = process_count()
    theirs = json.loads((checkpoint / MANIFEST).read_text()).get("processes", ours)
    if theirs != ours:
        raise RunError(
            f"{checkpoint} was written by {theirs} training processes, and now there are {ours}.\n"
            f"    Fix: resume with {theirs}, as the run began."
        )


def step_of(folder: Path) -> int:
    """Return the step a checkpoint was written at."""
    return int(folder.name.removeprefix("step-"))


def _fault(folder: Path) -> str | None:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "the manifest is missing"
    try:
        sums = json.loads(manifest.read_text())["sha256"]
        expected_files = dict(sums)
    except (ValueError, KeyError, TypeError):
        return "the manifest cannot be read"
    for name, expected in expected_files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} is damaged (its sha256 differs from the manifest)"
    return None


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    folders = (p for p in checkpoints.iterdir() if p.is_dir() and p.name.startswith("step-"))
    return sorted(folders, key=step_of)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
