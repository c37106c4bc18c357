"""`atelier check`: is a recipe right, where does each value come from, do its rewards work."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from common.errors import AtelierError
    from recipes import LoadedRecipe
    from recipes.schema_grpo import GrpoRecipe
    from recipes.schema_pretrain import PretrainRecipe
    from rewards.checks import RewardTrial


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Recipes")
    def check(
        recipe: str = typer.Argument(
            ...,
            metavar="RECIPE",
            help="Recipe file, or the name of a shipped one; or a reward as file.py:function.",
        ),
        overrides: list[str] | None = typer.Argument(
            None, metavar="KEY=VALUE", help="Values to change, such as train.steps=40."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print JSON instead."),
        rewards: bool = typer.Option(
            True, help="Try the rewards on all prompt records and on four synthetic pictures."
        ),
    ) -> None:
        """Validate a recipe, show every value with the place it comes from, try its rewards."""
        from cli import reward_trials
        from common.errors import AtelierError, UsageError
        from recipes import load_recipe

        try:
            if ".py:" in recipe:
                trials = reward_trials.of_file(recipe, overrides or [])
                if as_json:
                    _print_json({"valid": not any(trial.problems for trial in trials)}, trials)
                else:
                    reward_trials.show(trials, alone=True)
            elif recipe.endswith(".py"):
                raise UsageError(
                    f"{recipe} is no recipe.\n    Fix: try a reward: {recipe}:FUNCTION"
                )
            else:
                _check(load_recipe(recipe, overrides or []), as_json, rewards)
        except AtelierError as error:
            if as_json:
                _print_problems(recipe, error)
                raise typer.Exit(error.exit_code) from None
            raise


def _check(loaded: "LoadedRecipe", as_json: bool, rewards: bool) -> None:
    from cli import reward_trials
    from common.processes import process_count
    from recipes.locate import located
    from rl.preflight import (
        check_installed,
        check_replay,
        check_replayed_rewards,
        check_save_to,
        check_whole_batch,
    )

    if not as_json:
        _print_tree(loaded)
    if loaded.recipe.kind in ("grpo", "pretrain"):
        check_installed(loaded.recipe)
    if loaded.recipe.kind == "grpo":
        found = located(loaded.recipe, loaded.files)
        check_save_to(found)
        check_replay(found, process_count())
        refuse_missing_parts(found)
    elif loaded.recipe.kind == "pretrain":
        refuse_missing_data(located(loaded.recipe, loaded.files))
    trials = reward_trials.of_recipe(loaded) if rewards else []
    if loaded.recipe.kind == "grpo":
        whole = [trial.name for trial in trials if trial.whole_batch]
        check_whole_batch(found, whole, process_count())
        if rewards:
            check_replayed_rewards(found, [trial.name for trial in trials])
    if as_json:
        facts = {
            "valid": True,
            "recipe": loaded.recipe.model_dump(mode="json"),
            "provenance": loaded.provenance,
            "files": [str(file) for file in loaded.files],
        }
        _print_json(facts, trials)
    else:
        reward_trials.show(trials)


def refuse_missing_parts(recipe: "GrpoRecipe") -> None:
    """Raise the error with which a run would stop at its start: policy, adapter targets, suite."""
    from evals.suites import load_suite
    from policy import policy_path
    from policy.anatomy import read_anatomy
    from rl.preflight import check_targets, check_tiles

    anatomy = read_anatomy(policy_path(recipe.policy.path))
    check_targets(recipe.policy.lora, anatomy)
    check_tiles(recipe, anatomy.latent_size, anatomy.parts["vae"].config)
    if recipe.evals.every:
        load_suite(recipe.evals.suite, recipe.evals.limit).from_prompts_alone()


def refuse_missing_data(recipe: "PretrainRecipe") -> None:
    """Raise the error with which pretraining would stop at its start: policy, parts, context,
    shards. Of the shards, which may be many, only the first is read."""
    from data.shards import build_index, find_shards
    from policy import policy_path
    from policy.anatomy import read_anatomy
    from rl.preflight import check_context, check_targets
    from rl.pretrain_cost import as_trained, trained_values

    folder = policy_path(recipe.policy.path or "base")
    anatomy = as_trained(recipe, read_anatomy(folder))
    check_targets(recipe.policy.lora, anatomy)
    trained_values(recipe, anatomy)
    if recipe.data.context:
        pictures = (1 + recipe.data.references) * anatomy.num_tokens
        check_context(recipe.data.context, _template_tokens(folder) + pictures)
    if recipe.data.source != "scenes":
        build_index(find_shards(recipe.data.source)[:1], bool(recipe.data.references))


def _template_tokens(folder: "Path") -> int:
    """Return the tokens of a prompt without text; that for a reference has a few more."""
    from transformers import AutoTokenizer

    from policy.config import PolicyConfig
    from policy.prompts import PromptEncoder
    from policy.quiet import refused_as

    with refused_as(f"{folder}/tokenizer cannot be read", "copy the policy folder again."):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    [empty] = PromptEncoder(tokenizer).ids(PolicyConfig.load(folder), [""])
    return len(empty)


def _print_problems(recipe: str, error: "AtelierError") -> None:
    import json
    from dataclasses import asdict

    from common.errors import Problem

    message, _, fix = str(error).partition("Fix: ")
    found = getattr(error, "problems", ()) or [Problem(recipe, "", message.strip(), fix)]
    problems = [asdict(problem) for problem in found]
    typer.echo(json.dumps({"valid": False, "problems": problems}, indent=2, ensure_ascii=False))


def _print_json(facts: dict[str, Any], trials: "list[RewardTrial]") -> None:
    """Print facts and trials, and end with 1 if any reward has a problem."""
    import json
    from dataclasses import asdict

    rewards = [asdict(trial) for trial in trials]
    typer.echo(json.dumps(facts | {"rewards": rewards}, indent=2, ensure_ascii=False))
    if any(trial.problems for trial in trials):
        raise typer.Exit(1)


def _print_tree(loaded: "LoadedRecipe") -> None:
    from rich.text import Text

    from cli import console
    from recipes.shipped import display_path

    rows = list(_rows(loaded.recipe.model_dump(mode="json"), "", 0, loaded.provenance))
    keys = max(len(name) for name, _, _ in rows)
    screen = console.stdout()
    room = screen.width if screen.is_terminal else 10_000
    values = min(max(len(value) for _, value, _ in rows), max(room - keys - 36, 16))
    console.say(" < ".join(display_path(file) for file in loaded.files), style="bold")
    for name, value, origin in rows:
        if origin is None:
            console.say(name, style="bold")
            continue
        line = Text(name.ljust(keys) + "  ")
        pieces = _wrapped(value, values)
        line.append(pieces[0].ljust(values), style="" if origin == "default" else "cyan")
        line.append("  ")
        line.append(origin, style="bold yellow" if origin == "override" else "dim")
        console.say(line)
        for piece in pieces[1:]:
            console.say(" " * (keys + 2) + piece, style="cyan")


def _rows(value: Any, key: str, depth: int, origins: dict[str, str]) -> Any:
    """Yield (indented name, value as text, origin); a section has neither value nor origin."""
    from recipes.explain import show

    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        full = f"{key}.{name}" if key else str(name)
        label = "  " * depth + (f"- {name}" if isinstance(value, list) else str(name))
        if full in origins:
            yield label, show(item, limit=1000).replace('"', ""), origins[full]
        else:
            yield label, "", None
            yield from _rows(item, full, depth + 1, origins)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]
