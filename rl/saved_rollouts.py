"""The folder of saved rollouts: where a step's samples are, and whether a recipe can use them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from common.errors import RunError
from data.prompts import records_of_run
from recipes.schema_grpo import GrpoRecipe
from rewards.outcomes import LARGEST

_SAMPLING = {"temperature", "top_k", "top_p"}
"""The fields of `policy.sampling.Sampling`, which imports torch."""


def samples_file(folder: Path, step: int, process: int) -> Path:
    """Return the file that is written last of those of a step and a process."""
    return folder / f"step-{step:06d}-{process}" / "samples.json"


def tokens_file(folder: Path, step: int, process: int) -> Path:
    """Return the file of the tensors that stands beside it."""
    return samples_file(folder, step, process).with_name("tokens.safetensors")


def tokens_checksum(tensors: bytes, prompt_ids: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of a step's tokens: those that were drawn, and those of its prompts."""
    return sha256(tensors + json.dumps(prompt_ids).encode()).hexdigest()


def refuse_used(folder: Path) -> None:
    """Raise RunError if a folder to save to cannot be written or holds an earlier run's rollouts.

    Nothing is left there.
    """
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise RunError(
            f"rollout.save_to: rollouts cannot be saved to {folder}: {error.strerror}.\n"
            "    Fix: give --save-rollouts a new folder where you may write."
        ) from error
    if any(folder.glob("step-*")):
        raise RunError(
            f"{folder} holds saved rollouts already.\n    Fix: give --save-rollouts a new folder."
        )


def read_samples(folder: Path, step: int, process: int, prompts: Sequence[str]) -> dict[str, Any]:
    """Return what a step's `samples.json` holds, and see that its tensors are there in full.

    Raises RunError where one of the two files is missing or damaged, of another step or process, or
    of an earlier version, and where the samples are not of these prompts.
    """
    saved = _read(folder, step, process)
    with _refused(samples_file(folder, step, process)):
        drawn = [sample["prompt"] for sample in saved["samples"]]
        prompt_ids = [sample["prompt_ids"] for sample in saved["samples"]]
    with _refused(tokens_file(folder, step, process)) as file:
        if tokens_checksum(file.read_bytes(), prompt_ids) != saved["tokens_sha256"]:
            raise ValueError("its tokens, or the prompt_ids in samples.json, are not those saved")
    if drawn != list(prompts):
        raise RunError(
            f"{folder} holds samples of other prompts than this recipe draws (step {step}).\n"
            "    Fix: replay with prompts, seed and group size of the run that saved them."
        )
    return saved


def check_saved(folder: Path, recipe: GrpoRecipe, processes: int) -> None:
    """Raise RunError unless `folder` has rollouts of all steps, sampled as the recipe says.

    They must be of the prompts that it draws, from as many training processes as there are now.
    """
    steps, there = recipe.train.steps, 0
    while samples_file(folder, there, 0).is_file():
        there += 1
    if there < steps:
        fix = f"set train.steps={there}" if there else "give the folder of --save-rollouts"
        raise RunError(
            f"{folder} holds the rollouts of {there} steps in a row, and the recipe has {steps}.\n"
            f"    Fix: {fix}."
        )
    first = _read(folder)
    with _refused(samples_file(folder, 0, 0)):
        for key, value in first["sampling"].items():
            if (ours := getattr(recipe.rollout, key)) != value:
                raise RunError(
                    f"rollout.{key} is {ours:g}, and the rollouts of {folder} were sampled with "
                    f"{value:g}.\n    Fix: rollout.{key}={value:g}"
                )
    if (saved := first["processes"]) != processes:
        raise RunError(
            f"the rollouts of {folder} were saved by {saved} training processes, and this run has "
            f"{processes}.\n    Fix: start {saved}."
        )
    # A step's samples are divided among the processes in order.
    prompts = [
        r["prompt"] for r in records_of_run(recipe) for _ in range(recipe.rollout.group_size)
    ]
    share = len(prompts) // (steps * processes)
    for i in range(steps * processes):
        place = divmod(i, processes)
        facts = read_samples(folder, *place, prompts[i * share : (i + 1) * share])
        with _refused(samples_file(folder, *place)):
            for key in ("sampling", "processes"):
                if facts[key] != first[key]:
                    raise ValueError(f"its `{key}` is not that of the first step")


def check_judges(folder: Path, rewards: Sequence[str], steps: int) -> None:
    """Raise RunError unless each sample has a score, or null, of each reward of these names."""
    processes = _read(folder)["processes"]
    for i in range(steps * processes):
        place = divmod(i, processes)
        with _refused(samples_file(folder, *place)) as file:
            for number, sample in enumerate(_read(folder, *place)["samples"]):
                score = sample["score"]
                parts = score["parts"]
                if parts.keys() != set(rewards):
                    raise RunError(
                        f"rewards.functions: by {file}, sample {number} was judged by "
                        f"{', '.join(parts) or 'none'}, and the recipe has {', '.join(rewards)}.\n"
                        "    Fix: replay with the rewards that judged; in a file that was edited, "
                        "write a number or null for each of them."
                    )
                for name, value in parts.items():
                    if value is not None and not _usable(value):
                        raise ValueError(
                            f"the score {value!r:.40} of `{name}` for sample {number} is neither a "
                            f"number of at most {LARGEST:g} nor null"
                        )
                reasons, details = score.get("reasons", {}), score.get("details", {})
                if not all(isinstance(reason, str) for reason in reasons.values()):
                    raise ValueError(f"sample {number} has a reason that is no text")
                if not isinstance(details, dict):
                    raise ValueError(f"the details of sample {number} are no mapping")


def _usable(score: Any) -> bool:
    """Whether a reward might have given this score."""
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= LARGEST


def _read(folder: Path, step: int = 0, process: int = 0) -> dict[str, Any]:
    with _refused(samples_file(folder, step, process)) as file:
        saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or "samples" not in saved:
            raise ValueError("it does not hold the samples of a step")
        facts = {"step", "process", "processes", "sampling", "policy_lag", "tokens_sha256"}
        if not saved.keys() >= facts:
            raise RunError(
                f"the rollouts of {folder} do not say all that a replay needs: an earlier "
                "version saved them.\n    Fix: save them anew."
            )
        if (saved["step"], saved["process"]) != (step, process):
            raise ValueError(f"it is of step {saved['step']}, process {saved['process']}")
        if not isinstance(saved["sampling"], dict) or saved["sampling"].keys() != _SAMPLING:
            raise ValueError(f"its `sampling` does not hold {', '.join(sorted(_SAMPLING))} alone")
        if type(saved["processes"]) is not int or saved["processes"] < 1:
            raise ValueError(f"its `processes` is {saved['processes']!r:.40}, no number of them")
    return saved


@contextmanager
def _refused(file: Path) -> Iterator[Path]:
    """Turn what reading a missing or damaged file raises into a RunError."""
    try:
        yield file
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise RunError(
            f"{file} cannot be used: {why}\n    Fix: copy the saved rollouts again, or save anew."
        ) from error
