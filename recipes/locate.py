"""Where the files that a recipe names are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from recipes.schema_grpo import GrpoRecipe
from recipes.schema_pretrain import PretrainRecipe

_Located = TypeVar("_Located", GrpoRecipe, PretrainRecipe)


def located(recipe: _Located, files: Sequence[Path]) -> _Located:
    """Return the recipe with absolute paths, so that the run can be resumed from any folder.

    `files` are those of the loaded recipe. Reward and prompt files are looked for beside the
    recipe, beside those it extends, then here; policies and shards here.
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

    def reward_file(use: str) -> str:
        path, _, function = use.rpartition(":")
        return f"{found(path)}:{function}" if path.endswith(".py") else use

    source = recipe.prompts.source
    functions = tuple(
        f.model_copy(update={"use": reward_file(f.use)}) for f in recipe.rewards.functions
    )
    return {
        "prompts": {"source": source if source == "scenes" else found(source)},
        "rewards": {"functions": functions},
    }


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
