"""The plan of a GRPO run: its facts as plain data, and how they look on a screen."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy.anatomy import Anatomy
    from recipes.schema_grpo import GrpoRecipe
    from rl.memory import Memory


def plan_grpo(recipe: "GrpoRecipe") -> dict[str, Any]:
    """Return what `--json` prints. Sizes are bytes, work is floating-point operations."""
    from cli.policy_folder import find_anatomy
    from rl.flops import grpo_flops
    from rl.memory import grpo_memory, trained_parameters, vllm_pictures, worker_memory
    from rl.preflight import check_targets, check_tiles
    from rl.sizing import with_training

    anatomy = find_anatomy(recipe.policy.path)
    check_targets(recipe.policy.lora, anatomy)
    check_tiles(recipe, anatomy.latent_size, anatomy.parts["vae"].config)
    work = grpo_flops(recipe, anatomy)
    stages = ("sampling", "scoring", "diffusion", "autoencoder", "update")
    resident = grpo_memory(recipe, anatomy).resident
    lora, full = with_training(recipe, lora=True), with_training(recipe, lora=False)
    facts: dict[str, Any] = {
        "name": recipe.name,
        "kind": recipe.kind,
        "sizes": anatomy.source,
        "work": _work(recipe, anatomy),
        "parameters": anatomy.parameters,
        "trained": {
            "now": "lora" if recipe.policy.lora else "full",
            "lora": trained_parameters(lora, anatomy),
            "full": trained_parameters(full, anatomy),
        },
        "flops_per_picture": {stage: getattr(work, stage) for stage in stages},
        "flops_per_step": work.total * _pictures(recipe),
        "assumed": {"prompt_tokens": anatomy.prompt_tokens},
        # Trained weights and two moments.
        "checkpoint_bytes": resident["gradients"] + resident["optimizer states"],
        "workers": {
            section: {"resident": one.resident, "phases": one.phases, "peak": one.peak}
            for section, one in worker_memory(recipe, anatomy).items()
        },
    }
    if recipe.rollout.engine == "vllm":
        facts["work"]["vllm_pictures_at_a_time"] = vllm_pictures(recipe, anatomy)
    return facts | _memory(recipe, anatomy)


def _pictures(recipe: "GrpoRecipe") -> int:
    return recipe.rollout.group_size * recipe.rollout.prompts_per_step


def _work(recipe: "GrpoRecipe", anatomy: "Anatomy") -> dict[str, Any]:
    rollout, decode, steps = recipe.rollout, recipe.decode.train, recipe.train.steps
    pictures = _pictures(recipe) * steps
    return {
        "steps": steps,
        "pictures": pictures,
        "prompts_per_step": rollout.prompts_per_step,
        "group_size": rollout.group_size,
        "image_tokens": pictures * anatomy.num_tokens,
        "engine": rollout.engine,
        "on_workers": [name for name in ("rollout", "decode") if getattr(recipe, name).workers],
        "diffusion_passes": pictures * decode.steps * (1 if decode.guidance == 1 else 2),
        "rewards": {f.use: f.weight for f in recipe.rewards.functions},
        # Before the first step, every so many, and after the last.
        "evaluations": 1 + math.ceil(steps / recipe.evals.every) if recipe.evals.every else 0,
        "evaluation_suite": recipe.evals.suite,
        "evaluation_prompts": recipe.evals.limit,
    }


def _memory(recipe: "GrpoRecipe", anatomy: "Anatomy") -> dict[str, Any]:
    """Return the memory of every way to spread the run, and whether this device holds it."""
    from cli.plan_parts import device_of, memory_row, option, verdict_on
    from rl.memory import Sharding, grpo_memory
    from rl.sizing import SHARDINGS, change_that_fits, memory_on, spread_over, with_training

    def spread(run: "GrpoRecipe", sharding: Sharding) -> "Memory":
        return grpo_memory(spread_over(run, sharding.gpus), anatomy, sharding)

    device = device_of(recipe.policy.device)
    alone, options = memory_on(recipe, anatomy, device.is_gpu), []
    several = SHARDINGS[1:] if device.is_gpu else ()
    for training in ("lora", "full") if device.is_gpu else ():
        trained = with_training(recipe, lora=training == "lora")
        for sharding in SHARDINGS:
            row = option(spread(trained, sharding), sharding)
            options.append({"training": training} | row)
    return {
        "memory": [
            memory_row(alone, SHARDINGS[0]),
            *(memory_row(spread(recipe, sharding), sharding) for sharding in several),
        ],
        "options": options,
        "verdict": verdict_on(
            device,
            alone,
            lambda room: change_that_fits(recipe, anatomy, room, device.is_gpu),
        ),
    }


# --- on the screen -------------------------------------------------------------------------------


def show_grpo(facts: dict[str, Any]) -> None:
    """Print the facts, at most 80 columns wide unless a name is longer."""
    from cli import console
    from cli.plan_parts import show_flops, show_memory, show_verdict

    console.say(f"{facts['name']} ({facts['kind']})", style="bold")
    console.say(f"sizes from {facts['sizes']}")
    _show_work(facts["work"])
    parameters, trained = facts["parameters"], facts["trained"]
    console.say("policy", style="bold")
    kinds = {"lora": "adapters", "full": "all of ar"}
    other = "full" if trained["now"] == "lora" else "lora"
    count = trained[trained["now"]]
    share = f", {count / parameters['ar']:.1%} of ar" if trained["now"] == "lora" else ""
    console.pairs(
        [
            *((name, f"{count:,} parameters") for name, count in parameters.items()),
            ("together", f"{sum(parameters.values()):,} parameters"),
            (
                "trained",
                f"{count:,} ({kinds[trained['now']]}{share}); "
                f"{kinds[other]} would be {trained[other]:,}",
            ),
        ]
    )
    show_flops(facts)
    show_memory(facts["memory"])
    _show_workers(facts["workers"])
    if len(facts["memory"]) > 1:
        _show_options(facts)
    show_verdict(facts["verdict"])


def _show_work(work: dict[str, Any]) -> None:
    from cli import console

    limit = work["evaluation_prompts"]
    prompts = "all prompts" if limit is None else f"{limit} prompts"
    sampled = f"{work['image_tokens']:,} sampled by {work['engine']}"
    if "vllm_pictures_at_a_time" in work:
        sampled += f" (its cache holds {work['vllm_pictures_at_a_time']} pictures at a time)"
    console.say("work", style="bold")
    console.pairs(
        [
            ("steps", f"{work['steps']:,}"),
            (
                "images",
                f"{work['pictures']:,} ({work['prompts_per_step']} prompts x "
                f"{work['group_size']} a step)",
            ),
            ("image tokens", sampled),
            ("decoding", f"{work['diffusion_passes']:,} passes of the diffusion head"),
            ("rewards", ", ".join(f"{name} x {w:g}" for name, w in work["rewards"].items())),
            ("evaluations", f"{work['evaluations']} of {prompts} of {work['evaluation_suite']}"),
        ]
    )


def _show_workers(workers: dict[str, Any]) -> None:
    from cli import console

    if workers:
        console.say("memory of each worker", style="bold")
    rows = []
    for section, memory in workers.items():
        phases = {f"+ {name}": count for name, count in memory["phases"].items()}
        parts = {**memory["resident"], **phases}.items()
        told = ", ".join(f"{name} {console.size(count)}" for name, count in parts)
        rows.append((section, f"{console.size(memory['peak'])} ({told}; estimate)"))
    console.pairs(rows)


def _show_options(facts: dict[str, Any]) -> None:
    from cli import console
    from cli.plan_parts import show_options

    show_options(facts["options"], "training", {"lora": "adapters", "full": "all of ar"})
    console.say("  several GPUs need torchrun and train.deepspeed=zero1 or zero2")
    if facts["work"]["engine"] == "vllm":
        console.say("  several GPUs need rollout.engine=transformers, as counted here")
    for section in facts["work"]["on_workers"]:
        console.say(f"  several GPUs need {section}.workers=0, as counted here")
    prompts = facts["work"]["prompts_per_step"]
    uneven = {row["gpus"] for row in facts["memory"] if prompts % row["gpus"]}
    for count in sorted(uneven):
        console.say(f"  {count} GPUs need rollout.prompts_per_step={-(-prompts // count) * count}")
