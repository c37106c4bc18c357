"""When each stage of a step was at work: the data of a Gantt chart."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class Interval(NamedTuple):
    """A stage's work on one wave; `start` and `end` are seconds of `time.perf_counter`."""

    stage: str
    wave: int
    start: float
    end: float


class Timeline:
    """Collects intervals, from several threads at a time."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []

    @contextmanager
    def busy(self, stage: str, wave: int = 0) -> Iterator[None]:
        """Record the time spent inside; work that fails is not recorded."""
        start = time.perf_counter()
        yield
        self.intervals.append(Interval(stage, wave, start, time.perf_counter()))


def busy_seconds(intervals: Sequence[Interval]) -> dict[str, float]:
    """Return how long each stage was at work; with overlap the sum exceeds the time passed."""
    seconds: dict[str, float] = {}
    for stage, _, start, end in sorted(intervals, key=lambda interval: interval.start):
        seconds[stage] = seconds.get(stage, 0.0) + end - start
    return seconds
