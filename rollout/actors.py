"""Actors on Ray that share the work of a stage: what a lost one was doing, others do.

A piece of work is the arguments of one call; whichever actor is free takes the next one. What an
actor that died or hung was doing goes to another, and a new actor is started in its place, which
joins when it is ready: with a machine gone for good that is never, and the others do all. What
comes of a piece should depend on its arguments alone, so that a loss changes no number; rewards do
so but for an outage, which each actor's runner remembers. Every piece is taken exactly once.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import RunError
from rollout.cluster import Placement
from rollout.micro_batch import Events
from rollout.timeline import Interval

MAX_LOSSES = 3
"""A piece of work that loses more actors stops the run: that is no accident. An actor's place where
so many could not start in a row is given up."""

ANSWER_S = 5.0
"""Seconds for which an idle actor that is asked whether it is there is waited for; later it joins
by itself."""


class ActorPool:
    """Actors of one class, on the cluster that this process is connected to.

    Args:
        actor: the class; each is made with `arguments`, which must be picklable.
        placement: how many, and where.
        events: where each loss is noted.
        busy: where is noted when each actor was at work, as this process saw it.
        on_loss: called when an actor was lost and another is started in its place.
    """

    def __init__(
        self,
        actor: type,
        arguments: tuple[Any, ...],
        placement: Placement,
        events: Events | None = None,
        busy: list[Interval] | None = None,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        import ray

        self._class, self._arguments = ray.remote(actor), arguments
        self._placement = placement
        self._events = [] if events is None else events
        self._busy = [] if busy is None else busy
        self._on_loss = on_loss
        self.replaced = 0
        """Actors that were lost and replaced since the start."""
        self._failed_starts: Counter[int] = Counter()  # in a row
        self._given_up: set[int] = set()
        self._starting: dict[Any, int] = {}
        self._asked: dict[int, float] = {}
        """Of those who was ready, and when it was asked to say that it is there."""
        self._free: list[int] = []
        self._lock = threading.RLock()
        """Held while actors come and go, for another thread may close the pool."""
        self.handles = [self._new(number) for number in range(placement.workers)]
        """The actors by number, also those that are not ready yet."""

    def await_ready(self) -> None:
        """Wait until all actors are there; RunError if one cannot be made.

        Calls wait for the actors that they need, but only here is it seen that some never come.
        """
        import ray

        section, limit = self._placement.section, self._placement.timeout_s
        while self._starting:
            ready, _ = ray.wait(list(self._starting), timeout=limit)
            if not ready:
                raise RunError(
                    f"{len(self._starting)} of {len(self.handles)} {section} workers did not start "
                    f"within {limit:g} s.\n"
                    f"    Fix: raise {section}.ray.timeout_s, or see `ray status`."
                )
            self._join(ready[0], first=True)

    def run(self, method: str, pieces: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `method` with each piece and return the results in order.

        What a call raises is raised here, when no other call is running any more.
        """
        return [answer for _, answer in self.answers(method, pieces)]

    def answers(self, method: str, pieces: Sequence[tuple[Any, ...]]) -> list[tuple[int, Any]]:
        """`run`, each result with the number of the actor that it comes from."""
        results = self._call(method, pieces, Counter(), again=True)
        return [results[index] for index in range(len(pieces))]

    def on_all(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Call `method` on every actor that is ready and return what they answer, by number.

        At least one does; one that is lost meanwhile or joins later is left out.
        """
        self.present()
        losses: Counter[int] = Counter()
        results: dict[int, tuple[int, Any]] = {}
        while not results:
            everyone = [arguments] * max(1, len(self._free))
            results = self._call(method, everyone, losses, again=False)
        return dict(sorted(results.values()))

    def present(self) -> list[Any]:
        """Return the handles of the actors that are ready; those that became it are taken in."""
        import ray

        while self._starting:
            until = max(self._asked.values(), default=-ANSWER_S) + ANSWER_S
            left = max(0.0, until - time.perf_counter())
            ready, _ = ray.wait(list(self._starting), timeout=left)
            found = ready or self._overdue({})
            if not found:
                break
            self._join(found[0])
        return [self.handles[number] for number in sorted(self._free)]

    @property
    def awaited(self) -> bool:
        """Whether actors are to join that are not ready yet."""
        return bool(self._starting)

    def close(self) -> None:
        """End the actors."""
        import ray

        with self._lock:
            handles, self.handles = self.handles, []  # a call in another thread stops by it
            self._starting, self._asked, self._free = {}, {}, []
        for handle in handles:
            ray.kill(handle)

    # --- calls ------------------------------------------------------------------------------------

    def _call(
        self, method: str, pieces: Sequence[tuple[Any, ...]], losses: Counter[int], again: bool
    ) -> dict[int, tuple[int, Any]]:
        """Return the results by piece, with the actors' numbers; a lost actor's piece is done
        again, or left out.

        `losses` counts the actors that each piece has lost.
        """
        import ray

        results: dict[int, tuple[int, Any]] = {}
        refusal: BaseException | None = None
        waiting = deque(range(len(pieces)))
        running: dict[Any, tuple[int, int, float]] = {}  # call -> actor, piece, when it began
        while waiting or running:
            with self._lock:
                handles = self._open()
                while waiting and self._free:
                    number, index = heapq.heappop(self._free), waiting.popleft()
                    call = getattr(handles[number], method).remote(*pieces[index])
                    running[call] = number, index, time.perf_counter()
            done = self._wait(running)
            self._open()
            for call in done or self._overdue(running):
                if call not in running:  # an actor is ready
                    self._join(call)
                    continue
                number, index, began = running.pop(call)
                name = f"{self._placement.section} worker {number}"
                try:
                    if not done:
                        raise self._no_answer()
                    results[index] = number, ray.get(call)
                except ray.exceptions.RayTaskError as error:
                    # What one refuses, another would refuse as well.
                    refusal = error.cause
                    if refusal.args == (str(refusal),):
                        refusal.args = (f"{name}: {refusal}",)
                    else:  # its text is made of more
                        refusal.add_note(f"in {name}")
                    waiting.clear()
                except ray.exceptions.UnserializableException as error:  # refused as well
                    refusal = RunError(f"{name} failed: {error}")
                    waiting.clear()
                except ray.exceptions.RayError as error:  # dead, out of memory, lost, hung
                    losses[index] += 1
                    if losses[index] > MAX_LOSSES:
                        raise self._too_many(number, method, error) from error
                    self._lose(number, method, error)
                    self._ask_idle()
                    if again and refusal is None:
                        waiting.appendleft(index)
                    continue
                row = f"{self._placement.section} {number}"
                self._busy.append(Interval(row, 0, began, time.perf_counter()))
                heapq.heappush(self._free, number)
        if refusal is not None:
            raise refusal
        return results

    def _wait(self, running: dict[Any, tuple[int, int, float]]) -> list[Any]:
        """Wait for a call that is done or an actor that is ready; none if a call takes too long."""
        import ray

        limit, now = self._placement.timeout_s, time.perf_counter()
        asked = [*(began for *_, began in running.values()), *self._asked.values()]
        oldest = min(asked, default=now)
        done, _ = ray.wait([*running, *self._starting], timeout=max(0.0, oldest + limit - now))
        if not done and not asked:
            raise RunError(
                f"there is no {self._placement.section} worker, and none started within {limit:g} "
                "s.\n    Fix: give the cluster room for them; then `atelier resume` goes on."
            )
        found: list[Any] = done
        return found

    def _overdue(self, running: dict[Any, tuple[int, int, float]]) -> list[Any]:
        end = time.perf_counter() - self._placement.timeout_s
        late = {number for number, asked in self._asked.items() if asked <= end}
        idle = [call for call, number in self._starting.items() if number in late]
        return idle + [call for call, (*_, began) in running.items() if began <= end]

    # --- losses -----------------------------------------------------------------------------------

    def _new(self, number: int) -> Any:
        placement = self._placement
        named = {placement.resource: 1} if placement.resource else None
        handle = self._class.options(
            num_cpus=placement.cpus, num_gpus=placement.gpus, resources=named
        ).remote(*self._arguments)
        self._starting[handle.__ray_ready__.remote()] = number
        return handle

    def _join(self, ready: Any, first: bool = False) -> None:
        """Take in an actor that is ready, or start another; `first`: unless it cannot be made."""
        import ray

        with self._lock:
            self._open()
            number = self._starting.pop(ready)
            during = "start" if self._asked.pop(number, None) is None else "idle"
        try:
            if not ray.wait([ready], timeout=0)[0]:
                raise self._no_answer()
            ray.get(ready)
        except ray.exceptions.RayError as error:
            if first and getattr(error, "actor_init_failed", False):
                section = self._placement.section
                raise RunError(f"{section} worker {number} cannot start: {_told(error)}") from None
            self._failed_starts[number] += during == "start"
            self._lose(number, during, error)
        else:
            del self._failed_starts[number]
            heapq.heappush(self._free, number)

    def _ask_idle(self) -> None:
        """Let idle actors say that they are there, before they are given what others lost."""
        with self._lock:
            handles = self._open()
            self._asked.update(dict.fromkeys(self._free, time.perf_counter()))
            for number in self._free:
                self._starting[handles[number].__ray_ready__.remote()] = number
            self._free.clear()

    def _lose(self, number: int, during: str, error: Exception) -> None:
        """Start a new actor in a lost one's place, or give the place up; some must be left."""
        import ray

        with self._lock:
            handles = self._open()
            self._events.append(
                {
                    "event": "worker_replaced",
                    "section": self._placement.section,
                    "worker": number,
                    "during": during,
                    "reason": str(error).splitlines()[0],
                }
            )
            ray.kill(handles[number])
            if self._failed_starts[number] > MAX_LOSSES:
                self._events[-1]["event"] = "worker_given_up"
                self._given_up.add(number)
                if len(self._given_up) == len(handles):
                    raise self._too_many(number, during, error) from error
                return
            self.replaced += 1
            handles[number] = self._new(number)
            self._on_loss()

    def _open(self) -> list[Any]:
        """Return the actors' handles; RunError if the pool was closed."""
        if not self.handles:
            raise RunError(f"the {self._placement.section} workers were closed")
        return self.handles

    def _no_answer(self) -> Exception:
        from ray.exceptions import GetTimeoutError

        return GetTimeoutError(f"no answer for {self._placement.timeout_s:g} s")

    def _too_many(self, number: int, during: str, error: Exception) -> RunError:
        return RunError(
            f"more than {MAX_LOSSES} {self._placement.section} workers were lost in the same "
            f"`{during}`; the last, worker {number}: {error}\n"
            "    Fix: if memory ran out, give workers fewer images at a time (rollout.waves, "
            "train.micro_batch) or more room; then `atelier resume` goes on."
        )


def _told(error: Exception) -> str:
    """Return what an actor was refused for, without Ray's traceback; that of a fault stays."""
    _, ours, refusal = str(error).rpartition("\ncommon.errors.")
    return refusal.partition(": ")[2] if ours else str(error)
