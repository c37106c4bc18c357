"""Where the files that a recipe names are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.schema_grpo import GrpoRecipe


def located(recipe: GrpoRecipe, files: Sequence[Path]) -> GrpoRecipe:
    """Return the recipe with absolute paths, so that the run can be resumed from any folder.

    `files` are those of the loaded recipe. Reward and prompt files are looked for beside the
    recipe, beside those it extends, then here. So are texts among the rewards' arguments: one that
    names a file becomes its path; one that begins with ./, ../ or ~/ is a path in any case, beside
    the recipe if nothing is there yet.
    """

    def found(text: str) -> str:
        places = [file.parent / text for file in files]
        return str(next((path for path in places if path.is_file()), Path(text)).resolve())

    def argument(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: argument(item) for key, item in value.items()}
        if isinstance(value, list):
            return [argument(item) for item in value]
        if not isinstance(value, str):
            return value
        places = [str(folder / value) for folder in (*(f.parent for f in files), Path.cwd())]
        if value.startswith("~/"):
            return str(Path(value).expanduser())
        if value.startswith(("./", "../")):
            there = next(filter(os.path.exists, places), places[0])
        else:
            there = next(filter(os.path.isfile, places), "")
        return str(Path(there).resolve()) if there else value

    def reward_file(use: str) -> str:
        path, _, function = use.rpartition(":")
        return f"{found(path)}:{function}" if path.endswith(".py") else use

    def absolute(text: str | None) -> str | None:
        return None if text is None else str(Path(text).expanduser().resolve())

    path, source = recipe.policy.path, recipe.prompts.source
    saved = {"save_to": recipe.rollout.save_to, "replay": recipe.rollout.replay}
    functions = tuple(
        f.model_copy(update={"use": reward_file(f.use), "args": argument(f.args)})
        for f in recipe.rewards.functions
    )
    sections = {
        "policy": {"path": path if path == "base" else absolute(path)},
        "prompts": {"source": source if source == "scenes" else found(source)},
        "rewards": {"functions": functions},
        "rollout": {key: absolute(folder) for key, folder in saved.items()},
    }
    return recipe.model_copy(
        update={key: getattr(recipe, key).model_copy(update=v) for key, v in sections.items()}
    )
