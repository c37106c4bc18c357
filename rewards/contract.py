"""The contract of a reward function, and the object that calls one with the columns it asks for."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import RewardError
from common.registry import nearest

_GIVEN = ("images", "prompts", "completions")
_TAKEN = ("images", "prompts", "self")
"""Names that a column cannot have: they would be given twice."""
_OPTION = inspect.Parameter.KEYWORD_ONLY
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, _OPTION)


@dataclass(frozen=True)
class Score:
    """What a reward says about one picture when a bare number is not enough.

    `value` None means that the picture could not be scored, and `reason` then says why; with a
    value, `reason` explains it. `details` is JSON for reports: where objects were located it has
    "objects", a list of {"label", "color", "score", "box": [left, top, right, bottom]} in pixels,
    and "size": [width, height].
    """

    value: float | None
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


RecordCheck = Callable[..., None]
"""check(record, **args): raises RewardError if the reward cannot score this prompt record. Of the
reward's arguments it gets those that it declares."""


@dataclass(frozen=True)
class Traits:
    """What the `reward` decorator says about a function.

    `whole_batch`: scores depend on the other pictures of the call, so the batch is never split.
    `paths`: columns whose text it opens as files; a server refuses text there. `paths_argument`
    names an argument that lists further ones.
    `cacheable`: scores of the same input stay the same, so they may be kept.
    """

    name: str
    check: RecordCheck | None = None
    whole_batch: bool = False
    paths: tuple[str, ...] = ()
    paths_argument: str = ""
    cacheable: bool = True


class RewardFunction:
    """A reward function with its arguments bound.

    Calling it passes `images`, `prompts` and those columns that the function declares by name; a
    function with `**columns` gets all of them. Parameters after a `*` are options: `args` alone
    fill them, so that no column of a data set (or of a request to a server) changes a setting. A
    function that declares `completions` (TRL's contract) gets the pictures there unless the caller
    has a column of that name, and columns everywhere, as from TRL.

    Raises RewardError for an argument that the function lacks, for an option without a value and
    for a `paths_argument` that is no list of texts.
    """

    def __init__(
        self, function: Callable[..., Any], traits: Traits, args: Mapping[str, Any]
    ) -> None:
        self.function = function
        self.name = traits.name
        self.whole_batch = traits.whole_batch
        self.cacheable = traits.cacheable and not traits.whole_batch
        self.args = dict(args)
        self.paths = (*traits.paths, *self._listed(traits.paths_argument))
        self._check = traits.check
        parameters = inspect.signature(function).parameters
        named = {name: p for name, p in parameters.items() if p.kind in _NAMED}
        self._declared = set(named)
        after_star = {name for name, p in named.items() if p.kind == _OPTION}
        self._options = set() if "completions" in named else after_star - set(_GIVEN)
        self._takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        self._refuse_unknown_args()
        self._refuse_positional(parameters)
        needed = [
            name
            for name, p in named.items()
            if p.default is p.empty and name not in self.args and name not in _GIVEN
        ]
        for name in needed:
            if name in self._options:
                raise RewardError(
                    f"reward `{self.name}` needs the argument `{name}`. Fix: give it under `args` "
                    f"in a recipe, with --arg {self.name}.{name}=VALUE to `atelier score`."
                )
        self.required_columns = tuple(needed)
        """Columns without which the function cannot be called."""

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> Any:
        """Return what the function returns: one score for each picture, or an awaitable of it.

        Raises RewardError if a column is missing that the function needs.
        """
        missing = [name for name in self.required_columns if name not in columns]
        if missing:
            raise RewardError(
                f"reward `{self.name}` needs the column `{missing[0]}`, which the prompt records "
                f"lack (they have {', '.join(sorted(columns)) or 'none'}). Fix: add it to the "
                "records or give it under `args`."
            )
        available = {"completions": images, **columns, "images": images, "prompts": prompts}
        if self._takes_all:
            wanted = set(available) - ({"completions"} - self._declared - set(columns))
        else:
            wanted = self._declared & set(available)
        chosen = {name: available[name] for name in wanted - self._options}
        return self.function(**(chosen | self.args))

    def sees(self, column: str) -> bool:
        """Return whether a column of this name reaches the function."""
        taken = self._takes_all or column in self._declared
        return taken and column not in self._options and column not in self.args

    def with_paths(self, columns: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Return the columns, relative paths in those that this reward opens joined to `folder`."""
        opened = self.paths
        return {key: _joined(x, folder) if key in opened else x for key, x in columns.items()}

    def check_record(self, record: Mapping[str, Any]) -> None:
        """Raise RewardError if the reward cannot score this prompt record; the message names it."""
        for column in _TAKEN:
            if column in record:
                raise RewardError(
                    f"prompt record `{record.get('prompt_id') or record.get('prompt')}`: a column "
                    f"cannot be called `{column}`: rewards get something else under that name. "
                    "Fix: rename it."
                )
        missing = [name for name in self.required_columns if name not in record]
        if missing:
            name = record.get("prompt_id") or record.get("prompt")
            # A reward with a check judges records one by one: no argument is right for all.
            fix = "" if self._check else ", or give it under `args` if it is the same for all"
            raise RewardError(
                f"prompt record `{name}`: no `{missing[0]}`, which reward `{self.name}` needs. "
                f"Fix: add it to the prompt record{fix}."
            )
        if self._check is not None:
            known = inspect.signature(self._check).parameters
            self._check(record, **{k: v for k, v in self.args.items() if k in known})

    def _listed(self, argument: str) -> Sequence[str]:
        """Return the column names that an argument lists."""
        names = self.args.get(argument, ())
        if not isinstance(names, list | tuple) or not all(isinstance(x, str) for x in names):
            raise RewardError(
                f"reward `{self.name}`: {argument} is {names!r}. Fix: write a list of columns."
            )
        return names

    def _refuse_unknown_args(self) -> None:
        for name in self.args:
            if name in self._declared and name not in _GIVEN:
                continue
            options = sorted(self._declared - set(_GIVEN))
            close = nearest(name, options)
            fix = f"Did you mean `{close}`?" if close else f"It takes: {', '.join(options) or '-'}."
            raise RewardError(f"reward `{self.name}` has no argument `{name}`. {fix}")

    def _refuse_positional(self, parameters: Mapping[str, inspect.Parameter]) -> None:
        for name, p in parameters.items():
            if p.kind == p.POSITIONAL_ONLY and p.default is p.empty:
                raise RewardError(
                    f"reward `{self.name}`: parameter `{name}` can only be given by position, and "
                    "columns arrive by name. Fix: remove the `/` from its signature."
                )


def _joined(value: Any, folder: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_joined(item, folder) for item in value]
    is_path = isinstance(value, str) and value and "://" not in value
    return str(folder / value) if is_path else value
