"""Layers of a recipe put on top of one another, with the origin of every key."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from common.errors import Problem
from recipes.yaml_loader import MAX_DEPTH, KeyPath, dotted

OVERRIDE = "override"
"""Origin of a value that was given on the command line."""


class Tree:
    """A mapping built from layers. Mappings are merged key by key; lists are replaced whole."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.origins: dict[KeyPath, str] = {}
        """Where each key and list item stands: "file.yaml:12" or "override"."""

    def merge(self, layer: Mapping[str, Any], lines: Mapping[KeyPath, int], file: str) -> None:
        """Put a file's values on top."""
        origins = {path: f"{file}:{line}" for path, line in lines.items()}
        self._merge(self.value, layer, (), origins)

    def set(self, path: tuple[str, ...], value: Any, where: str) -> list[Problem]:
        """Put one value on top, at a dotted key that may go through list indices.

        Returns a problem (standing at `where`) if the key goes through something without keys.
        """
        if len(path) > MAX_DEPTH:
            return [Problem(where, "", "The key has too many parts.", "check it.")]
        holder: Any = self.value
        done: KeyPath = ()
        for part in path[:-1]:
            step = _index(holder, part)
            if isinstance(step, str) and isinstance(holder, dict):
                if holder.get(step) is None:
                    holder[step] = {}
                    self.origins[(*done, step)] = OVERRIDE
            elif isinstance(step, str):
                return [_no_keys(where, done, holder)]
            holder = holder[step]
            done = (*done, step)
        last = _index(holder, path[-1])
        if isinstance(last, str) and not isinstance(holder, dict):
            return [_no_keys(where, done, holder)]
        full = (*done, last)
        if isinstance(value, dict) and isinstance(holder, dict):
            self._merge(holder, {last: value}, done, dict.fromkeys(_places(value, full), OVERRIDE))
        else:
            self._forget(holder.get(last) if isinstance(holder, dict) else holder[last], full)
            holder[last] = value
            self.origins.update(dict.fromkeys(_places(value, full), OVERRIDE))
        return []

    def _merge(
        self,
        target: dict[Any, Any],
        layer: Mapping[Any, Any],
        path: KeyPath,
        origins: Mapping[KeyPath, str],
    ) -> None:
        for key, value in layer.items():
            full = (*path, key)
            if isinstance(value, dict) and isinstance(target.get(key), dict):
                self.origins[full] = origins[full]
                self._merge(target[key], value, full, origins)
                continue
            self._forget(target.get(key), full)
            target[key] = value
            self.origins.update({place: origins[place] for place in _places(value, full)})

    def _forget(self, value: Any, path: KeyPath) -> None:
        for place in _places(value, path):
            self.origins.pop(place, None)


def _index(holder: Any, part: str) -> str | int:
    """Return `part` as an index where it is one of a list's, else as it is."""
    if isinstance(holder, list) and part.isascii() and part.isdigit() and len(part) < 6:
        index = int(part)
        if index < len(holder):
            return index
    return part


def _no_keys(where: str, path: KeyPath, holder: Any) -> Problem:
    if isinstance(holder, list):
        message = f"`{dotted(path)}` is a list of {len(holder)}."
        fix = f"use an index below {len(holder)}, or replace the list."
        return Problem(where, dotted(path), message, fix)
    return Problem(where, dotted(path), f"`{dotted(path)}` has no keys.", "set it as a whole.")


def _places(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Yield `path`, where `value` stands, and the place of everything inside it."""
    yield path
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from _places(item, (*path, key))
