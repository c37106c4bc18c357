"""The decode stage in actors: each holds the head, gets hidden states and returns pictures.

Only the language model learns, so that what an actor loaded at its start stays right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from policy import Policy
from rollout.actors import ActorPool
from rollout.cluster import Placement
from rollout.decode import Decode, decode_micro_batch, rendered
from rollout.micro_batch import Events, pieces
from rollout.timeline import Interval


@dataclass(frozen=True)
class Head:
    """The part of a policy folder that renders; `dtype` is a torch type's name."""

    folder: str
    dtype: str
    device: str = "cpu"

    def load(self) -> Policy:
        """Read the folder; what renders nothing is left out before anything reaches a GPU."""
        policy = Policy.from_pretrained(self.folder, getattr(torch, self.dtype))
        del policy.ar.model, policy.image_tokenizer
        head = policy.ar.lm_head  # is asked for device and type alone
        head.weight = torch.nn.Parameter(head.weight[:1].detach().clone())
        return policy.to(self.device)


class DecodePool:
    """`Render` in several actors, at most `micro_batch` pictures of each at a time.

    With a micro-batch that does not exceed an actor's share, the batches are those of a `Decoder`,
    and so is every bit of the pictures.
    """

    def __init__(
        self,
        head: Head,
        placement: Placement,
        micro_batch: int | None,
        events: Events,
        busy: list[Interval] | None = None,
    ) -> None:
        self.micro_batch = decode_micro_batch(micro_batch, events)
        self._workers = placement.workers
        arguments = (head, placement.threads)
        self.actors = ActorPool(DecodeActor, arguments, placement, events, busy)

    def __call__(
        self, hidden: Tensor, noise_seeds: Sequence[int], decode: Decode
    ) -> list[Image.Image]:
        """See `Render`."""
        hidden = hidden.cpu()

        def render(size: int) -> list[Image.Image]:
            batches = [
                # A slice would be sent with all that it is a slice of.
                (hidden[rows].clone(), list(noise_seeds[rows]), decode)
                for rows in pieces(len(hidden), size)
            ]
            return [image for part in self.actors.run("render", batches) for image in part]

        share = -(-len(hidden) // self._workers)  # so that no actor stays idle
        return self.micro_batch.attempt(share, render)


class DecodeActor:
    """A diffusion head in a process of its own."""

    def __init__(self, head: Head, threads: int) -> None:
        torch.set_num_threads(threads)
        self.policy = head.load()

    def render(
        self, hidden: Tensor, noise_seeds: Sequence[int], decode: Decode
    ) -> list[Image.Image]:
        """See `Render`."""
        return rendered(self.policy, hidden.to(self.policy.device), noise_seeds, decode)
