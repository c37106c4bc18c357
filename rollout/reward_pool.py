"""Rewards in actors: each holds all rewards of the recipe and scores a share of the pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.heavy import prepare_torchvision
from rewards.cache import ScoreCache
from rewards.runner import RewardRunner, RewardSpec, Scored, log_failures
from rollout.actors import ActorPool
from rollout.cluster import Placement
from rollout.micro_batch import Events
from rollout.timeline import Interval


class RewardPool:
    """`RewardRunner.score` in several actors. Files of rewards are given with their full paths.

    What a reward does wrong is dealt with in its actor, as it is without one: a None with a reason.
    An actor that is lost, or does not answer at all, is dealt with here. A score cache is each
    actor's own. With `whole_batch` one actor gets all pictures of a call, to compare them. `folder`
    is that of the prompt file, as for the runner.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        placement: Placement,
        cache: bool = False,
        whole_batch: bool = False,
        events: Events | None = None,
        busy: list[Interval] | None = None,
        folder: str | Path = "",
    ) -> None:
        self._shares = 1 if whole_batch else placement.workers
        arguments = (list(specs), folder, cache, placement.threads)
        self.actors = ActorPool(RewardActor, arguments, placement, events, busy)

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        step: int = 0,
    ) -> list[Scored]:
        """See `RewardRunner.score`."""
        shares = np.array_split(np.arange(len(images)), min(self._shares, len(images) or 1))
        pieces = [
            (
                [images[i] for i in share],
                [prompts[i] for i in share],
                {key: [values[i] for i in share] for key, values in columns.items()},
                step,
            )
            for share in shares
        ]
        scored = [one for part in self.actors.run("score", pieces) for one in part]
        log_failures(scored)
        return scored


class RewardActor:
    """A reward runner in a process of its own."""

    def __init__(
        self, specs: Sequence[RewardSpec], folder: str | Path, cache: bool, threads: int
    ) -> None:
        prepare_torchvision()
        torch.set_num_threads(threads)
        self.runner = RewardRunner(specs, folder=folder, cache=ScoreCache() if cache else None)

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        step: int,
    ) -> list[Scored]:
        """See `RewardRunner.score`."""
        return self.runner.score(images, prompts, columns, step)
