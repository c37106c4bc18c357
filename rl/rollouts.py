"""One step's rollouts: sample image tokens, one teacher-forced pass, render."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from common.seeds import counter_seed
from policy.policy import Policy, to_images
from policy.sampling import Sampling
from rl.image_head import image_logprobs
from rollout.engine import Engine


@dataclass(frozen=True)
class Decode:
    """How tokens become pixels: Euler steps, guidance, and whose noise is whose."""

    steps: int
    guidance: float
    shared_noise: bool = True
    """True: the members of a group start from the same noise (common random numbers)."""


@dataclass(frozen=True)
class Rollout:
    """B samples: the engine's tokens, the trainer's own log-probs of them, and the pictures."""

    prompt_ids: list[list[int]]
    completion_ids: Tensor
    behaviour_logprobs: Tensor
    logprobs: Tensor
    images: list[Image.Image]
    seconds: dict[str, float]


class Sampler:
    """Turns prompts into rollouts; every draw is a function of run seed, step and place.

    At most `micro_batch` pictures are scored and rendered at the same time; None: all.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        sampling: Sampling,
        decode: Decode,
        run_seed: int,
        micro_batch: int | None = None,
    ) -> None:
        self.policy = policy
        self.engine = engine
        self.sampling = sampling
        self.decode = decode
        self.run_seed = run_seed
        self.micro_batch = micro_batch

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], group_size: int, *counters: int | str) -> Rollout:
        """Return `group_size` samples of each prompt; `counters` say where in the run this is."""
        clock = _Clock()
        prompt_ids = self.policy.prompt_ids(prompts)
        places = [(group, member) for group in range(len(prompts)) for member in range(group_size)]
        seeds = [counter_seed(self.run_seed, "tokens", *counters, *place) for place in places]
        batch = self.engine.generate(prompt_ids, group_size, self.sampling, seeds)
        clock.lap("rollout")
        scored = [
            self._teacher_forced(batch.prompt_ids[rows], batch.completion_ids[rows])
            for rows in self._pieces(len(places))
        ]
        clock.lap("score")
        members = [(g, 0) if self.decode.shared_noise else (g, m) for g, m in places]
        noise = self.policy.noise(
            [counter_seed(self.run_seed, "noise", *counters, *member) for member in members]
        )
        images: list[Image.Image] = []
        for (hidden, _), rows in zip(scored, self._pieces(len(places)), strict=True):
            pixels = self.policy.render(
                hidden, noise=noise[rows], steps=self.decode.steps, guidance=self.decode.guidance
            )
            images += to_images(pixels)
        clock.lap("render")
        return Rollout(
            batch.prompt_ids,
            batch.completion_ids,
            batch.behaviour_logprobs,
            torch.cat([logprobs for _, logprobs in scored]),
            images,
            clock.seconds,
        )

    def _pieces(self, count: int) -> Iterator[slice]:
        size = self.micro_batch or count
        return (slice(start, start + size) for start in range(0, count, size))

    def _teacher_forced(
        self, prompt_ids: Sequence[list[int]], completion_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One pass gives both the conditions [B, 1 + N, H] and the log-probs [B, N]."""
        config = self.policy.config
        hidden = self.policy.condition_rows(prompt_ids, completion_ids)
        first = config.image_start_id
        head = self.policy.ar.lm_head.weight[first : first + config.num_image_tokens]
        codes = completion_ids.to(hidden.device) - first
        logprobs, _ = image_logprobs(
            hidden[:, :-1], head, codes, self.sampling.temperature, entropy=False
        )
        return hidden, logprobs


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
