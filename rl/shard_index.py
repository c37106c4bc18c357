"""The index of a run's shards, made once and kept in the run's folder."""

import json
from pathlib import Path

import numpy as np

from common.atomic import write_text
from common.errors import DataError, RunError
from common.progress import Progress
from data.shards import Index, build_index, find_shards

LARGEST_BAD_SHARE = 0.01


def shard_index(pattern: str, references: bool, run_dir: Path, progress: Progress) -> Index:
    """Return the index of the shards that `pattern` means.

    The first call reads all headers and writes `shards.npy` and `shards.json` into the run's
    folder; later ones, also of other processes and of a resumed run, read these. Raises DataError
    if a shard is missing or more than 1 % of the samples are not whole, RunError if a shard has
    changed since.
    """
    rows_file, facts_file = run_dir / "shards.npy", run_dir / "shards.json"
    if not facts_file.is_file():
        paths = find_shards(pattern)
        progress.start("index", len(paths))
        index = build_index(paths, references, lambda: progress.advance("index"))
        progress.finish("index")
        _judge(index)
        run_dir.mkdir(parents=True, exist_ok=True)
        np.save(rows_file, index.rows)
        facts = {
            "shards": [[str(path), path.stat().st_size] for path in index.paths],
            "faults": index.faults,
        }
        write_text(facts_file, json.dumps(facts, indent=1))
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    for name, size in facts["shards"]:
        if not Path(name).is_file() or Path(name).stat().st_size != size:
            raise RunError(
                f"{name} is missing or has changed since the run began, and the order of its "
                "samples with it.\n    Fix: bring the shard back, or start a new run; "
                "`export_policy` (docs/training.md) makes a checkpoint the policy.path of one."
            )
    # Mapped, not read: all processes of a machine share one copy.
    rows = np.load(rows_file, mmap_mode="r")
    return Index(tuple(Path(name) for name, _ in facts["shards"]), rows, tuple(facts["faults"]))


def _judge(index: Index) -> None:
    bad, samples = len(index.faults), len(index.rows) + len(index.faults)
    if bad > LARGEST_BAD_SHARE * samples and bad > 1:
        told = "".join(f"\n    {fault}" for fault in index.faults[:5])
        raise DataError(
            f"{bad} of the {samples} samples in the shards are not whole, more than "
            f"{LARGEST_BAD_SHARE:.0%}.{told}\n    Fix: repair the shards or pack them again."
        )
