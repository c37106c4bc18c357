"""What would stop a run, found before anything is loaded; `atelier check` asks the same."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from common.errors import RunError
from recipes import Recipe
from recipes.schema_grpo import GrpoRecipe
from rl.saved_rollouts import check_judges, check_saved

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages of which one is needed, where the tracker is not called as its package."""


def check_trackers(recipe: Recipe) -> None:
    """Raise RunError unless every tracker of the recipe is installed."""
    for tracker in recipe.log.trackers:
        if not any(find_spec(package) for package in _TRACKERS.get(tracker, (tracker,))):
            raise RunError(
                f"log.trackers: {tracker} is not installed.\n"
                f"    Fix: pip install {tracker}, or leave it out of log.trackers."
            )


def check_replay(recipe: GrpoRecipe, processes: int) -> None:
    """Raise RunError unless the rollouts to replay, if any, are there and fit the recipe."""
    if recipe.rollout.replay:
        check_saved(Path(recipe.rollout.replay), recipe, processes)


def check_replayed_rewards(recipe: GrpoRecipe, rewards: Sequence[str]) -> None:
    """Raise RunError unless rewards of these names judged the rollouts to replay, if any."""
    if recipe.rollout.replay:
        check_judges(Path(recipe.rollout.replay), rewards)


def check_whole_batch(recipe: GrpoRecipe, whole_batch: Sequence[str], processes: int) -> None:
    """Raise RunError if a reward that compares a whole step's pictures would get a part of them.

    `whole_batch` are the names of such rewards (`RewardRunner.whole_batch`).
    """
    in_parts = {
        "rollout.waves": (recipe.rollout.waves, 1, "set rollout.waves to 1"),
        "decode.check.every": (recipe.decode.check.every, 0, "set decode.check.every to 0"),
        "the number of training processes": (processes, 1, "start one process"),
    }
    for what, (value, off, fix) in in_parts.items():
        if value != off and whole_batch:
            raise RunError(
                f"{what} is {value}, and the reward `{whole_batch[0]}` compares the "
                f"pictures of a whole step.\n    Fix: {fix}."
            )
