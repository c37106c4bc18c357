"""Finding reward functions: built in, decorated, from an entry point, or in a file of your own."""

import hashlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

from common.errors import RewardError
from common.registry import Registry, nearest
from rewards.contract import RecordCheck, RewardFunction, Traits

_BUILT_IN = {
    "aesthetic": "rewards.preference:aesthetic",
    "clip_score": "rewards.preference:clip_score",
    "consistency": "rewards.consistency:consistency",
    "geneval": "rewards.geneval:geneval",
    "hps_v2": "rewards.preference:hps_v2",
    "image_reward": "rewards.preference:image_reward",
    "ocr": "rewards.ocr:ocr",
    "pick_score": "rewards.preference:pick_score",
    "remote": "rewards.remote:remote",
    "vlm_judge": "rewards.vlm_judge:vlm_judge",
    "yes_no": "rewards.yes_no:yes_no",
}
_REGISTRY = Registry("reward", group="atelier.rewards", error=RewardError)
for _name, _place in _BUILT_IN.items():
    _REGISTRY.add(_name, _place)

_TRAITS = "__atelier_reward__"
_FILE_MODULE = "atelier_reward_"
"""Start of the names of modules that are imported from files which recipes name."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass
class _Slot:
    """Holds a decorated function, so that defining it again (a notebook cell) replaces it."""

    function: Callable[..., Any]


_SLOTS: dict[str, _Slot] = {}


def reward(
    *,
    name: str,
    check: RecordCheck | None = None,
    whole_batch: bool = False,
    paths: tuple[str, ...] = (),
    paths_argument: str = "",
    cacheable: bool = True,
) -> Callable[[_Function], _Function]:
    """Register a function as the reward `name`; the function itself is returned unchanged.

    A function of a file that a recipe names is not registered: two files may use one name.

    `check(record, **args)` raises RewardError for a prompt record that cannot be scored; it runs
    before a run starts. Set `whole_batch` if the score of a picture depends on the others of the
    call (a diversity reward): it then gets all pictures at once and is never called again singly.
    Name under `paths` the columns whose text it opens as files, and as `paths_argument` an argument
    that lists further ones: relative paths then start at the prompt file, a server refuses text
    there, so that nobody reads the server's files, and a score cache notices a file that was
    replaced. Say `cacheable=False` if scores depend on what cannot be seen here (the reward behind
    a server).
    """

    def decorate(function: _Function) -> _Function:
        traits = Traits(name, check, whole_batch, paths, paths_argument, cacheable)
        setattr(function, _TRAITS, traits)
        place = f"{function.__module__}:{function.__qualname__}"
        slot = _SLOTS.get(name)
        if _BUILT_IN.get(name) == place or place.startswith(_FILE_MODULE):
            return function
        if slot is not None and _same_definition(slot.function, function):
            slot.function = function
        else:
            _REGISTRY.add(name, slot := _Slot(function))
            _SLOTS[name] = slot
        return function

    return decorate


def list_rewards() -> list[str]:
    """Return the names of all rewards that are built in, decorated or installed as plug-ins."""
    return _REGISTRY.names()


def load_reward(spec: str, /, **args: Any) -> RewardFunction:
    """Return the reward that `spec` names, with `args` bound.

    `spec` is a registered name, the name of an entry point in the group `atelier.rewards`, or
    "path/to/file.py:function". Raises RewardError for an unknown name (with the nearest one), a
    file or function that is missing, a file that fails to run, or an argument the function lacks.
    """
    path, colon, attribute = spec.rpartition(":")
    if colon and path.endswith(".py"):
        function = _from_file(Path(path), attribute)
    else:
        found = _REGISTRY.get(spec)
        function = found.function if isinstance(found, _Slot) else found
        attribute = spec
    if not inspect.isroutine(function):
        raise RewardError(
            f"reward `{spec}` is of type {type(function).__name__}. Fix: point to a function; what "
            "another object does can be called in one."
        )
    return RewardFunction(function, getattr(function, _TRAITS, Traits(attribute)), args)


def _same_definition(old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def _from_file(path: Path, attribute: str) -> Any:
    module = _run_file(path)
    if not hasattr(module, attribute):
        functions = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__  # not imported
        ]
        close = nearest(attribute, functions)
        fix = f"Did you mean `{close}`?" if close else f"It has: {', '.join(functions) or 'none'}."
        raise RewardError(f"{path} has no function `{attribute}`. {fix}")
    return getattr(module, attribute)


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the file each time: the bytecode cache misses an edit within one second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _run_file(path: Path) -> ModuleType:
    """Import the file once for each content of it, under a name of its own.

    Its folder stays at the end of the import path, so that modules beside it are found, also by
    imports inside its functions, and no library is replaced by a file of the same name.
    """
    if not path.is_file():
        raise RewardError(
            f"no file {path} (looked in {Path.cwd()}). Fix: write the path of your reward file "
            "relative to that folder, or in full."
        )
    full = Path(os.path.abspath(path))  # what a link stands beside belongs to it
    source = full.read_bytes()
    name = f"{_FILE_MODULE}{full.stem}_{hashlib.blake2b(str(full).encode()).hexdigest()[:8]}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__atelier_source__", None) == source:
        return loaded
    loader = _SourceLoader(name, str(full))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # this loader always has one
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__atelier_source__"] = source
    if str(full.parent) not in sys.path:
        sys.path.append(str(full.parent))
    sys.modules[name] = module  # dataclasses and pickle look their module up while it runs
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(full)]
        where = f" in line {lines[-1]}" if lines else ""
        raise RewardError(
            f"{path} fails{where} when run: {type(error).__name__}: {error}. Fix: run it with "
            "Python to see more."
        ) from error
    return module
