"""Where the files that a recipe names are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from recipes.schema_grpo import GrpoRecipe
from recipes.schema_pretrain import PretrainRecipe

_Located = TypeVar("_Located", GrpoRecipe, PretrainRecipe)


def located(recipe: _Located, files: Sequence[Path]) -> _Located:
    """Return the recipe with absolute paths, so that the run can be resumed from any folder.

    `files` are those of the loaded recipe. Reward and prompt files are looked for beside the
    recipe, beside those it extends, then here; policies, shards and saved rollouts here. Texts
    among the rewards' arguments are looked for in the same places: one that names a file becomes
    its path; one that begins with ./, ../ or ~/ is a path in any case, beside the recipe if nothing
    is there yet.
    """
    path = recipe.policy.path
    where = path if path in (None, "base") else _absolute(str(path))
    sections: dict[str, dict[str, Any]] = {"policy": {"path": where}}
    if isinstance(recipe, PretrainRecipe):
        source = recipe.data.source
        sections["data"] = {"source": source if source == "scenes" else _absolute(source)}
    else:
        sections |= _beside(recipe, files)
    return recipe.model_copy(
        update={key: getattr(recipe, key).model_copy(update=v) for key, v in sections.items()}
    )


def _beside(recipe: GrpoRecipe, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
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

    source = recipe.prompts.source
    saved = {"save_to": recipe.rollout.save_to, "replay": recipe.rollout.replay}
    functions = tuple(
        f.model_copy(update={"use": reward_file(f.use), "args": argument(f.args)})
        for f in recipe.rewards.functions
    )
    return {
        "prompts": {"source": source if source == "scenes" else found(source)},
        "rewards": {"functions": functions},
        "rollout": {key: folder and _absolute(folder) for key, folder in saved.items()},
    }


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
