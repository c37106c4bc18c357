"""In which settings the recipes of two policies differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from common.errors import RecipeError
from recipes.yaml_loader import parse_yaml


def recipe_diff(before: str | None, after: str | None) -> list[tuple[str, str, str]] | None:
    """Return (dotted key, value before, value after) of each setting that differs, "-" for none.

    None where one of the recipes (YAML texts) is not known or cannot be read.
    """
    first, second = settings_of(before), settings_of(after)
    if first is None or second is None:
        return None
    return [
        (key, first.get(key, "-"), second.get(key, "-"))
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def settings_of(recipe: str | None) -> dict[str, str] | None:
    """Return a recipe's settings by dotted key, or None as above."""
    if recipe is None:
        return None
    try:
        return dict(_flat(parse_yaml(recipe.encode(), "recipe").value))
    except RecipeError:
        return None


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{number}]")
    else:
        yield key, "null" if value is None else str(value)
