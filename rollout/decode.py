"""The decode stage: hidden states of many prompts to pictures."""

from collections.abc import Callable, Sequence
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
    compiled: bool = False
    """True: the head's steps go through torch.compile."""
    tile: int | None = None
    """Side in pixels of the tiles in which the autoencoder decodes; None: whole pictures."""


Render = Callable[[Tensor, Sequence[int], Decode], list[Image.Image]]
"""Turns hidden states [B, 1 + N, H] into pictures, each from the noise of its seed.

A picture depends on these and the settings alone, so prompts share batches."""


@torch.no_grad()
def rendered(
    policy: Policy, hidden: Tensor, noise_seeds: Sequence[int], decode: Decode
) -> list[Image.Image]:
    """Return the pictures of one batch: connector, diffusion head and autoencoder of `policy`."""
    return to_images(
        policy.render(
            hidden,
            noise=policy.noise(noise_seeds),
            steps=decode.steps,
            guidance=decode.guidance,
            guidance_interval=decode.guidance_interval,
            compiled=decode.compiled,
            tile=decode.tile,
        )
    )


class Decoder:
    """`Render` in this process, `micro_batch` pictures at a time; None: all at once."""

    def __init__(self, policy: Policy, micro_batch: int | None, events: Events) -> None:
        self.policy = policy
        self.micro_batch = decode_micro_batch(micro_batch, events)

    def __call__(
        self, hidden: Tensor, noise_seeds: Sequence[int], decode: Decode
    ) -> list[Image.Image]:
        """See `Render`."""

        def render(size: int) -> list[Image.Image]:
            images: list[Image.Image] = []
            for rows in pieces(len(hidden), size):
                images += rendered(self.policy, hidden[rows], noise_seeds[rows], decode)
            return images

        return self.micro_batch.attempt(len(hidden), render)


def decode_micro_batch(size: int | None, events: Events) -> MicroBatch:
    """Return how many pictures are rendered at a time, wherever that is."""
    advice = "set train.micro_batch lower, or decode fewer prompts at a time (rollout.waves)"
    return MicroBatch("render", size, advice, events)
