"""The part of `atelier check` that calls the rewards."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes import LoadedRecipe
    from rewards.checks import RewardTrial
    from rewards.spec import RewardSpec

_RECORD = {
    "prompt": 'a red circle and a sign that says "CAB"',
    "prompt_id": "example",
    "metadata": {"tag": "single_object", "include": [{"class": "circle", "count": 1}]},
}
"""What goes with the synthetic pictures where there is no recipe."""


def of_recipe(loaded: "LoadedRecipe") -> "list[RewardTrial]":
    """Try the rewards of a GRPO recipe on all its prompt records; other kinds have none."""
    from recipes.locate import located
    from recipes.schema_grpo import GrpoRecipe

    if not isinstance(loaded.recipe, GrpoRecipe):
        return []
    recipe = located(loaded.recipe, loaded.files)
    from data.prompts import training_records
    from rewards.spec import spec_from

    tasks = recipe.prompts.tasks
    drawn = None if tasks is None else [task for task, weight in tasks.items() if weight > 0]
    records = training_records(recipe.prompts.source, recipe.prompts.split, drawn)
    specs = [spec_from(f.model_dump()) for f in recipe.rewards.functions]
    return _try(specs, records, Path(recipe.prompts.source).parent)


def of_file(use: str, arguments: Sequence[str]) -> "list[RewardTrial]":
    """Try a reward as file.py:function with arguments KEY=VALUE."""
    from cli import reward_arguments
    from rewards.spec import RewardSpec

    args = reward_arguments.parse(arguments, option="").get("", {})
    return _try([RewardSpec(use, args=args)], [_RECORD])


def _try(
    specs: "list[RewardSpec]", records: list[dict[str, Any]], folder: Path | None = None
) -> "list[RewardTrial]":
    from cli import console
    from rewards.checks import try_rewards

    # What rewards print must not stand in the middle of `check --json`.
    with redirect_stdout(sys.stderr), console.progress() as progress:
        progress.start("rewards", None)  # a reward may load a large model
        trials = try_rewards(specs, records, folder)
        progress.finish("rewards")
    return trials


def show(trials: "list[RewardTrial]", *, alone: bool = False) -> None:
    """Print what came of the trials, and end with 1 if any reward has a problem.

    `alone`: there is no recipe that could be checked without them.
    """
    from cli import console
    from common.errors import RewardError

    if trials:
        console.say("rewards, on four synthetic pictures", style="bold")
        console.pairs([(trial.name, _told(trial)) for trial in trials])
    problems = [f"reward `{t.name}`: {text}" for t in trials for text in t.problems]
    if problems:
        if not all("Fix: " in problem for problem in problems):
            fix = "    Fix: correct the reward"
            problems.append(fix + ("." if alone else "; --no-rewards checks the recipe alone."))
        raise RewardError("\n".join(problems))
    console.say("ok", style="green")


def _told(trial: "RewardTrial") -> str:
    scores = "  ".join("none" if s is None else f"{s:.3g}" for s in trial.scores)
    return f"{scores}  in {trial.seconds:.2f} s"
