"""`atelier plan`: what a run will do, need and write, without doing it."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from recipes import LoadedRecipe
    from recipes.schema_grpo import GrpoRecipe
    from recipes.schema_pretrain import AutoencoderRecipe, ImageTokenizerRecipe, PretrainRecipe


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Recipes")
    def plan(
        recipe: str = typer.Argument(
            ..., metavar="RECIPE", help="Recipe file, or the name of a shipped one."
        ),
        overrides: list[str] | None = typer.Argument(
            None, metavar="KEY=VALUE", help="Values to change, such as train.steps=40."
        ),
        out: Path | None = typer.Option(
            None, help="Folder of the run. [default: runs/NAME]", show_default=False
        ),
    ) -> None:
        """Show what a run would do, need and write; nothing is computed or written."""
        from recipes import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        show_plan(loaded, out or Path("runs") / loaded.recipe.name)


def show_plan(loaded: "LoadedRecipe", run_dir: Path) -> None:
    """Print the plan of a run."""
    from cli import console
    from recipes.schema_grpo import GrpoRecipe

    recipe = loaded.recipe
    saved = -(-recipe.train.steps // recipe.save.every)
    kept = min(saved, recipe.save.keep_last)
    checkpoint = _grpo(recipe) if isinstance(recipe, GrpoRecipe) else _build(recipe)
    console.say("files", style="bold")
    size = f", about {_size(checkpoint)} each" if checkpoint else ""
    console.pairs(
        [
            (f"{run_dir}/recipe.yaml", "this recipe with all its values"),
            (f"{run_dir}/metrics.jsonl", f"{recipe.train.steps} rows and the evaluations"),
            (f"{run_dir}/checkpoints/", f"{saved} written, the newest {kept} kept{size}"),
            (f"{run_dir}/policy/", "the trained policy"),
        ]
    )
    if run_dir.exists() and any(run_dir.iterdir()):
        text = f"warning: {run_dir} is not empty; `atelier train` will ask for another --out"
        console.say(text, style="yellow")


def _grpo(recipe: "GrpoRecipe") -> int:
    """Print work and memory of a GRPO run; return the bytes of a checkpoint."""
    from cli import console
    from cli.estimate import estimate_grpo
    from cli.policy_folder import find_policy

    estimate = estimate_grpo(recipe, find_policy(recipe.policy.path))
    console.say(f"{recipe.name} ({recipe.kind})", style="bold")
    per_step = recipe.rollout.group_size * recipe.rollout.prompts_per_step
    images = per_step * recipe.train.steps
    decode = recipe.decode.train
    passes = images * decode.steps * (1 if decode.guidance == 1 else 2)
    evaluations = recipe.train.steps // recipe.evals.every if recipe.evals.every else 0
    limit = recipe.evals.limit
    prompts = "all prompts" if limit is None else f"{limit} prompts"
    console.say("work", style="bold")
    console.pairs(
        [
            ("steps", f"{recipe.train.steps:,}"),
            (
                "images",
                f"{images:,} ({recipe.rollout.prompts_per_step} prompts x "
                f"{recipe.rollout.group_size} a step)",
            ),
            (
                "image tokens",
                f"{images * estimate.num_tokens:,} sampled by {recipe.rollout.engine}",
            ),
            ("decoding", f"{passes:,} passes of the diffusion head"),
            ("rewards", ", ".join(f"{f.use} x {f.weight:g}" for f in recipe.rewards.functions)),
            ("evaluations", f"{evaluations} of {prompts} of {recipe.evals.suite}"),
        ]
    )
    console.say("policy", style="bold")
    rows = [(name, f"{count:,} parameters") for name, count in estimate.parameters.items()]
    share = estimate.trainable / max(1, estimate.parameters["ar"])
    kind = "adapters" if recipe.policy.lora else "all of ar"
    console.pairs([*rows, ("trained", f"{estimate.trainable:,} ({kind}, {share:.1%} of ar)")])
    console.say("memory, roughly (decoding and rewards left out)", style="bold")
    memory = [(name, _size(count)) for name, count in estimate.memory.items()]
    console.pairs([*memory, ("together", _size(sum(estimate.memory.values())))])
    return estimate.checkpoint


def _build(recipe: "PretrainRecipe | ImageTokenizerRecipe | AutoencoderRecipe") -> int:
    """Print the work of a run that builds a policy; return 0: unknown checkpoints."""
    from cli import console
    from cli.policy_folder import find_policy, read_parts

    parts = read_parts(find_policy(recipe.policy.path)) if recipe.policy.path else {}
    console.say(f"{recipe.name} ({recipe.kind})", style="bold")
    console.say("work", style="bold")
    pictures = recipe.train.steps * recipe.train.batch_size
    console.pairs(
        [
            ("steps", f"{recipe.train.steps:,}"),
            ("pictures", f"{pictures:,} ({recipe.train.batch_size} a step)"),
            ("source", recipe.data.source),
        ]
    )
    if parts:
        console.say("policy", style="bold")
        console.pairs([(name, f"{part.parameters:,} parameters") for name, part in parts.items()])
    return 0


def _size(count: int) -> str:
    """Return a number of bytes in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
