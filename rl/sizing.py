"""Whether a run fits, and the one change that makes it fit."""

from collections.abc import Iterator
from dataclasses import replace

from policy.anatomy import Anatomy
from recipes.schema_common import LoraSection
from recipes.schema_grpo import GrpoRecipe
from rl.memory import Memory, Sharding, grpo_memory, worker_memory

GPUS = {"H100": 81_559 * 2**20, "H200": 143_771 * 2**20}
"""Bytes of the 80 GB and the 141 GB model, as their driver reports them."""
PEAK_FLOPS = 989e12
"""Dense bfloat16 operations a second of both, by their data sheets."""
USABLE = 0.9
"""Share of the memory that a plan may fill: the rest is for what it does not count."""
LIBRARIES = 10**9
"""Bytes of Python and the libraries of a run, which count where the memory is the machine's."""
SHARDINGS = (Sharding(), Sharding(8, 1), Sharding(8, 2), Sharding(32, 1), Sharding(32, 2))
"""What GRPO supports: it samples from the weights that it trains, which ZeRO-3 would divide."""


def fits(memory: Memory, capacity: int) -> bool:
    """Whether a peak leaves a tenth of `capacity` bytes free."""
    return memory.peak <= USABLE * capacity


def spread_over(recipe: GrpoRecipe, gpus: int) -> GrpoRecipe:
    """Return the recipe as several processes run it: with transformers, and without workers."""
    if gpus == 1:
        return recipe
    for section, key, value in (
        ("rollout", "engine", "transformers"), ("rollout", "workers", 0), ("decode", "workers", 0)
    ):  # fmt: skip
        recipe = _changed(recipe, section, key, value)
    return recipe


def with_training(recipe: GrpoRecipe, *, lora: bool) -> GrpoRecipe:
    """Return the recipe with adapters (its own, or the default ones) or with full training."""
    adapters = (recipe.policy.lora or LoraSection()) if lora else None
    return _changed(recipe, "policy", "lora", adapters)


def memory_on(recipe: GrpoRecipe, anatomy: Anatomy, gpu: bool) -> Memory:
    """Return what a device holds of a run: the trainer, and on a machine without GPU the workers.

    Those of a cluster that the run joins are elsewhere.
    """
    memory = grpo_memory(recipe, anatomy)
    if gpu or recipe.rollout.ray.address:
        return memory
    counts = {"rollout": recipe.rollout.workers, "decode": recipe.decode.workers}
    workers = {
        f"{section} workers": counts[section] * (one.peak + LIBRARIES)
        for section, one in worker_memory(recipe, anatomy).items()
    }
    return replace(memory, resident=memory.resident | workers)


def change_that_fits(
    recipe: GrpoRecipe, anatomy: Anatomy, capacity: int, gpu: bool = True
) -> tuple[str, Memory] | None:
    """Return the first change with which one device is enough, and what it needs.

    One value, in this order: a smaller micro-batch (the largest that fits; it costs nothing but
    time), where workers take the same memory fewer of them (the most that fit; if one kind is not
    enough, as few as there can be of both, which are two values), half the width of the numbers, no
    second copy of the weights for vLLM, adapters. None: none of them is enough.
    """
    images = recipe.rollout.group_size * recipe.rollout.prompts_per_step
    micro = recipe.train.micro_batch or images
    smaller = [size for size in range(micro - 1, 0, -1) if images % size == 0]
    changes = [
        (f"train.micro_batch={size}", _changed(recipe, "train", "micro_batch", size))
        for size in smaller
    ]
    if not gpu:
        changes += _fewer_workers(recipe)
    if recipe.policy.dtype == "float32":
        changed = _changed(recipe, "policy", "dtype", "bfloat16")
        changes.append(("policy.dtype=bfloat16", changed))
    if recipe.rollout.engine == "vllm" and not recipe.rollout.workers:
        changed = _changed(recipe, "rollout", "engine", "transformers")
        changes.append(("rollout.engine=transformers", changed))
    if recipe.policy.lora is None:
        changes.append(("policy.lora={}", with_training(recipe, lora=True)))
    for text, changed in changes:
        memory = memory_on(changed, anatomy, gpu)
        if fits(memory, capacity):
            return text, memory
    return None


def _fewer_workers(recipe: GrpoRecipe) -> Iterator[tuple[str, GrpoRecipe]]:
    # One is left where the recipe would be refused without rollout workers.
    least = int(bool(recipe.rollout.max_policy_lag or recipe.rollout.transfer))
    for section, fewest in (("rollout", least), ("decode", 0)):
        for count in range(getattr(recipe, section).workers - 1, fewest - 1, -1):
            yield f"{section}.workers={count}", _changed(recipe, section, "workers", count)
    if recipe.rollout.workers and recipe.decode.workers:
        changed = _changed(_changed(recipe, "rollout", "workers", least), "decode", "workers", 0)
        yield f"rollout.workers={least} decode.workers=0", changed


def _changed(recipe: GrpoRecipe, section: str, key: str, value: object) -> GrpoRecipe:
    part = getattr(recipe, section).model_copy(update={key: value})
    return recipe.model_copy(update={section: part})
