"""Reward calls in processes of their own: a hang is killed, a crash costs one call."""

import asyncio
import importlib
import inspect
import multiprocessing
import os
import queue
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from common.errors import RewardError
from common.heavy import prepare_torchvision
from rewards.contract import RewardFunction
from rewards.hosting import CLOSED, Call
from rewards.outcomes import Lost, Outcome, Patience, outcome_of, told, too_late
from rewards.plugins import load_reward

_START_SECONDS = 120.0
"""Longest time for a process to start and load its reward; one on a busy machine takes seconds."""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


@dataclass(frozen=True)
class _Task:
    """What a process needs to load a reward; `module` has the function if no file does."""

    use: str
    module: str
    args: Mapping[str, Any]


class WorkerHost:
    """Runs the calls of one reward in `count` processes, one call at a time in each.

    They start at the first call and again after a kill. `use` is as for `load_reward`, with the
    path of a file in full. Raises RewardError for a function that another process cannot import or
    arguments that cannot be sent to it.
    """

    def __init__(self, function: RewardFunction, use: str, timeout_s: float, count: int) -> None:
        module = function.function.__module__
        if module == "__main__":
            raise RewardError(
                f"reward `{function.name}` is defined in the running script, which a worker "
                "process cannot import. Fix: put it in a file and use `file.py:function`."
            )
        task = _Task(use, module, function.args)
        try:
            ForkingPickler.dumps(task)
        except Exception as error:  # there is no class for all that cannot be sent
            raise RewardError(
                f"reward `{function.name}`: its arguments cannot be sent to a worker process "
                f"({error}). Fix: give numbers, texts, lists and mappings, or leave `workers` out."
            ) from error
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(task, timeout_s) for _ in range(count)]
        self._busy: set[_Worker] = set()
        self._closed = False
        for worker in self._workers:
            self._idle.put(worker)
        self._drivers = ThreadPoolExecutor(count, thread_name_prefix=f"reward-{function.name}")

    def run(self, calls: Sequence[Call], patience: Patience) -> list[Outcome]:
        """Return what each call came to, in order."""
        if self._closed:
            return [CLOSED] * len(calls)
        return list(self._drivers.map(lambda call: self._run_one(call, patience), calls))

    def close(self) -> None:
        """End the processes, at once those that have a call under way."""
        self._closed = True
        for worker in list(self._busy):
            worker.kill()
        self._drivers.shutdown()
        for worker in self._workers:
            worker.stop()

    def _run_one(self, call: Call, patience: Patience) -> Outcome:
        worker = self._idle.get()
        self._busy.add(worker)  # before the look at `_closed`: what is busy then, `close` kills
        try:
            if patience.over or self._closed:
                return CLOSED if self._closed else patience.reason
            outcome = worker.run(call)
            patience.note(outcome)
            return outcome
        finally:
            self._busy.discard(worker)
            self._idle.put(worker)


class _Worker:
    """One process and this end of the pipe to it."""

    def __init__(self, task: _Task, timeout_s: float) -> None:
        self._task = task
        self._timeout_s = timeout_s
        self._killed = False
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def run(self, call: Call) -> Outcome:
        try:
            if self._pipe is None:
                problem = self._start()
                if problem:
                    return problem
            assert self._pipe is not None
            self._pipe.send(call)
            if not self._pipe.poll(self._timeout_s):
                self.stop()
                return too_late(self._timeout_s)
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            return Lost(f"its process ended with code {self.stop()}")
        except Exception as error:  # a column that cannot be sent; what was sent in part is lost
            self.stop()
            return told(error)

    def kill(self) -> None:
        """End the process under a call, which so comes back; safe from another thread.

        No call is made afterwards, also if the process was just being started.
        """
        self._killed = True
        if (process := self._process) is not None:
            process.kill()

    def stop(self) -> int | None:
        """Kill the process and return its exit code, that of a crash before the kill if any."""
        if self._process is None or self._pipe is None:
            return None
        self._pipe.close()
        self._process.join(0.2)  # time to end by itself: its pipe is shut
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        code = self._process.exitcode
        self._process = self._pipe = None
        return code

    def _start(self) -> str:
        """Start the process; return "" or why it cannot load the reward."""
        context = multiprocessing.get_context("spawn")
        pipe, far_end = context.Pipe()
        process = context.Process(target=_work, args=(far_end, self._task), daemon=True)
        process.start()
        self._pipe, self._process = pipe, process
        far_end.close()  # so that its end is seen here
        if self._killed:
            self.stop()
            return Lost(CLOSED)
        if not self._pipe.poll(_START_SECONDS):
            self.stop()
            return Lost(f"its process did not start within {_START_SECONDS:g} s")
        problem: str = self._pipe.recv()
        if problem:
            self.stop()
        return Lost(problem)


def _work(pipe: Connection, task: _Task) -> None:
    """Load the reward and answer calls until the other end of the pipe is shut."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends us in its time
    # Before the reward's libraries are imported: several processes with a thread for each core
    # each make one another many times slower.
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    loop = asyncio.new_event_loop()
    try:
        prepare_torchvision()
        if ":" not in task.use:
            importlib.import_module(task.module)  # a decorator there may give it its name
        function = load_reward(task.use, **task.args)
    except (Exception, SystemExit) as error:
        pipe.send(told(error))
        return
    pipe.send("")
    while True:
        try:
            call: Call = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(function, call, loop))


def _answer(function: RewardFunction, call: Call, loop: asyncio.AbstractEventLoop) -> Outcome:
    async def awaited(value: Any) -> Any:
        return await value

    try:
        value = function(list(call.images), list(call.prompts), **call.columns)
        if inspect.isawaitable(value):
            value = loop.run_until_complete(awaited(value))
        return outcome_of(value, len(call.images))
    except BaseException as error:  # as in a thread; Ctrl-C does not reach this process
        return told(error, function.function)
