"""Checkpoint saving and resuming: what the proof of wholeness costs.

    python -m benchmarks.checkpoint [--turns 5]

Model and AdamW state of the shipped language model, written and read by the libraries alone,
against the same with checksums, flush to disk, publication by one rename, and verification before
the resume. Wall time, because most of it is the disk's.
"""

import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.timing import Ratio, main, take_turns
from policy import Policy, base_path
from rl.checkpoints import newest_valid, publish


def ratios(turns: int) -> list[Ratio]:
    """Return the ratios of saving and of resuming."""
    policy = Policy.from_pretrained(base_path())
    optimizer = torch.optim.AdamW(policy.ar.parameters())
    for parameter in policy.ar.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(policy.ar.state_dict(), folder / "model.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    def read(folder: Path) -> None:
        policy.ar.load_state_dict(load_file(folder / "model.safetensors"))
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    with tempfile.TemporaryDirectory() as name:
        plain, staged, kept = (Path(name) / part for part in ("plain", "staged", "kept"))

        def save_plain() -> None:
            shutil.rmtree(plain, ignore_errors=True)
            write(plain)

        def save_ours() -> None:
            write(staged)
            publish(staged, kept, 1, 2)

        def resume_ours() -> None:
            newest, _ = newest_valid(kept)
            assert newest is not None
            read(newest)

        saving = take_turns({"plain": save_plain, "ours": save_ours}, turns, time.perf_counter)
        resuming = take_turns(
            {"plain": lambda: read(plain), "ours": resume_ours}, turns, time.perf_counter
        )
    return [
        saving.ratio("checkpoint saved: without proof", "plain", "ours"),
        resuming.ratio("checkpoint resumed: without proof", "plain", "ours"),
    ]


if __name__ == "__main__":
    main(ratios, __doc__)
