"""Things found by name: built-in ones imported on first use, plug-ins through entry points."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from common.errors import AtelierError


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was probably meant to be, or None."""
    candidates = list(known)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if close:
        return close[0]
    folded = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


class Registry:
    """Names of one kind of thing ("reward", "suite"), each with the place it is imported from.

    `group` is the entry-point group that plug-ins use. A plug-in cannot take a built-in name.
    `error` is raised for a name that nobody has, with the nearest one in its message.
    """

    def __init__(
        self, kind: str, *, group: str | None = None, error: type[AtelierError] = AtelierError
    ) -> None:
        self._kind = kind
        self._group = group
        self._error = error
        self._places: dict[str, str] = {}
        self._objects: dict[str, Any] = {}

    def add(self, name: str, target: Any) -> None:
        """Register `target` under `name`: an object, or "module:attribute" to import when asked."""
        if name in self._places or name in self._objects:
            raise self._error(f"the {self._kind} `{name}` is registered twice. Fix: rename one.")
        if isinstance(target, str):
            self._places[name] = target
        else:
            self._objects[name] = target

    def names(self) -> list[str]:
        """Return all names in alphabetical order, those of plug-ins included."""
        return sorted({*self._places, *self._objects, *self._plug_ins()})

    def get(self, name: str) -> Any:
        """Return the object called `name`, importing it if need be; raise `error` if unknown."""
        if name in self._objects:
            return self._objects[name]
        if name in self._places:
            module, _, attribute = self._places[name].partition(":")
            self._objects[name] = getattr(import_module(module), attribute)
            return self._objects[name]
        plug_ins = self._plug_ins()
        if name in plug_ins:
            return plug_ins[name].load()
        close = nearest(name, self.names())
        fix = f"Did you mean `{close}`? " if close else ""
        raise self._error(
            f"no {self._kind} is called `{name}`. {fix}Known: {', '.join(self.names()) or 'none'}."
        )

    def _plug_ins(self) -> dict[str, EntryPoint]:
        if self._group is None:
            return {}
        found = entry_points(group=self._group)
        built_in = {*self._places, *self._objects}
        return {point.name: point for point in found if point.name not in built_in}
