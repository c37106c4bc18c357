"""Waves through stages, one after the other or like on an assembly line.

Both give the same results: a stage sees the same waves in the same order, one at a time, whatever
its neighbours do meanwhile. Threads are enough, because torch, ONNX and a wait for another process
let other threads run.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")
Stage = Callable[[T], T]


def in_turn(stages: Sequence[Stage[T]], waves: Sequence[T]) -> list[T]:
    """Return each wave after all stages, the next one begun when the one before is done."""
    done = []
    for wave in waves:
        for stage in stages:
            wave = stage(wave)
        done.append(wave)
    return done


def overlapped(stages: Sequence[Stage[T]], waves: Sequence[T]) -> list[T]:
    """Return the same while neighbouring stages work on neighbouring waves.

    The first stage runs in the caller's thread, each other one in a thread of its own. At most as
    many waves as there are stages are under way: a wave waits until there is room for it. The first
    exception of a stage ends the work and is raised here.
    """
    first, *others = stages
    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in others]
        under_way: list[Future[T]] = []
        for wave in waves:
            if len(under_way) >= len(stages):
                under_way[-len(stages)].result()
            passed: Future[T] = Future()
            passed.set_result(first(wave))
            for thread, stage in zip(threads, others, strict=True):
                passed = thread.submit(_next, stage, passed)
            under_way.append(passed)
        return [wave.result() for wave in under_way]


def _next(stage: Stage[T], passed: Future[T]) -> T:
    return stage(passed.result())
