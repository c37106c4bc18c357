"""`atelier plan`: what a run will do, need and write, without doing it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from recipes import LoadedRecipe, Recipe
    from recipes.schema_pretrain import AutoencoderRecipe, ImageTokenizerRecipe


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
            None, help="Folder of the run. (default: runs/NAME)", show_default=False
        ),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object for machines."),
    ) -> None:
        """Show what a run would do, need and write; nothing is computed or written."""
        from recipes import load_recipe
        from recipes.schema_grpo import GrpoRecipe
        from recipes.schema_pretrain import PretrainRecipe

        loaded = load_recipe(recipe, overrides or [])
        run_dir = out or Path("runs") / loaded.recipe.name
        if isinstance(loaded.recipe, GrpoRecipe):
            from cli.grpo_plan import plan_grpo, show_grpo

            facts = plan_grpo(loaded.recipe)
            show = show_grpo
        elif isinstance(loaded.recipe, PretrainRecipe):
            from cli.pretrain_plan import plan_pretrain, show_pretrain

            facts = plan_pretrain(loaded.recipe)
            show = show_pretrain
        else:
            facts = _plan_build(loaded.recipe)
            show = _show_build
        facts["files"] = _files(loaded, run_dir)
        if as_json:
            from cli import console

            console.say(json.dumps(facts, indent=2))
            return
        show(facts)
        _show_files(facts, run_dir)


def _files(loaded: "LoadedRecipe", run_dir: Path) -> dict[str, Any]:
    recipe = loaded.recipe
    facts = {
        "folder": str(run_dir),
        "folder_is_free": not (run_dir.exists() and any(run_dir.iterdir())),
        "metrics_rows": _rows(recipe),
    }
    if recipe.kind in ("grpo", "pretrain"):  # training of an image codec is short and saves none
        saved = -(-recipe.train.steps // recipe.save.every)
        facts["checkpoints_written"] = saved
        facts["checkpoints_kept"] = min(saved, recipe.save.keep_last)
    return facts


def _rows(recipe: "Recipe") -> int:
    """Return the numbers' rows in metrics.jsonl, without those of evaluations and bad samples."""
    from recipes.schema_pretrain import CODEC_LOG_EVERY

    steps = recipe.train.steps
    if recipe.kind == "grpo":
        return steps
    if recipe.kind == "pretrain":  # the last row sums up the run
        return steps // min(recipe.log.every, steps) + 1
    return len({*range(0, steps, CODEC_LOG_EVERY), steps - 1})


def _show_files(facts: dict[str, Any], run_dir: Path) -> None:
    from cli import console

    files = facts["files"]
    size = facts.get("checkpoint_bytes")
    each = f", about {console.size(size)} each" if size else ""
    console.say("files", style="bold")
    more = " and the evaluations" if facts["kind"] == "grpo" else ""
    rows = [
        (f"{run_dir}/recipe.yaml", "this recipe with all its values"),
        (f"{run_dir}/metrics.jsonl", f"{files['metrics_rows']} rows{more}"),
    ]
    if "checkpoints_written" in files:
        written, kept = files["checkpoints_written"], files["checkpoints_kept"]
        rows.append((f"{run_dir}/checkpoints/", f"{written} written, the newest {kept} kept{each}"))
    console.pairs([*rows, (f"{run_dir}/policy/", "the trained policy")])
    if not files["folder_is_free"]:
        text = f"warning: {run_dir} is not empty; `atelier train` will ask for another --out"
        console.say(text, style="yellow")


def _plan_build(recipe: "ImageTokenizerRecipe | AutoencoderRecipe") -> dict[str, Any]:
    """Return the facts of a run that trains an image codec."""
    from cli.policy_folder import find_anatomy

    return {
        "name": recipe.name,
        "kind": recipe.kind,
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size,
        "source": recipe.data.source,
        "parameters": find_anatomy(recipe.policy.path).parameters if recipe.policy.path else {},
    }


def _show_build(facts: dict[str, Any]) -> None:
    from cli import console
    from cli.plan_parts import show_steps

    console.say(f"{facts['name']} ({facts['kind']})", style="bold")
    show_steps(facts)
    if facts["parameters"]:
        console.say("policy", style="bold")
        console.pairs([(name, f"{n:,} parameters") for name, n in facts["parameters"].items()])
