"""Networks are loaded once, and one at a time.

Rewards run side by side in threads, while loading changes what all threads share: libraries set
torch's default number format and switch initialisation off until a network is made. Another one
made at the same moment would get the wrong format or weights.
"""

import threading
from collections.abc import Callable, Hashable
from functools import wraps
from typing import ParamSpec, TypeVar

_ONE_AT_A_TIME = threading.RLock()  # a network may be part of another one
_Parameters = ParamSpec("_Parameters")
_Loaded = TypeVar("_Loaded")


def loaded_once(load: Callable[_Parameters, _Loaded]) -> Callable[_Parameters, _Loaded]:
    """Return `load`, called once for each set of arguments (hashable) and never beside another.

    What is loaded already is returned at once, also while something else is being loaded.
    """
    kept: dict[Hashable, _Loaded] = {}

    @wraps(load)
    def once(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Loaded:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in kept:
            with _ONE_AT_A_TIME:
                if key not in kept:
                    kept[key] = load(*args, **kwargs)
        return kept[key]

    return once
