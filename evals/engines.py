"""A policy whose image tokens are drawn by a rollout engine instead of its own sampler."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from common.seeds import counter_seed
from policy.policy import Policy, to_images
from policy.sampling import Sampling
from rollout.build import EngineSpec
from rollout.engine import Engine

EngineName = Literal["transformers", "vllm"]


class EnginePolicy:
    """`policy`, with the image tokens drawn by `engine`; everything else is the policy's own."""

    def __init__(self, policy: Policy, engine: Engine) -> None:
        self.config = policy.config
        self._policy = policy
        self._engine = engine

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        temperature: float,
        seeds: Sequence[int],
        references: Tensor | None = None,
    ) -> list[Image.Image]:
        """Return one picture for each prompt; as in `Policy.generate`, each has its own seed.

        `references` [B, 3, H, W] in [-1, 1] are pictures to edit.
        """
        token_seeds = [counter_seed(seed, "tokens") for seed in seeds]
        codes = None
        if references is not None:
            codes = self._policy.encode_images(references)[:, None]
        ids = self._policy.prompt_ids(prompts, codes)
        batch = self._engine.generate(ids, 1, Sampling(temperature), token_seeds)
        noise = self._policy.noise([counter_seed(seed, "noise") for seed in seeds])
        hidden = self._policy.condition_rows(batch.prompt_ids, batch.completion_ids)
        pixels = self._policy.render(
            hidden, noise=noise, steps=steps, guidance=guidance, references=references
        )
        return to_images(pixels)


@contextmanager
def sampled_by(
    engine: EngineName, policy: Policy, folder: Path, prompts: Sequence[str]
) -> Iterator[Policy | EnginePolicy]:
    """Yield the policy (read from `folder`) sampled by its own sampler or by vLLM.

    The engine is started for the longest of `prompts`. The two draw different tokens from the same
    seeds, so an evaluation keeps to one.
    """
    if engine == "transformers":
        yield policy
        return
    config = policy.config
    spec = EngineSpec(
        engine,
        str(folder / "ar"),
        config.image_start_id,
        config.num_image_tokens,
        config.num_tokens,
        config.pad_id,
        str(policy.ar.dtype).removeprefix("torch."),
        max(map(len, policy.prompt_ids(list(prompts)))),
        str(policy.ar.device),
    )
    with closing(spec.build([])) as started:
        yield EnginePolicy(policy, started)
