"""What TRL sees of the rewards: one function for each, which together score the pictures once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Column = Callable[..., list[float | None]]


def reward_columns(
    score: Callable[..., Sequence[Mapping[str, float] | None]], names: Sequence[str]
) -> list[Column]:
    """Return a reward function in TRL's sense for each name, called after it.

    TRL calls them in this order with the same arguments. The first call scores all rewards side by
    side; each function returns its own of what `score` returned for each picture: 0 where a reward
    does not count, and None throughout a picture that could not be scored, which TRL leaves out.
    """
    last: list[Mapping[str, float] | None] = []

    def column(index: int, name: str) -> Column:
        def values(**given: Any) -> list[float | None]:
            if index == 0:
                last[:] = score(**given)
            return [None if counted is None else counted.get(name, 0.0) for counted in last]

        values.__name__ = name
        return values

    return [column(index, name) for index, name in enumerate(names)]
