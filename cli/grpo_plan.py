"""The plan of a GRPO run: its facts as plain data, and how they look on a screen."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy.anatomy import Anatomy
    from recipes.schema_grpo import GrpoRecipe


def plan_grpo(recipe: "GrpoRecipe") -> dict[str, Any]:
    """Return what `--json` prints. Sizes are bytes, work is floating-point operations."""
    from cli.policy_folder import find_anatomy
    from rl.flops import grpo_flops
    from rl.memory import grpo_memory, trained_parameters, vllm_pictures
    from rl.preflight import check_targets
    from rl.sizing import with_training

    anatomy = find_anatomy(recipe.policy.path)
    check_targets(recipe.policy.lora, anatomy)
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
        "diffusion_passes": pictures * decode.steps * (1 if decode.guidance == 1 else 2),
        "rewards": {f.use: f.weight for f in recipe.rewards.functions},
        # Before the first step, every so many, and after the last.
        "evaluations": 1 + math.ceil(steps / recipe.evals.every) if recipe.evals.every else 0,
        "evaluation_suite": recipe.evals.suite,
        "evaluation_prompts": recipe.evals.limit,
    }


def device_of(wanted: str) -> tuple[str, int, bool]:
    """Return what a run would run on: its name, its bytes, and whether it is a GPU."""
    from cli.machine import gpus, memory_bytes
    from rl.sizing import GPUS

    found = gpus() or [] if wanted != "cpu" else []
    if found:
        return (*found[0], True)
    if wanted == "cuda":
        return (*next(iter(GPUS.items())), True)
    return "this machine", memory_bytes(), False


def _memory(recipe: "GrpoRecipe", anatomy: "Anatomy") -> dict[str, Any]:
    """Return the memory of every way to spread the run, and whether this device holds it."""
    from rl.memory import Sharding, grpo_memory
    from rl.sizing import (
        GPUS,
        LIBRARIES,
        SHARDINGS,
        change_that_fits,
        fits,
        spread_over,
        with_training,
    )

    device, capacity, on_gpu = device_of(recipe.policy.device)
    libraries = 0 if on_gpu else LIBRARIES

    def row(sharding: Sharding) -> dict[str, Any]:
        memory = grpo_memory(spread_over(recipe, sharding.gpus), anatomy, sharding)
        return {
            "gpus": sharding.gpus,
            "zero_stage": sharding.stage,
            "resident": memory.resident,
            "phases": memory.phases,
            "peak": memory.peak,
        }

    spread = SHARDINGS if on_gpu else SHARDINGS[:1]
    options = []
    for lora in (True, False):
        trained = with_training(recipe, lora=lora)
        for sharding in spread if on_gpu else ():
            memory = grpo_memory(spread_over(trained, sharding.gpus), anatomy, sharding)
            options.append(
                {
                    "training": "lora" if lora else "full",
                    "gpus": sharding.gpus,
                    "zero_stage": sharding.stage,
                    "peak": memory.peak,
                    "fits": {name: fits(memory, size) for name, size in GPUS.items()},
                }
            )
    alone = grpo_memory(recipe, anatomy)
    verdict: dict[str, Any] = {
        "device": device,
        "capacity": capacity,
        "needs": alone.peak + libraries,
        "fits": fits(alone, capacity - libraries),
        "decided_by": alone.largest_phase,
        "fix": None,
    }
    if not verdict["fits"]:
        change = change_that_fits(recipe, anatomy, capacity - libraries)
        verdict["fix"] = (
            {"change": change[0], "needs": change[1].peak + libraries} if change else None
        )
    return {
        "memory": [row(sharding) for sharding in spread],
        "options": options,
        "verdict": verdict,
    }


# --- on the screen -------------------------------------------------------------------------------


def show_grpo(facts: dict[str, Any]) -> None:
    """Print the facts, at most 80 columns wide unless a name is longer."""
    from cli import console

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


def show_flops(facts: dict[str, Any]) -> None:
    """Print the operations of a picture, stage by stage, and of a step."""
    from cli import console
    from rl.sizing import PEAK_FLOPS

    names = {"sampling": "sample tokens", "scoring": "score tokens", "diffusion": "diffusion head"}
    each = facts["flops_per_picture"]
    total = sum(each.values())
    console.say("operations per picture (products and convolutions, counted)", style="bold")
    rows = [
        (names.get(key, key), f"{operations(n):>10}  {n / total:4.0%}") for key, n in each.items()
    ]
    console.pairs([*rows, ("together", f"{operations(total):>10}")])
    if len(facts["memory"]) > 1:
        seconds = facts["flops_per_step"] / PEAK_FLOPS
        console.say(
            f"  a step is {operations(facts['flops_per_step'])}: at least {seconds:.0f} s on one "
            "H100 or H200 at its peak"
        )


def show_memory(rows: list[dict[str, Any]]) -> None:
    """Print what takes memory, a column for each way to spread the run."""
    from cli import console

    kept, phases = rows[0]["resident"], rows[0]["phases"]
    if len(rows) == 1:
        console.say("memory", style="bold")
        console.pairs(
            [
                *((name, console.size(count)) for name, count in kept.items()),
                *((f"+ {name}", f"{console.size(n)} (estimate)") for name, n in phases.items()),
                ("peak", f"{console.size(rows[0]['peak'])} (one + at a time)"),
            ]
        )
        return
    counts = [f"{row['gpus']} GPU" + "s" * (row["gpus"] > 1) for row in rows]
    stages = [f"ZeRO-{row['zero_stage']}" if row["zero_stage"] else "" for row in rows]
    console.say(table_line("memory of one GPU, GB", counts, indent=""), style="bold")
    console.say(table_line("", stages), style="bold")
    table = [(name, [row["resident"].get(name, 0) for row in rows]) for name in kept]
    table += [(f"+ {name} (estimate)", [row["phases"][name] for row in rows]) for name in phases]
    table.append(("peak: one + at a time", [row["peak"] for row in rows]))
    for name, values in table:
        console.say(table_line(name, [gigabytes(value) for value in values]))


def _show_options(facts: dict[str, Any]) -> None:
    from cli import console
    from rl.sizing import GPUS

    console.say("fits on (peak in GB, a tenth left free)", style="bold")
    for training in ("lora", "full"):
        cells = []
        for option in facts["options"]:
            if option["training"] == training:
                on = next((name for name, holds in option["fits"].items() if holds), "neither")
                cells.append(f"{option['peak'] / 1e9:.0f} {on}")
        console.say(table_line("adapters" if training == "lora" else "all of ar", cells))
    sizes = ", ".join(f"{name} {size / 1e9:.0f} GB" for name, size in GPUS.items())
    console.say(f"  the smallest of {sizes} that holds the peak")
    console.say("  several GPUs need torchrun and train.deepspeed=zero1 or zero2")
    if facts["work"]["engine"] == "vllm":
        console.say("  several GPUs need rollout.engine=transformers, as counted here")
    prompts = facts["work"]["prompts_per_step"]
    uneven = {row["gpus"] for row in facts["memory"] if prompts % row["gpus"]}
    for count in sorted(uneven):
        console.say(f"  {count} GPUs need rollout.prompts_per_step={-(-prompts // count) * count}")


def table_line(name: str, cells: list[str], indent: str = "  ") -> str:
    """A row of a table whose columns fit a terminal."""
    return f"{indent}{name}".ljust(24) + "".join(f" {cell:>10}" for cell in cells).rstrip()


def show_verdict(verdict: dict[str, Any]) -> None:
    """Print whether it fits, and the change with which it would."""
    from cli import console

    needs = f"{gigabytes(verdict['needs'])} of {gigabytes(verdict['capacity'])} GB"
    where = verdict["device"]
    if verdict["fits"]:
        console.say(f"fits: {needs} of {where}", style="green")
        return
    fix = verdict["fix"]
    if fix:
        what = f"{fix['change']} ({gigabytes(fix['needs'])} GB)"
    else:
        what = "use a device with more memory."
    console.say(f"does not fit: {needs} of {where} for {verdict['decided_by']}", style="yellow")
    console.say(f"    Fix: {what}", style="green")


def gigabytes(count: float) -> str:
    """Such as `51.6` or `1,960`."""
    return f"{count / 1e9:.3g}" if count < 999.5e9 else f"{count / 1e9:,.0f}"


def operations(count: float) -> str:
    """Such as `64.6 TFLOP`."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"
