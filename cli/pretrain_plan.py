"""The plan of a pretraining, fine-tuning or editing run: its facts, and how they look."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy.anatomy import Anatomy
    from recipes.schema_pretrain import PretrainRecipe

GPU_COUNTS = (1, 8, 32)


def plan_pretrain(recipe: "PretrainRecipe") -> dict[str, Any]:
    """Return what `--json` prints. Sizes are bytes, work is floating-point operations."""
    from cli.policy_folder import find_anatomy
    from rl.preflight import check_targets
    from rl.pretrain_cost import as_trained, pretrain_flops, trained_values

    # New weights have the sizes of the shipped policy.
    anatomy = as_trained(recipe, find_anatomy(recipe.policy.path or "base"))
    check_targets(recipe.policy.lora, anatomy)
    work = dict(pretrain_flops(recipe, anatomy))
    facts = {
        "name": recipe.name,
        "kind": recipe.kind,
        "sizes": anatomy.source,
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size,
        "source": recipe.data.source,
        "parameters": anatomy.parameters,
        "trained": trained_values(recipe, anatomy),
        "lora": recipe.policy.lora is not None,
        "flops_per_picture": work,
        "flops_per_step": sum(work.values()) * recipe.train.batch_size,
        "assumed": {"prompt_tokens": anatomy.prompt_tokens},
    }
    return facts | _memory(recipe, anatomy)


def _memory(recipe: "PretrainRecipe", anatomy: "Anatomy") -> dict[str, Any]:
    from cli.plan_parts import device_of, memory_row, option, verdict_on
    from rl.memory import Sharding
    from rl.pretrain_cost import (
        batch_that_divides,
        change_that_fits,
        checkpoint_bytes,
        pictures_per_pass,
        pretrain_memory,
    )

    device = device_of(recipe.policy.device)
    stage = int((recipe.train.deepspeed or "zero0").removeprefix("zero"))
    rows, options = [], []
    for gpus in GPU_COUNTS if device.is_gpu else (1,):
        sharding = Sharding(gpus, stage)
        batch, micro = batch_that_divides(recipe, gpus), pictures_per_pass(recipe, gpus)
        needs = [f"train.batch_size={batch}"] if batch != recipe.train.batch_size else []
        if recipe.train.micro_batch not in (None, micro):
            needs.append(f"train.micro_batch={micro}")
        row = memory_row(pretrain_memory(recipe, anatomy, sharding), sharding)
        rows.append(row | {"micro_batch": micro, "needs": needs})
    for gpus in GPU_COUNTS if device.is_gpu else ():
        for other in range(4):
            sharding = Sharding(gpus, other)
            options.append(option(pretrain_memory(recipe, anatomy, sharding), sharding))
    alone = Sharding(1, stage)
    return {
        "memory": rows,
        "options": options,
        "verdict": verdict_on(
            device,
            pretrain_memory(recipe, anatomy, alone),
            lambda room: change_that_fits(recipe, anatomy, alone, room),
        ),
        "checkpoint_bytes": checkpoint_bytes(recipe, anatomy, stage),
    }


def show_pretrain(facts: dict[str, Any]) -> None:
    """Print the facts, at most 80 columns wide unless a name is longer."""
    from cli import console
    from cli.plan_parts import show_flops, show_memory, show_steps, show_verdict

    console.say(f"{facts['name']} ({facts['kind']})", style="bold")
    console.say(f"sizes from {facts['sizes']}")
    show_steps(facts)
    console.say("policy", style="bold")
    parameters, trained = facts["parameters"], facts["trained"]
    each = [f"{name} {count:,}" for name, count in trained.items()]
    if facts["lora"]:
        each = [text.replace("ar ", "adapters of ar ", 1) for text in each]
    console.pairs(
        [
            *((name, f"{count:,} parameters") for name, count in parameters.items()),
            ("together", f"{sum(parameters.values()):,} parameters"),
            ("trained", f"{sum(trained.values()):,}"),
            *(("", text) for text in each),
        ]
    )
    show_flops(facts)
    show_memory(facts["memory"])
    if facts["options"]:
        _show_options(facts)
    show_verdict(facts["verdict"])


def _show_options(facts: dict[str, Any]) -> None:
    from cli import console
    from cli.plan_parts import show_options

    stages = {0: "deepspeed: null"} | {n: f"deepspeed: zero{n}" for n in (1, 2, 3)}
    show_options(facts["options"], "zero_stage", stages)
    for row in facts["memory"]:
        if row["needs"]:
            console.say(f"  {row['gpus']} GPUs need {' '.join(row['needs'])}")
