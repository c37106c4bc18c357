"""Options of a suite, as typed on a command line: the parameters of the function that builds it."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from common.errors import UsageError
from common.registry import nearest


def check_options(what: str, build: Callable[..., Any], options: Iterable[str]) -> None:
    """Raise UsageError unless `build` can be called with exactly these options by name.

    A `**` parameter of `build` takes any further ones.
    """
    parameters = inspect.signature(build).parameters
    named = {key: p for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    given = list(options)
    for option in given:
        if option not in named and len(named) == len(parameters):
            close = nearest(option, named)
            fix = f"write `{close}`" if close else f"it takes {', '.join(named) or 'none'}"
            raise UsageError(f"{what} has no option `{option}`.\n    Fix: {fix}.")
    for option, parameter in named.items():
        if parameter.default is parameter.empty and option not in given:
            raise UsageError(f"{what} needs the option `{option}`.\n    Fix: add {option}=VALUE.")
