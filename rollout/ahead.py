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
from rollout.timeline import Interval, Timeline

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
        self._drawn_from = self._step = 0
        self._timeline = Timeline()
        self.sampled_from = 0
        """Step of the weights that drew the last answer."""

    @property
    def dtype(self) -> torch.dtype:
        """See `Engine`."""
        return self._engine.dtype

    def draw_ahead(self, requests: Sequence[Request]) -> None:
        """Begin to answer `requests` with the present weights, in place of earlier ones."""
        timeline = self._timeline = Timeline()

        def draw(request: Request, wave: int) -> RolloutBatch:
            with timeline.busy("ahead", wave):
                return self._generate(request)

        self._drawn = [(r, self._thread.submit(draw, r, i)) for i, r in enumerate(requests)]
        self._drawn_from = self._step

    def intervals(self) -> list[Interval]:
        """Return when the engine drew what it was last told to draw ahead; waits for the end."""
        self._settle()
        return self._timeline.intervals

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """See `Engine`."""
        asked = Request(prompt_ids, n, sampling, seeds)
        for request, batch in self._drawn:
            if request == asked:
                self.sampled_from = self._drawn_from
                return batch.result()
        self._settle()
        self.sampled_from = self._step
        return self._generate(asked)

    def probe(self, prompt_ids: list[list[int]], length: int) -> dict[str, RolloutBatch]:
        """See `Engine`."""
        self._settle()
        return self._engine.probe(prompt_ids, length)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See `Engine`."""
        self._settle()
        self._engine.load_weights(named_tensors, step)
        self._step = step

    def fingerprint(self) -> str:
        """See `Engine`."""
        self._settle()
        return self._engine.fingerprint()

    def close(self) -> None:
        """See `Engine`. What is being drawn ends with the engine: nobody will ask for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.close()
        self._thread.shutdown()

    def save(self, folder: Path) -> None:
        """Write what is drawn ahead: a resumed run cannot draw it again, its weights are gone."""
        batches = self._settle()
        requests = [asdict(request) for request, _ in self._drawn]
        facts = {"step": self._drawn_from, "requests": requests}
        (folder / _REQUESTS).write_text(json.dumps(facts), encoding="utf-8")
        tensors = {f"completion_ids.{i}": batch.completion_ids for i, batch in enumerate(batches)}
        tensors |= {f"logprobs.{i}": batch.behaviour_logprobs for i, batch in enumerate(batches)}
        save_file(tensors, folder / _TOKENS)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote; a run that drew nothing ahead so far has nothing there."""
        if not (folder / _REQUESTS).is_file():
            return
        tensors = load_file(folder / _TOKENS)
        facts = json.loads((folder / _REQUESTS).read_text(encoding="utf-8"))
        self._drawn, self._drawn_from = [], facts["step"]
        for i, asked in enumerate(facts["requests"]):
            request = Request(**asked | {"sampling": Sampling(**asked["sampling"])})
            batch: Future[RolloutBatch] = Future()
            prompts = [ids for ids in request.prompt_ids for _ in range(request.n)]
            batch.set_result(
                RolloutBatch(prompts, tensors[f"completion_ids.{i}"], tensors[f"logprobs.{i}"])
            )
            self._drawn.append((request, batch))

    def _generate(self, asked: Request) -> RolloutBatch:
        return self._engine.generate(asked.prompt_ids, asked.n, asked.sampling, asked.seeds)

    def _settle(self) -> list[RolloutBatch]:
        """Wait for the engine; return what was drawn ahead."""
        return [batch.result() for _, batch in self._drawn]
