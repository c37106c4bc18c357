"""Where reward calls run: a thread with an event loop, replaced when a call does not come back."""

import asyncio
import concurrent.futures
import contextlib
import inspect
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rewards.contract import RewardFunction
from rewards.outcomes import Outcome, Patience, outcome_of, told, too_late

_MAX_LEFT_BEHIND = 32
"""Each is a thread that nothing can stop. One that waits costs little, but one that computes in
Python takes its share of the interpreter from the whole run until the run ends."""
_BLOCKED = (
    f"{_MAX_LEFT_BEHIND} earlier calls have not come back, so it is not called until one does. "
    "Fix: run it with `workers: 1`, where such calls are ended"
)
CLOSED = "the rewards were closed meanwhile"
_BLOCKED_AFTER = 2.0
"""An async call is cancelled at its time limit. If it has not ended at this many times the limit,
it blocks the thread instead of awaiting, and is left behind."""


@dataclass(frozen=True)
class Call:
    """The pictures of one call, with their prompts and the other columns of their records."""

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Any]]


class Host(Protocol):
    """Runs the calls of one reward."""

    def run(self, calls: Sequence[Call], patience: Patience) -> list[Outcome]:
        """Return what each call came to, in order; nothing that a reward does is raised.

        Once `patience` is over, no further calls are made.
        """

    def close(self) -> None:
        """Give threads or processes back; calls that are under way are waited for no longer."""


class ThreadHost:
    """Runs the calls of one reward, plain functions in turn and coroutines together.

    When a coroutine blocked the thread instead of awaiting, the calls after it are made in turn
    too, so that it takes no others along.

    One event loop is kept for all calls, so that a client made at the first call (an HTTP session)
    still works at the next one. On a GPU, the thread's work goes to a CUDA stream of its own, so
    that rewards do not wait for one another.
    """

    def __init__(self, function: RewardFunction, timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._loop: LoopThread | None = None
        self._left_behind: list[LoopThread] = []
        self._blocked = False
        self._closed = concurrent.futures.Future[None]()

    def run(self, calls: Sequence[Call], patience: Patience) -> list[Outcome]:
        """Return what each call came to, in order."""
        results: list[Any] = [None] * len(calls)
        in_turn, self._blocked = self._blocked, False
        awaited: list[tuple[int, LoopThread, concurrent.futures.Future[Any]]] = []
        for index, call in enumerate(calls):
            if self._closed.done():
                results[index] = CLOSED
                continue
            loop = self._ready_loop()
            if loop is None or patience.over:
                results[index] = patience.reason if loop else _BLOCKED
                continue
            value = self._finish(loop, loop.submit(_called(self._function, call)), self._timeout_s)
            if inspect.isawaitable(value):
                future = loop.submit(
                    _awaited(self._function.function, value, len(call.images), self._timeout_s)
                )
                if not in_turn:
                    awaited.append((index, loop, future))
                    continue
                value = self._finish(loop, future, _BLOCKED_AFTER * self._timeout_s)
            results[index] = value
            patience.note(value)
        # One limit for all, since they wait together: a loop that is blocked ends none of them.
        end = time.monotonic() + _BLOCKED_AFTER * self._timeout_s
        for index, loop, future in awaited:
            results[index] = self._finish(loop, future, max(0.0, end - time.monotonic()))
        return results

    def close(self) -> None:
        """End the thread; those left behind are daemons and end with the process."""
        if not self._closed.done():
            self._closed.set_result(None)
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    def _finish(
        self, loop: "LoopThread", future: "concurrent.futures.Future[Any]", limit: float
    ) -> Any:
        either = (future, self._closed)
        concurrent.futures.wait(either, limit, concurrent.futures.FIRST_COMPLETED)
        if future.done():
            return "it was cancelled" if future.cancelled() else future.result()
        loop.stop()
        self._left_behind.append(loop)
        self._blocked = True
        if self._loop is loop:
            self._loop = None
        return CLOSED if self._closed.done() else too_late(self._timeout_s)

    def _ready_loop(self) -> "LoopThread | None":
        self._left_behind = [loop for loop in dict.fromkeys(self._left_behind) if loop.alive]
        if self._loop is not None and not self._loop.alive:
            self._loop = None
        if self._loop is None and len(self._left_behind) < _MAX_LEFT_BEHIND:
            self._loop = LoopThread(f"reward-{self._function.name}")
        return self._loop


class LoopThread:
    """An event loop in a daemon thread, which the interpreter's end does not wait for."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, coroutine: Any) -> "concurrent.futures.Future[Any]":
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the reward has stopped it, and it is closed
            coroutine.close()
            return concurrent.futures.Future()  # of a call that does not come back

    def stop(self) -> None:
        """End the thread once the call it is in has come back."""
        if not self._stopped:
            self._stopped = True
            with contextlib.suppress(RuntimeError):  # as above
                self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


async def _called(function: RewardFunction, call: Call) -> Any:
    """Call a function in the loop's thread. What it raises is told, so the loop lives on.

    The reward gets copies of its own. They are made, and a tensor that it returns is read, here:
    the thread's CUDA stream is in force.
    """
    try:
        _use_own_stream()
        columns = {key: [_private(item) for item in x] for key, x in call.columns.items()}
        images = [image.copy() for image in call.images]
        value = function(images, list(call.prompts), **columns)
        return value if inspect.isawaitable(value) else outcome_of(value, len(call.images))
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception; Ctrl-C is not here
        return told(error, function.function)


async def _awaited(
    function: Callable[..., Any], awaitable: Any, length: int, timeout_s: float
) -> Outcome:
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return outcome_of(await awaitable, length)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        # A TimeoutError of the reward's own (a server that did not answer) keeps its message.
        return too_late(timeout_s) if limit.expired() else told(error, function)


def _use_own_stream() -> None:
    """Give this thread a CUDA stream of its own, once, where torch is in use on a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or getattr(torch.__spec__, "_initializing", False):  # another thread loads it
        return
    if not torch.cuda.is_available():
        return
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())


def _private(value: Any) -> Any:
    """Copy what a reward could change in place, so that the others see what they were given."""
    if isinstance(value, dict):
        return {key: _private(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_private(item) for item in value]
    if isinstance(value, Image.Image | np.ndarray):
        return value.copy()
    return value
