"""The folder of saved rollouts: where a step's samples are, and whether a recipe can use them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import RunError
from recipes.schema_grpo import GrpoRecipe


def samples_file(folder: Path, step: int, process: int) -> Path:
    """Return the file that is written last of those of a step and a process."""
    return folder / f"step-{step:06d}-{process}" / "samples.json"


def refuse_used(folder: Path) -> None:
    """Raise RunError if a folder to save to holds rollouts of an earlier run."""
    if any(folder.glob("step-*")):
        raise RunError(
            f"{folder} holds saved rollouts already.\n    Fix: give --save-rollouts a new folder."
        )


def check_saved(folder: Path, recipe: GrpoRecipe, processes: int) -> None:
    """Raise RunError unless `folder` has rollouts of all steps, sampled as the recipe says.

    They must come from as many training processes as there are now.
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
    first = _first(folder)
    if not first.keys() >= {"processes", "sampling", "policy_lag"}:
        raise RunError(
            f"the rollouts of {folder} do not say how they were sampled: an earlier version saved "
            "them.\n    Fix: save them anew."
        )
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


def check_judges(folder: Path, rewards: Sequence[str]) -> None:
    """Raise RunError unless the rollouts were judged by the rewards of these names."""
    judges = _first(folder)["samples"][0]["score"]["parts"]
    if judges.keys() != set(rewards):
        raise RunError(
            f"rewards.functions: the rollouts of {folder} were judged by {', '.join(judges)}, and "
            f"the recipe has {', '.join(rewards)}.\n    Fix: replay with the rewards that judged."
        )


def _first(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(samples_file(folder, 0, 0).read_text(encoding="utf-8"))
    return saved
