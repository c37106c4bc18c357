"""Find policy folders and their sizes; nothing here imports torch but the published sizes."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import PolicyError, UsageError
from policy import base_path

if TYPE_CHECKING:
    from policy.anatomy import Anatomy


def find_policy(text: str) -> Path:
    """Return the policy folder that `text` means: `base`, a policy folder or a run folder."""
    if text == "base":
        folder = base_path()
        if not (folder / "policy.json").is_file():
            raise PolicyError(
                f"the base policy is missing: there is no {folder}/policy.json.\n"
                "    Fix: build it with `make base`, or install the package again."
            )
        return folder
    folder = Path(text).expanduser()
    for place in (folder, folder / "policy"):
        if (place / "policy.json").is_file():
            return place
    what = "holds no policy.json" if folder.is_dir() else "is not a folder"
    raise UsageError(
        f"no policy at {text}: it {what}.\n"
        "    Fix: give `base`, a policy folder, or a run folder that is finished."
    )


def recipe_of(folder: Path) -> str | None:
    """Return the recipe of a run's policy (RUN/policy beside RUN/recipe.yaml); None for others."""
    recipe = folder.parent / "recipe.yaml"
    if folder.name != "policy" or not recipe.is_file():
        return None
    return recipe.read_text(encoding="utf-8")


def find_anatomy(text: str) -> "Anatomy":
    """Return the sizes of the policy that `text` means.

    A folder called blip3o-next-3b that is not there yet has the sizes that were published.
    """
    from policy.anatomy import read_anatomy
    from policy.published import BLIP3O_NEXT, published_anatomy

    folder = Path(text).expanduser()
    if folder.name != BLIP3O_NEXT or folder.exists():
        return read_anatomy(find_policy(text))
    from cli import console

    with console.progress() as progress:
        progress.start("sizes", None)
        anatomy = published_anatomy()
        progress.finish("sizes")
    return anatomy
