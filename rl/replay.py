"""Rollouts on disk: a run saves its own, another learns from them without sampling anything.

A step's samples are a folder, `step-000000-0` (step, process): `samples.json` with prompts and
scores, `tokens.safetensors`, and the pictures for the eye. Replayed with the recipe that saved
them, a run's updates are the same to the last bit.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.atomic import write_text
from common.errors import RunError
from rewards.runner import Scored
from rl.rollouts import Rollout

_TENSORS = ("completion_ids", "behaviour_logprobs", "logprobs")


def refuse_used(folder: Path) -> None:
    """Raise RunError if a folder to save to holds rollouts of an earlier run."""
    if any(folder.glob("step-*")):
        raise RunError(
            f"{folder} holds saved rollouts already.\n    Fix: give --save-rollouts a new folder."
        )


def check_saved(folder: Path, steps: int) -> None:
    """Raise RunError unless `folder` holds the rollouts of the steps 0 to `steps` - 1."""
    there = 0
    while _samples(folder, there, 0).is_file():
        there += 1
    if there < steps:
        fix = f"set train.steps={there}" if there else "give the folder of --save-rollouts"
        raise RunError(
            f"{folder} holds the rollouts of {there} steps in a row, and the recipe has {steps}.\n"
            f"    Fix: {fix}."
        )


def save_rollout(
    folder: Path, rollout: Rollout, prompts: Sequence[str], step: int, process: int
) -> None:
    """Write a step's samples; `samples.json` comes last, so a torn write is no rollout."""
    file = _samples(folder, step, process)
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(rollout.images):
        image.save(file.parent / "images" / f"{number:04d}.png")
    tensors = {name: getattr(rollout, name).cpu().contiguous() for name in _TENSORS}
    save_file(tensors, file.parent / "tokens.safetensors")
    samples = [
        {"prompt": prompt, "prompt_ids": ids, "score": dataclasses.asdict(scored)}
        for prompt, ids, scored in zip(prompts, rollout.prompt_ids, rollout.scores, strict=True)
    ]
    # What a reward tells beyond its scores may be anything; it is kept as text.
    write_text(file, json.dumps(samples, ensure_ascii=False, default=str))


def load_rollout(
    folder: Path, prompts: Sequence[str], step: int, process: int, device: torch.device
) -> Rollout:
    """Read a step's samples, without pictures. `prompts` are those the run would sample for.

    Raises RunError where there are none, or those of other prompts.
    """
    file = _samples(folder, step, process)
    if not file.is_file():
        raise RunError(
            f"{folder} has no rollouts of step {step}, process {process}.\n"
            "    Fix: replay with the number of processes that saved them."
        )
    samples = json.loads(file.read_text(encoding="utf-8"))
    if [sample["prompt"] for sample in samples] != list(prompts):
        raise RunError(
            f"{file} holds samples of other prompts than this recipe draws.\n"
            "    Fix: replay with prompts, seed and group size of the run that saved it."
        )
    tensors = load_file(file.parent / "tokens.safetensors")
    return Rollout(
        [sample["prompt_ids"] for sample in samples],
        tensors["completion_ids"],
        tensors["behaviour_logprobs"],
        tensors["logprobs"].to(device),
        [],
        [Scored(**sample["score"]) for sample in samples],
        [],
    )


def _samples(folder: Path, step: int, process: int) -> Path:
    return folder / f"step-{step:06d}-{process}" / "samples.json"
