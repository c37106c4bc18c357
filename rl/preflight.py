"""What would stop a run, found before anything is loaded; `atelier check` asks the same."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from common.errors import RecipeError, RunError
from common.registry import nearest
from policy.anatomy import Anatomy
from policy.tiling import check_tile, pixels_per_cell
from recipes.schema_common import LoraSection
from recipes.schema_grpo import GrpoRecipe
from recipes.schema_pretrain import PretrainRecipe
from rl.saved_rollouts import check_judges, check_saved, refuse_used

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages of which one is needed, where the tracker is not called as its package."""


def check_installed(recipe: GrpoRecipe | PretrainRecipe) -> None:
    """Raise RunError unless the recipe's trackers are there, and a compiler if it wants one."""
    for tracker in recipe.log.trackers:
        if not any(find_spec(package) for package in _TRACKERS.get(tracker, (tracker,))):
            raise RunError(
                f"log.trackers: {tracker} is not installed.\n"
                f"    Fix: pip install {tracker}, or leave it out of log.trackers."
            )
    if isinstance(recipe, GrpoRecipe):
        key, asked = "decode.compile", recipe.decode.compile
    else:
        key, asked = "train.compile", recipe.train.compile
    compiler = os.environ.get("CXX", "g++")  # torch's choice
    if asked and which(compiler) is None:
        raise RunError(
            f"{key} needs a C++ compiler, and there is no {compiler}.\n"
            f"    Fix: install it, or set {key}=false."
        )


def check_launch(deepspeed: str | None) -> None:
    """Raise RunError if DeepSpeed is wanted and no launcher has told the process its place."""
    if deepspeed and "RANK" not in os.environ:
        raise RunError(
            f"train.deepspeed: {deepspeed} needs a launcher, for a single process too.\n"
            "    Fix: start with torchrun --nproc_per_node 1 -m cli, or set train.deepspeed=null."
        )


def check_targets(lora: LoraSection | None, anatomy: Anatomy) -> None:
    """Raise RecipeError for an adapter's target that the language model lacks."""
    names = [name.split(".") for name in anatomy.parts["ar"].shapes if ".layers." in name]
    known = dict.fromkeys(name[-2] for name in names if name[-2].endswith("_proj"))
    for target in lora.targets if lora else ():
        if target not in known:
            close = nearest(target, known)
            fix = f"did you mean `{close}`?" if close else f"known: {', '.join(known)}."
            raise RecipeError(
                f"policy.lora.targets: the model's layers have no linear map `{target}`.\n"
                f"    Fix: {fix}"
            )


def check_tiles(recipe: GrpoRecipe, latent_size: int, vae_config: Mapping[str, Any]) -> None:
    """Raise RecipeError for tiles in which the policy's autoencoder cannot decode its pictures."""
    ratio = pixels_per_cell(vae_config)
    for name, section in (("train", recipe.decode.train), ("eval", recipe.decode.eval)):
        if section.tile is not None:
            check_tile(f"decode.{name}.tile", section.tile, latent_size, ratio)


def check_context(context: int, taken: int) -> None:
    """Raise RecipeError unless a sequence has room beside what template and pictures take."""
    if taken >= context:
        raise RecipeError(
            f"data.context is {context}, but template and image tokens take {taken} already.\n"
            "    Fix: raise data.context."
        )


def check_save_to(recipe: GrpoRecipe) -> None:
    """Raise RunError if the folder to save rollouts to, if any, cannot be made or is in use."""
    if recipe.rollout.save_to:
        refuse_used(Path(recipe.rollout.save_to))


def check_replay(recipe: GrpoRecipe, processes: int) -> None:
    """Raise RunError unless the rollouts to replay, if any, are there and fit the recipe."""
    if recipe.rollout.replay:
        check_saved(Path(recipe.rollout.replay), recipe, processes)


def check_replayed_rewards(recipe: GrpoRecipe, rewards: Sequence[str]) -> None:
    """Raise RunError unless rewards of these names judged the rollouts to replay, if any."""
    if recipe.rollout.replay:
        check_judges(Path(recipe.rollout.replay), rewards, recipe.train.steps)


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
