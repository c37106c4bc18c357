"""Drawing ahead: while the trainer updates, the engine samples the next step's tokens.

They come from the weights before the update, a policy lag of one step. Each token's log-prob is
that of the policy that drew it, so the per-token importance correction accounts for the lag.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy.sampling import Sampling
from rollout.engine import Engine, RolloutBatch

_REQUESTS, _TOKENS = "drawn_ahead.json", "drawn_ahead.safetensors"


@dataclass(frozen=True)
class Request:
    """The arguments of one call of `Engine.generate`."""

    prompt_ids: list[list[int]]
    n: int
    sampling: Sampling
    seeds: list[int]


class AheadEngine:
    """`Engine` around another one that runs beside the trainer (workers on Ray).

    A request that was drawn ahead is answered with what was drawn; any other goes to the engine.
    New weights wait until what is being drawn is done, so that no sample has two policies.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._drawn: list[tuple[Request, Future[RolloutBatch]]] = []

    @property
    def dtype(self) -> torch.dtype:
        """See `Engine`."""
        return self._engine.dtype

    def draw_ahead(self, requests: Sequence[Request]) -> None:
        """Begin to answer `requests` with the present weights, in place of earlier ones."""
        self._drawn = [
            (r, self._thread.submit(self._engine.generate, r.prompt_ids, r.n, r.sampling, r.seeds))
            for r in requests
        ]

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """See `Engine`."""
        asked = Request(prompt_ids, n, sampling, seeds)
        for request, batch in self._drawn:
            if request == asked:
                return batch.result()
        self._settle()
        return self._engine.generate(prompt_ids, n, sampling, seeds)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See `Engine`."""
        self._settle()
        self._engine.load_weights(named_tensors, step)

    def fingerprint(self) -> str:
        """See `Engine`."""
        self._settle()
        return self._engine.fingerprint()

    def close(self) -> None:
        """See `Engine`."""
        self._thread.shutdown(cancel_futures=True)
        self._engine.close()

    def save(self, folder: Path) -> None:
        """Write what is drawn ahead: a resumed run cannot draw it again, its weights are gone."""
        batches = self._settle()
        requests = [asdict(request) for request, _ in self._drawn]
        (folder / _REQUESTS).write_text(json.dumps(requests), encoding="utf-8")
        tensors = {f"completion_ids.{i}": batch.completion_ids for i, batch in enumerate(batches)}
        tensors |= {f"logprobs.{i}": batch.behaviour_logprobs for i, batch in enumerate(batches)}
        save_file(tensors, folder / _TOKENS)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote; a run that drew nothing ahead so far has nothing there."""
        if not (folder / _REQUESTS).is_file():
            return
        tensors = load_file(folder / _TOKENS)
        self._drawn = []
        for i, facts in enumerate(json.loads((folder / _REQUESTS).read_text(encoding="utf-8"))):
            request = Request(**facts | {"sampling": Sampling(**facts["sampling"])})
            batch: Future[RolloutBatch] = Future()
            prompts = [ids for ids in request.prompt_ids for _ in range(request.n)]
            batch.set_result(
                RolloutBatch(prompts, tensors[f"completion_ids.{i}"], tensors[f"logprobs.{i}"])
            )
            self._drawn.append((request, batch))

    def _settle(self) -> list[RolloutBatch]:
        """Wait for the engine; return what was drawn ahead."""
        return [batch.result() for _, batch in self._drawn]
