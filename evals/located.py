"""What a scorer says it found where, read from details that anybody's reward may have written."""

from collections.abc import Mapping
from typing import Any

_FARTHEST = 1e9
"""No picture is as wide in pixels: a larger number is a mistake, and its square has no value."""

Found = tuple[Mapping[str, Any], list[float]]
"""An entry of the details and its box [left, top, right, bottom] in pixels."""


def picture_size(details: Any) -> tuple[float, float] | None:
    """Return (width, height) in pixels; None where the details do not tell."""
    size = _numbers(details.get("size"), 2) if isinstance(details, Mapping) else None
    return (size[0], size[1]) if size is not None and min(size) >= 1 else None


def found_in(details: Any, key: str = "objects") -> list[Found]:
    """Return the entries of `details[key]` that have a box; other things there are left out."""
    found = details.get(key) if isinstance(details, Mapping) else None
    entries = found if isinstance(found, list) else []
    return [
        (entry, box)
        for entry in entries
        if isinstance(entry, Mapping) and (box := _numbers(entry.get("box"), 4)) is not None
    ]


def _numbers(value: Any, count: int) -> list[float] | None:
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    fine = all(isinstance(item, int | float) and abs(item) <= _FARTHEST for item in value)
    return [float(item) for item in value] if fine else None
