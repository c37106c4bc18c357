"""One step's rollouts: sample image tokens, one teacher-forced pass, render, judge.

A step is divided into waves, runs of neighbouring prompts. With more than one of them the stages
overlap: while one wave is sampled, the one before is rendered and the one before that is judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.seeds import counter_seed
from policy.policy import Policy
from policy.sampling import Sampling
from rl.image_head import image_logprobs
from rollout.ahead import Request
from rollout.decode import Decode, Decoder, Render
from rollout.engine import Engine, RolloutBatch
from rollout.micro_batch import Events, MicroBatch, pieces
from rollout.pipeline import in_turn, overlapped
from rollout.timeline import Interval, Timeline
from rollout.transformers_engine import TransformersEngine

Judge = Callable[[list[Image.Image], slice], list[Any]]
"""Scores the pictures of a run of the step's samples, one result for each."""


@dataclass(frozen=True)
class Rollout:
    """B samples: the engine's tokens, the trainer's own log-probs of them, pictures and scores."""

    prompt_ids: list[list[int]]
    completion_ids: Tensor
    behaviour_logprobs: Tensor
    logprobs: Tensor
    images: list[Image.Image]
    scores: list[Any]
    intervals: list[Interval]


@dataclass
class Wave:
    """A run of a step's prompts, and what the stages it has passed made of them."""

    number: int
    prompt_ids: list[list[int]]
    rows: slice
    """Its samples among those of the step."""
    seeds: list[int]
    noise_seeds: list[int]
    batch: RolloutBatch = field(init=False)
    hidden: Tensor = field(init=False)
    logprobs: Tensor = field(init=False)
    images: list[Image.Image] = field(init=False)
    scores: list[Any] = field(init=False)


class Sampler:
    """Turns prompts into rollouts; every draw is a function of run seed, step and place.

    At most `micro_batch` pictures are scored and rendered at the same time; None: all of a wave.
    What the journal should know is appended to `events`. `render` None: the policy's own head.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        sampling: Sampling,
        decode: Decode,
        run_seed: int,
        micro_batch: int | None = None,
        waves: int = 1,
        events: Events | None = None,
        render: Render | None = None,
    ) -> None:
        self.policy = policy
        self.engine = engine
        self.sampling = sampling
        self.decode = decode
        self.run_seed = run_seed
        self.waves = waves
        self.events = events = [] if events is None else events
        self._scoring = MicroBatch("score", micro_batch, "set train.micro_batch lower", events)
        self.render = render or Decoder(policy, micro_batch, events)

    def __call__(
        self,
        prompts: Sequence[str],
        group_size: int,
        *counters: int | str,
        judge: Judge | None = None,
    ) -> Rollout:
        """Return `group_size` samples of each prompt; `counters` say where in the run this is.

        `judge` scores the pictures wave by wave; without it the rollout has no scores.
        """
        timeline = Timeline()

        def sample(wave: Wave) -> Wave:
            with timeline.busy("rollout", wave.number):
                wave.batch = self.engine.generate(
                    wave.prompt_ids, group_size, self.sampling, wave.seeds
                )
            return wave

        def score(wave: Wave) -> Wave:
            with timeline.busy("score", wave.number):
                wave.hidden, wave.logprobs = self._teacher_forced(wave.batch)
            return wave

        def render(wave: Wave) -> Wave:
            with timeline.busy("render", wave.number):
                wave.images = self.render(wave.hidden, wave.noise_seeds, self.decode)
                del wave.hidden
            return wave

        def judged(wave: Wave) -> Wave:
            with timeline.busy("reward", wave.number):
                wave.scores = judge(wave.images, wave.rows) if judge else []
            return wave

        waves = self._waves(prompts, group_size, counters)
        # The language model runs in one thread only: sampling from it changes how it attends.
        samples_itself = isinstance(self.engine, TransformersEngine)
        tokens = [lambda wave: score(sample(wave))] if samples_itself else [sample, score]
        stages = [*tokens, render, *([judged] if judge else [])]
        done = (overlapped if len(waves) > 1 else in_turn)(stages, waves)
        return Rollout(
            [ids for wave in done for ids in wave.batch.prompt_ids],
            torch.cat([wave.batch.completion_ids for wave in done]),
            torch.cat([wave.batch.behaviour_logprobs for wave in done]),
            torch.cat([wave.logprobs for wave in done]),
            [image for wave in done for image in wave.images],
            [scored for wave in done for scored in wave.scores] if judge else [],
            timeline.intervals,
        )

    def requests(
        self, prompts: Sequence[str], group_size: int, *counters: int | str
    ) -> list[Request]:
        """Return what a call with these arguments asks of the engine."""
        waves = self._waves(prompts, group_size, counters)
        return [Request(w.prompt_ids, group_size, self.sampling, w.seeds) for w in waves]

    def decoded_again(
        self,
        rollout: Rollout,
        rows: slice,
        group_size: int,
        decode: Decode,
        *counters: int | str,
    ) -> list[Image.Image]:
        """Return other pictures of samples of `rollout`: same tokens and noise, another decoding.

        Give the group size and the counters with which the rollout was made.
        """
        hidden = self.policy.condition_rows(rollout.prompt_ids[rows], rollout.completion_ids[rows])
        places = [divmod(i, group_size) for i in range(*rows.indices(len(rollout.images)))]
        return self.render(hidden, self._noise_seeds(places, counters), decode)

    def _noise_seeds(
        self, places: Sequence[tuple[int, int]], counters: Sequence[int | str]
    ) -> list[int]:
        starts = [(g, 0) if self.decode.shared_noise else (g, m) for g, m in places]
        return [counter_seed(self.run_seed, "noise", *counters, *start) for start in starts]

    def _waves(
        self, prompts: Sequence[str], group_size: int, counters: Sequence[int | str]
    ) -> list[Wave]:
        """Divide the prompts; what a sample's seeds are does not depend on its wave."""
        prompt_ids = self.policy.prompt_ids(prompts)
        waves: list[Wave] = []
        for run in np.array_split(np.arange(len(prompts)), min(self.waves, len(prompts))):
            places = [(group, member) for group in run.tolist() for member in range(group_size)]
            first = int(run[0]) * group_size
            waves.append(
                Wave(
                    len(waves),
                    [prompt_ids[group] for group in run],
                    slice(first, first + len(places)),
                    [counter_seed(self.run_seed, "tokens", *counters, *place) for place in places],
                    self._noise_seeds(places, counters),
                )
            )
        return waves

    @torch.no_grad()
    def _teacher_forced(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """One pass gives both the conditions [B, 1 + N, H] and the log-probs [B, N]."""
        config = self.policy.config
        first = config.image_start_id
        head = self.policy.ar.lm_head.weight[first : first + config.num_image_tokens]

        def score(size: int) -> tuple[Tensor, Tensor]:
            scored = []
            for rows in pieces(len(batch.completion_ids), size):
                completion_ids = batch.completion_ids[rows]
                hidden = self.policy.condition_rows(batch.prompt_ids[rows], completion_ids)
                codes = completion_ids.to(hidden.device) - first
                logprobs, _ = image_logprobs(
                    hidden[:, :-1], head, codes, self.sampling.temperature, entropy=False
                )
                scored.append((hidden, logprobs))
            hidden_rows, logprob_rows = zip(*scored, strict=True)
            return torch.cat(hidden_rows), torch.cat(logprob_rows)

        return self._scoring.attempt(len(batch.completion_ids), score)
