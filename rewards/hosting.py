"""Where reward calls run: a thread with an event loop, replaced when a call does not come back."""

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

_MAX_LEFT_BEHIND = 3
_BLOCKED_AFTER = 2.0
"""An async call is cancelled at its time limit. If it has not ended at this many times the limit,
it blocks the thread instead of awaiting, and is left behind."""


class CallTimeout(Exception):
    """A call did not end within its time limit."""


class HostBusy(Exception):
    """Too many earlier calls have not come back."""


class CallHost:
    """Runs the calls of one reward, plain functions in turn and coroutines together.

    One event loop is kept for all calls, so that a client made at the first call (an HTTP session)
    still works at the next one.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._loop: _Loop | None = None
        self._left_behind: list[_Loop] = []

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return for each call what it returned, or the exception that it ended with."""
        results: list[Any] = [None] * len(calls)
        awaited: list[tuple[int, _Loop, concurrent.futures.Future[Any]]] = []
        for index, call in enumerate(calls):
            loop = self._ready_loop()
            if loop is None:
                results[index] = HostBusy(
                    f"{_MAX_LEFT_BEHIND} earlier calls have not come back, so it is not called"
                )
                continue
            value = self._finish(loop, loop.submit(_called(call)), self._timeout_s)
            if inspect.isawaitable(value):
                awaited.append((index, loop, loop.submit(_awaited(value, self._timeout_s))))
            else:
                results[index] = value
        for index, loop, future in awaited:
            results[index] = self._finish(loop, future, _BLOCKED_AFTER * self._timeout_s)
        return results

    def close(self) -> None:
        """End the thread; those left behind are daemons and end with the process."""
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    def _finish(self, loop: "_Loop", future: "concurrent.futures.Future[Any]", limit: float) -> Any:
        done, _ = concurrent.futures.wait([future], limit)
        if done:
            return CallTimeout("it was cancelled") if future.cancelled() else future.result()
        loop.stop()
        self._left_behind.append(loop)
        if self._loop is loop:
            self._loop = None
        return _too_late(self._timeout_s)

    def _ready_loop(self) -> "_Loop | None":
        self._left_behind = [loop for loop in dict.fromkeys(self._left_behind) if loop.alive]
        if self._loop is None and len(self._left_behind) < _MAX_LEFT_BEHIND:
            self._loop = _Loop(f"reward-{self._name}")
        return self._loop


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, coroutine: Any) -> "concurrent.futures.Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """End the thread once the call it is in has come back."""
        if not self._stopped:
            self._stopped = True
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


async def _called(call: Callable[[], Any]) -> Any:
    """Call a function in the loop's thread. What it raises is returned, so the loop lives on."""
    try:
        return call()
    except Exception as error:
        return error
    except SystemExit as error:
        return RuntimeError(f"it called sys.exit({error.code})")


async def _awaited(awaitable: Any, timeout_s: float) -> Any:
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await awaitable
    except Exception as error:
        # A TimeoutError of the reward's own (a server that did not answer) keeps its message.
        return _too_late(timeout_s) if limit.expired() else error
    except SystemExit as error:
        return RuntimeError(f"it called sys.exit({error.code})")


def _too_late(timeout_s: float) -> CallTimeout:
    return CallTimeout(f"it did not return within {timeout_s:g} s")
