"""Engines in Ray actors as one: prompts are divided, weights go to all.

An actor holds the weights of the last push before it samples, and has proved that they are those of
the others: with them after the push, or by itself if it joined later or was not asked then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from policy.sampling import Sampling
from rollout.actors import ActorPool
from rollout.cluster import Placement
from rollout.engine import Engine, RolloutBatch, WeightMismatch, check_request
from rollout.micro_batch import Events
from rollout.timeline import Interval
from rollout.weight_transfer import WeightTransfer
from rollout.weights import Push, as_mapping


class RayPool:
    """`Engine` over several actors.

    Args:
        build: makes one actor's engine, which tells a list what belongs into the journal; it is
            called there and must be picklable.
        placement: how many actors, and where.
        dtype: type in which the engines hold their weights.
        events: where each loss is noted and what the engines tell; `busy`: when each actor was at
            work.
        weight_transfer: vLLM's own way for weights; None: Ray's object store.
    """

    def __init__(
        self,
        build: Callable[[Events], Engine],
        placement: Placement,
        dtype: torch.dtype,
        events: Events | None = None,
        busy: list[Interval] | None = None,
        weight_transfer: Literal["nccl", "ipc"] | None = None,
    ) -> None:
        self._dtype = dtype
        self._push: Push | None = None
        self._pushed: dict[str, Tensor] = {}
        self._transfer = (
            WeightTransfer(weight_transfer, dtype, placement.timeout_s) if weight_transfer else None
        )
        self._events = [] if events is None else events
        arguments = (build, placement.threads)
        self.actors = ActorPool(
            SamplingActor, arguments, placement, self._events, busy, self._store
        )
        self._workers = placement.workers

    @property
    def dtype(self) -> torch.dtype:
        """See `Engine`."""
        return self._dtype

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """See `Engine`. Divided into runs of neighbouring prompts, whole groups, one an actor."""
        check_request(prompt_ids, n, seeds)
        shares = np.array_split(np.arange(len(prompt_ids)), min(self._workers, len(prompt_ids)))
        pieces = [
            (
                self._push,
                [prompt_ids[i] for i in share],
                n,
                sampling,
                seeds[share[0] * n : (share[-1] + 1) * n],
            )
            for share in shares
        ]
        answers = self.actors.answers("generate", pieces)
        self._events += [e | {"worker": number} for number, (_, told) in answers for e in told]
        parts = [part for _, (part, _) in answers]
        return RolloutBatch(
            prompt_ids=[ids for part in parts for ids in part.prompt_ids],
            completion_ids=torch.cat([part.completion_ids for part in parts]),
            behaviour_logprobs=torch.cat([part.behaviour_logprobs for part in parts]),
        )

    def probe(self, prompt_ids: list[list[int]], length: int) -> dict[str, RolloutBatch]:
        """See `Engine`. Every actor that is ready draws all of them."""
        found = self.actors.on_all("probe", self._push, prompt_ids, length)
        return {f"rollout worker {number}": batch for number, batch in found.items()}

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See `Engine`. In Ray's object store the tensors are stored once, and all read them there.

        vLLM's weight transfer brings them to those that are there; who comes later reads them from
        the store, where they are put only then.
        """
        self._pushed = {}  # those of the last push go before these are merged
        tensors = self._pushed = as_mapping(named_tensors)
        number = self._push.number + 1 if self._push else 1
        self._push = Push(number, step, [])
        if self._transfer:
            self.actors.on_all("catch_up", None)  # are they all there?
            if present := self.actors.present():
                self._transfer.send(present, tensors, self._push)
        if self._transfer is None or self.actors.awaited:
            self._store()
        self.actors.on_all("catch_up", self._push)

    def _store(self) -> None:
        """Put the weights of the last push where every worker can read them."""
        import ray

        if self._push is not None and not self._push.packed:
            packed = {name: _pack(tensor) for name, tensor in self._pushed.items()}
            self._push.packed.append(ray.put(packed))
            self._pushed = {}

    def fingerprint(self) -> str:
        """See `Engine`. Raises `WeightMismatch` if the actors differ."""
        holders: dict[str, list[int]] = {}
        for number, found in self.actors.on_all("fingerprint", self._push).items():
            holders.setdefault(found, []).append(number)
        if len(holders) > 1:
            told = "; ".join(f"{value[:12]}: {numbers}" for value, numbers in holders.items())
            raise WeightMismatch(
                f"rollout workers hold different weights (fingerprints, and by which workers: "
                f"{told}); stop: their samples would not come from one policy"
            )
        [fingerprint] = holders
        if self._push is not None:
            self._push = replace(self._push, fingerprint=fingerprint)
        return fingerprint

    def close(self) -> None:
        """See `Engine`."""
        if self._transfer:
            self._transfer.close()
        self.actors.close()


class SamplingActor:
    """One engine in a process of its own."""

    def __init__(self, build: Callable[[Events], Engine], threads: int) -> None:
        torch.set_num_threads(threads)
        self.events: Events = []
        self.engine = build(self.events)
        self.loaded = self.proved = 0  # numbers of pushes

    def catch_up(self, push: Push | None) -> None:
        """Load the last push if that is not done; what the others hold must be the same.

        An actor that was not asked for its fingerprint, because it was not there or was not known
        to be, proves here that it holds what the others do.
        """
        import ray

        if push is None:
            return
        if self.loaded != push.number:
            packed = ray.get(push.packed[0])
            self.engine.load_weights(((name, _unpack(*p)) for name, p in packed.items()), push.step)
            self.loaded = push.number
        if push.fingerprint is None or self.proved == push.number:
            return
        if (found := self.engine.fingerprint()) != push.fingerprint:
            raise WeightMismatch(
                "a worker that joins the others, or that was not asked with them, holds other "
                f"weights (fingerprints {found[:12]} and {push.fingerprint[:12]})"
            )
        self.proved = push.number

    def generate(
        self,
        push: Push | None,
        prompt_ids: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[int],
    ) -> tuple[RolloutBatch, Events]:
        """See `Engine`; with what the engine tells the journal."""
        self.catch_up(push)
        batch = self.engine.generate(prompt_ids, n, sampling, seeds)
        told, self.events[:] = list(self.events), []
        return batch, told

    def transfer(self, call: str, argument: Any) -> None:
        """See `VllmEngine.transfer`."""
        self.engine.transfer(call, argument)  # type: ignore[attr-defined]

    def transferred(self, push: Push) -> None:
        """Compute with what was received."""
        self.transfer("finish", push.step)
        self.loaded = push.number

    def probe(self, push: Push | None, prompt_ids: list[list[int]], length: int) -> RolloutBatch:
        """See `Engine`."""
        self.catch_up(push)
        [batch] = self.engine.probe(prompt_ids, length).values()
        return batch

    def fingerprint(self, push: Push | None) -> str:
        """See `Engine`."""
        self.catch_up(push)
        self.proved = self.loaded
        return self.engine.fingerprint()


def _pack(tensor: Tensor) -> tuple[np.ndarray, str]:
    """Ray shares numpy arrays between processes without a copy; numpy has no bfloat16."""
    flat = tensor.detach().cpu().contiguous()
    return flat.view(torch.uint8).numpy(), str(flat.dtype)


def _unpack(array: np.ndarray, dtype: str) -> Tensor:
    # Shared memory is read-only: an engine that wrote into it would write into all.
    return torch.from_numpy(array.copy()).view(getattr(torch, dtype.removeprefix("torch.")))
