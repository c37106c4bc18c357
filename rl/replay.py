"""Rollouts on disk: a run saves its own, another learns from them without sampling anything.

A step's samples are a folder, `step-000000-0` (step, process): `samples.json` with prompts, scores
and how they were sampled, `tokens.safetensors`, and the pictures for the eye. Replayed with the
recipe that saved them, a run's updates are the same to the last bit.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from common.atomic import write_text
from common.processes import process_count
from policy.sampling import Sampling
from rewards.composition import Composition
from rewards.runner import Scored
from rl.rollouts import Rollout
from rl.saved_rollouts import read_samples, samples_file, tokens_checksum, tokens_file

_TENSORS = ("completion_ids", "behaviour_logprobs", "logprobs")


def save_rollout(
    folder: Path,
    rollout: Rollout,
    prompts: Sequence[str],
    sampling: Sampling,
    step: int,
    process: int,
    policy_lag: int | None = None,
) -> None:
    """Write a step's samples; `samples.json` comes last, so a torn write is no rollout."""
    file = samples_file(folder, step, process)
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(rollout.images):
        image.save(file.parent / "images" / f"{number:04d}.png")
    tensors = {name: getattr(rollout, name).cpu().contiguous() for name in _TENSORS}
    tokens = save(tensors)
    tokens_file(folder, step, process).write_bytes(tokens)
    samples = [
        {"prompt": prompt, "prompt_ids": ids, "score": dataclasses.asdict(scored)}
        for prompt, ids, scored in zip(prompts, rollout.prompt_ids, rollout.scores, strict=True)
    ]
    # What a reward tells beyond its scores may be anything; it is kept as text.
    facts = {
        "step": step,
        "process": process,
        "tokens_sha256": tokens_checksum(tokens, rollout.prompt_ids),
        "processes": process_count(),
        "sampling": dataclasses.asdict(sampling),
        "policy_lag": policy_lag,
        "samples": samples,
    }
    write_text(file, json.dumps(facts, ensure_ascii=False, default=str))


def load_rollout(
    folder: Path,
    prompts: Sequence[str],
    composition: Composition,
    step: int,
    process: int,
    device: torch.device,
) -> tuple[Rollout, int | None]:
    """Read a step's samples, without pictures, and their policy lag.

    `prompts` are those the run would sample for. What the saved scores count is worked out anew,
    by the weights, ranges and gates of this run. Raises RunError where samples are missing,
    damaged, or of other prompts.
    """
    facts = read_samples(folder, step, process, prompts)
    samples = facts["samples"]
    tensors = load_file(tokens_file(folder, step, process))
    rollout = Rollout(
        [sample["prompt_ids"] for sample in samples],
        tensors["completion_ids"],
        tensors["behaviour_logprobs"],
        tensors["logprobs"].to(device),
        [],
        [_composed(sample["score"], composition, step) for sample in samples],
        [],
    )
    return rollout, facts["policy_lag"]


def _composed(saved: dict[str, Any], composition: Composition, step: int) -> Scored:
    parts = saved["parts"]
    counted = composition.counted(parts, step)
    total = composition.total(counted, step)
    return Scored(total, parts, saved.get("reasons", {}), saved.get("details", {}), counted)
