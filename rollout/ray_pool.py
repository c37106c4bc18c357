"""Engines in Ray actors as one: prompts are divided, weights go to all, losses are made good.

A piece of work is the prompts of one worker in one call. A worker that dies or hangs is replaced,
the new one gets the weights of the last push, and the same piece with the same seeds is issued
again; what a sample is depends on its prompt and its seed alone, so nothing else changes. Every
piece is taken exactly once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import RunError
from policy.sampling import Sampling
from rollout.engine import Engine, RolloutBatch, WeightMismatch, check_request
from rollout.micro_batch import Events
from rollout.weights import as_mapping

MAX_REPLACEMENTS = 3
"""Workers replaced within one call before the run stops: more is no accident."""


@dataclass(frozen=True)
class Placement:
    """Where workers run.

    `address` joins a running Ray cluster ("auto" finds one on this machine); None starts one here
    and stops it at the end. CPUs and GPUs are per worker; a GPU may be shared (0.5).
    `timeout_s` is how long one call of a worker may take before it counts as hung.
    """

    workers: int
    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    timeout_s: float = 600


class RayPool:
    """`Engine` over several workers.

    Args:
        build: makes one worker's engine; it is called in the worker and must be picklable.
        placement: how many workers, and where.
        dtype: type in which the engines hold their weights.
        events: where each loss of a worker is noted.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        placement: Placement,
        dtype: torch.dtype,
        events: Events | None = None,
    ) -> None:
        import ray

        self._build = build
        self._placement = placement
        self._dtype = dtype
        self._pushed: tuple[Any, int] | None = None  # object reference and step of the last push
        self._fingerprint: str | None = None  # that all workers were seen to have after that
        self._owns_cluster = not ray.is_initialized()
        self._events = [] if events is None else events
        self.replaced = 0
        """Workers that were lost and replaced since the start."""
        self.workers: list[Any] = []
        if self._owns_cluster:
            _start(placement)
        try:
            _check_room(placement)
            self.workers = [self._new_worker() for _ in range(placement.workers)]
            self._on_all("ready")
        except BaseException:
            self.close()
            raise

    @property
    def dtype(self) -> torch.dtype:
        """See `Engine`."""
        return self._dtype

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """See `Engine`. Each worker gets a run of neighbouring prompts, whole groups of them."""
        check_request(prompt_ids, n, seeds)
        shares = np.array_split(np.arange(len(prompt_ids)), len(self.workers))
        pieces = [
            (
                [prompt_ids[i] for i in share],
                n,
                sampling,
                seeds[share[0] * n : (share[-1] + 1) * n],
            )
            for share in shares
            if len(share)
        ]
        parts = self._call("generate", pieces)
        return RolloutBatch(
            prompt_ids=[ids for part in parts for ids in part.prompt_ids],
            completion_ids=torch.cat([part.completion_ids for part in parts]),
            behaviour_logprobs=torch.cat([part.behaviour_logprobs for part in parts]),
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See `Engine`. The tensors are stored once; every worker reads them from there."""
        import ray

        packed = {name: _pack(tensor) for name, tensor in as_mapping(named_tensors).items()}
        self._pushed, self._fingerprint = (ray.put(packed), step), None
        self._on_all("load_weights", *self._pushed)

    def fingerprint(self) -> str:
        """See `Engine`. Raises `WeightMismatch` if the workers differ."""
        found = self._on_all("fingerprint")
        odd = [i for i, value in enumerate(found) if value != found[0]]
        if odd:
            raise WeightMismatch(
                f"workers 0 and {odd[0]} hold different weights (fingerprints {found[0][:12]} and "
                f"{found[odd[0]][:12]}); stop: their samples would not come from one policy"
            )
        self._fingerprint = found[0]
        return found[0]

    def close(self) -> None:
        """See `Engine`."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._owns_cluster:
            ray.shutdown()

    # --- calls and losses ------------------------------------------------------------------------

    def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        return self._call(method, [arguments] * len(self.workers))

    def _call(self, method: str, pieces: list[tuple[Any, ...]]) -> list[Any]:
        """Call `method` of worker i with piece i; return the results in order.

        A lost worker's piece is issued again to its replacement, every other one is left alone.
        """
        import ray

        results: dict[int, Any] = {}
        running = {
            getattr(self.workers[i], method).remote(*piece): i for i, piece in enumerate(pieces)
        }
        losses: list[str] = []
        while running:
            ready, _ = ray.wait(list(running), timeout=self._placement.timeout_s)
            # Nobody finished in time: all that are left have hung.
            for reference in ready or list(running):
                index = running.pop(reference)
                try:
                    if not ready:
                        raise ray.exceptions.GetTimeoutError(
                            f"no answer for {self._placement.timeout_s:g} s"
                        )
                    results[index] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    # What the engine itself refuses, another worker would refuse as well.
                    raise error.cause from None
                except ray.exceptions.RayError as error:  # dead, out of memory, lost, hung
                    if getattr(error, "actor_init_failed", False):
                        raise RunError(f"a rollout worker cannot start: {error}") from None
                    losses.append(f"worker {index}: {error}")
                    if len(losses) > MAX_REPLACEMENTS:
                        raise RunError(
                            f"{len(losses)} rollout workers were lost within one `{method}`; the "
                            f"last, {losses[-1]}\n"
                            "    Fix: if memory ran out, sample fewer images at a time or give "
                            "workers more room; then `atelier resume` goes on."
                        ) from error
                    self._events.append(
                        {
                            "event": "worker_replaced",
                            "worker": index,
                            "during": method,
                            "reason": str(error).splitlines()[0],
                        }
                    )
                    running[self._again(index, method, pieces[index])] = index
        return [results[i] for i in range(len(pieces))]

    def _again(self, index: int, method: str, piece: tuple[Any, ...]) -> Any:
        """Issue a lost worker's piece to a new one, which first loads the weights of the last push.

        During a push the piece is the weights; all workers are compared after it.
        """
        import ray

        ray.kill(self.workers[index])
        self.workers[index] = worker = self._new_worker()
        self.replaced += 1
        if self._pushed is None or method == "load_weights":
            return getattr(worker, method).remote(*piece)
        return worker.caught_up.remote(*self._pushed, self._fingerprint, method, *piece)

    def _new_worker(self) -> Any:
        import ray

        options = {"num_cpus": self._placement.cpus, "num_gpus": self._placement.gpus}
        threads = max(1, int(self._placement.cpus))
        return ray.remote(_Worker).options(**options).remote(self._build, threads)


class _Worker:
    """One engine in a process of its own."""

    def __init__(self, build: Callable[[], Engine], threads: int) -> None:
        torch.set_num_threads(threads)
        self.engine = build()

    def ready(self) -> None:
        """Answer once the engine is there."""

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        return self.engine.generate(prompt_ids, n, sampling, seeds)

    def load_weights(self, packed: dict[str, tuple[np.ndarray, str]], step: int) -> None:
        self.engine.load_weights(((name, _unpack(*p)) for name, p in packed.items()), step)

    def fingerprint(self) -> str:
        return self.engine.fingerprint()

    def caught_up(
        self, packed: Any, step: int, expected: str | None, method: str, *piece: Any
    ) -> Any:
        """Load the last push, prove that it arrived (if the others did), then do what was asked."""
        self.load_weights(packed, step)
        if expected is not None and (found := self.fingerprint()) != expected:
            raise WeightMismatch(
                f"a worker that replaces a lost one holds other weights than the rest "
                f"(fingerprints {found[:12]} and {expected[:12]})"
            )
        return getattr(self, method)(*piece)


def _pack(tensor: Tensor) -> tuple[np.ndarray, str]:
    """Ray shares numpy arrays between processes without a copy; numpy has no bfloat16."""
    flat = tensor.detach().cpu().contiguous()
    return flat.view(torch.uint8).numpy(), str(flat.dtype)


def _unpack(array: np.ndarray, dtype: str) -> Tensor:
    # Shared memory is read-only: an engine that wrote into it would write into all.
    return torch.from_numpy(array.copy()).view(getattr(torch, dtype.removeprefix("torch.")))


def _start(placement: Placement) -> None:
    """Start or join a cluster."""
    import ray

    if placement.address is not None:
        ray.init(address=placement.address, log_to_driver=False, configure_logging=False)
        return
    # Ray counts CPUs to place actors; a small machine must still hold all workers.
    needed = int(np.ceil(placement.workers * placement.cpus))
    ray.init(
        num_cpus=max(os.cpu_count() or 1, needed),
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )


def _check_room(placement: Placement) -> None:
    """Raise RunError where Ray would wait for room without end."""
    import ray

    free = ray.available_resources()
    for resource, each in (("CPU", placement.cpus), ("GPU", placement.gpus)):
        there, needed = free.get(resource, 0.0), placement.workers * each
        if needed > there:
            raise RunError(
                f"rollout.workers: {placement.workers} workers need {needed:g} {resource}s and "
                f"the Ray cluster has {there:g} free.\n"
                f"    Fix: use fewer workers, or lower rollout.ray.{resource.lower()}s_per_worker."
            )
