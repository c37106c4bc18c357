"""Where the files that a recipe names are."""

from collections.abc import Sequence
from pathlib import Path

from recipes.schema_grpo import GrpoRecipe


def located(recipe: GrpoRecipe, files: Sequence[Path]) -> GrpoRecipe:
    """Return the recipe with absolute paths, so that the run can be resumed from any folder.

    `files` are those of the loaded recipe. Reward and prompt files are looked for beside the
    recipe, beside those it extends, then here.
    """

    def found(text: str) -> str:
        places = [file.parent / text for file in files]
        return str(next((path for path in places if path.is_file()), Path(text)).resolve())

    def reward_file(use: str) -> str:
        path, _, function = use.rpartition(":")
        return f"{found(path)}:{function}" if path.endswith(".py") else use

    def absolute(text: str | None) -> str | None:
        return None if text is None else str(Path(text).expanduser().resolve())

    path, source = recipe.policy.path, recipe.prompts.source
    saved = {"save_to": recipe.rollout.save_to, "replay": recipe.rollout.replay}
    functions = tuple(
        f.model_copy(update={"use": reward_file(f.use)}) for f in recipe.rewards.functions
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
