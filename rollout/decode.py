"""The decode stage: hidden states of many prompts to pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from policy import Policy
from policy.pixels import to_images
from rollout.micro_batch import Events, MicroBatch, pieces


@dataclass(frozen=True)
class Decode:
    """How tokens become pixels: Euler steps, guidance and where, and whose noise is whose."""

    steps: int
    guidance: float
    shared_noise: bool = True
    """True: the members of a group start from the same noise (common random numbers)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels at which there is guidance (`policy.diffusion.sample_latents`)."""


class Decoder:
    """Renders with a policy's connector, diffusion head and autoencoder, `micro_batch` at a time.

    A picture depends on its hidden states, its noise seed and the decode settings alone, so prompts
    share batches. `micro_batch` None: all at once.
    """

    def __init__(self, policy: Policy, micro_batch: int | None, events: Events) -> None:
        self.policy = policy
        advice = "set train.micro_batch lower, or decode fewer prompts at a time (rollout.waves)"
        self.micro_batch = MicroBatch("render", micro_batch, advice, events)

    @torch.no_grad()
    def __call__(
        self, hidden: Tensor, noise_seeds: Sequence[int], decode: Decode
    ) -> list[Image.Image]:
        """Return the pictures of hidden states [B, 1 + N, H], each from the noise of its seed."""

        def render(size: int) -> list[Image.Image]:
            images: list[Image.Image] = []
            for rows in pieces(len(hidden), size):
                noise = self.policy.noise(noise_seeds[rows])
                images += to_images(
                    self.policy.render(
                        hidden[rows],
                        noise=noise,
                        steps=decode.steps,
                        guidance=decode.guidance,
                        guidance_interval=decode.guidance_interval,
                    )
                )
            return images

        return self.micro_batch.attempt(len(hidden), render)
