"""How many samples a stage takes at a time, and what happens when memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from common.errors import RunError

T = TypeVar("T")
Events = list[dict[str, Any]]
"""What happened and belongs into the run's journal, each with its "event"; the run empties it."""

MAX_HALVINGS = 3
"""After these a stage gives up: what an eighth of the work does not fit is not a matter of size."""


class MicroBatch:
    """The size of a stage's pieces: halved when memory runs out, three times at most.

    Args:
        stage: its name, for the journal and the error.
        size: samples at a time at the start; None = all.
        advice: the fix that the error names after the last halving.
        events: where each halving is noted.
    """

    def __init__(self, stage: str, size: int | None, advice: str, events: Events) -> None:
        self.stage = stage
        self.size = size
        self._advice = advice
        self._events = events
        self._halvings = 0

    def attempt(self, count: int, work: Callable[[int], T]) -> T:
        """Return `work(size)` for `count` samples; if memory runs out, do it again with half.

        Raises RunError when halving does not help; what else `work` raises is passed on.
        """
        while True:
            size = min(self.size or count, count)
            try:
                return work(size)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Outside of `except`, where the error would keep the failed attempt's tensors alive.
            self._halve(size, reason)

    def _halve(self, size: int, reason: str) -> None:
        from accelerate.utils.memory import clear_device_cache

        if self._halvings == MAX_HALVINGS or size == 1:
            raise RunError(
                f"the stage `{self.stage}` ran out of memory with {size} samples at a time, after "
                f"{self._halvings} halvings ({reason}).\n"
                f"    Fix: {self._advice}; then `atelier resume` goes on."
            )
        clear_device_cache()
        self._halvings += 1
        self.size = -(-size // 2)
        self._events.append(
            {
                "event": "micro_batch_halved",
                "stage": self.stage,
                "micro_batch": self.size,
                "reason": reason,
            }
        )


@contextmanager
def memory_advice(where: str, fix: str) -> Iterator[None]:
    """Turn running out of memory inside into a RunError that says where, and the fix."""
    try:
        yield
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise RunError(f"{where} ran out of memory ({reason}).\n    Fix: {fix}.") from error


def pieces(count: int, size: int) -> list[slice]:
    """Return slices of at most `size` that cover `count` samples."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _out_of_memory(error: RuntimeError) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
