"""How the benchmarks measure: contenders take turns, ratios are paired, times are CPU seconds.

With one thread the CPU seconds of this process are what an idle core would show on the wall, and
they stay so while other programs share the core. Still, those programs empty its caches, so that
contenders are timed in turns (A B A B) and a ratio is the median over turns of two neighbours.
"""

import argparse
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

clock = time.process_time


@dataclass(frozen=True)
class Ratio:
    """How many times as good ours is as what it is compared with: larger is better."""

    name: str
    value: float
    scatter: float = 0.0
    """Standard error of `value`; 0 for what is counted, such as memory."""
    detail: str = ""


@dataclass(frozen=True)
class Times:
    """Seconds of each contender, one number a turn."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str, ours: str) -> Ratio:
        """Return how many times as fast `ours` is as `other`."""
        pairs = zip(self.seconds[other], self.seconds[ours], strict=True)
        turns = [a / b for a, b in pairs]
        detail = f"{_readable(self.median(ours))} against {_readable(self.median(other))}"
        return Ratio(name, statistics.median(turns), scatter(turns), detail)


def _readable(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def scatter(values: Sequence[float]) -> float:
    """Return the standard error of a median, from the median absolute deviation.

    1.4826 makes the deviation one of a normal distribution, whose median has an error 1.2533 times
    that of the mean.
    """
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * deviation / math.sqrt(len(values))


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    turns: int,
    clock: Callable[[], float] = clock,
) -> Times:
    """Call every contender once to warm up and then `turns` times, one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            gc.collect()
            started = clock()
            run()
            if turn:
                seconds[name].append(clock() - started)
    return Times(seconds)


def peak_memory(run: Callable[[], object]) -> float:
    """Return how many MB this process grew by at most while it ran."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def main(ratios: Callable[[int], list[Ratio]], doc: str | None, turns: int = 5) -> None:
    """Run one script: measure with one thread and print its ratios."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=turns)
    options = parser.parse_args()
    torch.set_num_threads(1)
    show(ratios(options.turns))


def show(rows: Sequence[Ratio]) -> None:
    """Print ratios as a table."""
    print(f"{'ours against':52}{'ratio':>8}{'+-':>8}  times")
    for row in rows:
        print(f"{row.name:52}{row.value:>8.2f}{row.scatter:>8.2f}  {row.detail}")
