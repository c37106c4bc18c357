"""The recipes that come with the package, found by name."""

import re
from pathlib import Path

from recipes.schema_common import NAME_PATTERN

_FOLDER = Path(__file__).resolve().parent


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of every shipped recipe, such as "geneval-scenes"; sub-folders last."""
    files = {
        file.relative_to(_FOLDER).with_suffix("").as_posix(): file
        for file in _FOLDER.rglob("*.yaml")
    }
    return dict(sorted(files.items(), key=lambda item: ("/" in item[0], item[0])))


def recipe_summary(file: Path) -> str:
    """Return the first line of a recipe's leading comment, or "" if it has none."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def display_path(file: Path) -> str:
    """Return a short name for a file: relative to here, or `recipes/...` for a shipped one."""
    for root in (Path.cwd(), _FOLDER.parent):
        if file.is_relative_to(root):
            return file.relative_to(root).as_posix()
    return str(file)


def relocated(file: Path, name: str) -> str:
    """Return the text of a recipe as it has to read in another folder, with the run's new name.

    A shipped recipe that extends a file beside it then extends it by name. A name that a run cannot
    have leaves the recipe's own.
    """
    text = file.read_text(encoding="utf-8")
    if re.fullmatch(NAME_PATTERN, name):
        text = re.sub(r"^name: .*$", f"name: {name}", text, count=1, flags=re.MULTILINE)
    if not file.is_relative_to(_FOLDER):
        return text
    here = file.parent.relative_to(_FOLDER)

    def by_name(match: re.Match[str]) -> str:
        return match[1] + (here / match[2]).as_posix()

    return re.sub(r"^(extends: *)([\w./-]+)\.ya?ml", by_name, text, count=1, flags=re.MULTILINE)
