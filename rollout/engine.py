"""What a rollout engine is: prompts and seeds in, image tokens and their log-probs out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import RunError
from policy.sampling import Sampling


class WeightMismatch(RunError):
    """The engine does not hold the weights that the trainer holds."""


@dataclass(frozen=True)
class RolloutBatch:
    """P prompts with n samples each, the samples of one prompt in a row.

    `completion_ids` int64 [P*n, N] are vocabulary ids of image tokens. `behaviour_logprobs` float32
    [P*n, N] are natural logs of the probabilities with which those tokens were really drawn: image
    tokens only, temperature and truncation applied. Both are on the CPU.
    """

    prompt_ids: list[list[int]]
    completion_ids: Tensor
    behaviour_logprobs: Tensor


class Engine(Protocol):
    """A sampler of image tokens. Completions have a fixed length and no end token."""

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the engine holds its weights."""

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """Draw `n` completions of each prompt; `seeds` holds one seed for each of the P*n."""

    def probe(self, prompt_ids: list[list[int]], length: int) -> dict[str, RolloutBatch]:
        """Draw the first `length` tokens after each prompt as `generate` would, at temperature 1.

        Prompt i has the seed i. One batch from each process that samples for this engine, by its
        name.
        """

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Replace all weights; names are those of `Qwen3ForCausalLM`. Raises `WeightMismatch`.

        An engine that was started to take adapters replaces its adapter (`split_tensors`) alone.
        """

    def fingerprint(self) -> str:
        """`fingerprint_tensors` of the weights that the engine computes with, read back from it."""

    def close(self) -> None:
        """Free the engine's memory. The engine cannot be used afterwards."""


def fingerprint_tensors(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hex digest of names, types, shapes and bytes, whatever the order of the tensors.

    Each tensor is summed up where it lies (`_sums`): of a GPU's weights a few numbers travel, not
    all. -0.0 counts as 0.0: the two compute the same, and an engine that reads its packed weights
    back through a matrix product cannot tell them apart.
    """
    digests: dict[str, bytes] = {}
    for name, tensor in named_tensors:
        if name in digests:
            raise WeightMismatch(f"the tensor {name} was given twice")
        head = f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode()
        one = hashlib.blake2b(head, digest_size=16)
        one.update(_sums(tensor.detach()).cpu().numpy().data)
        digests[name] = one.digest()
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        whole.update(digests[name])
    return whole.hexdigest()


_WORDS = 2**17
"""Words of 8 bytes that make one sum: a megabyte, which a CPU's cache holds."""


def _sums(tensor: Tensor) -> Tensor:
    """Return an int64 checksum of every megabyte: the sum of f(word x factor) x factor.

    The factor is the place's odd random number. A word that differs makes another summand, for odd
    factors have an inverse modulo 2^64 and f, which folds the upper half into the lower, has one,
    too. Without f two flipped signs would cancel out.
    """
    factors = _factors(tensor.device)
    sums = []
    for piece in tensor.reshape(-1).split(8 * _WORDS // tensor.element_size()):
        values = piece + 0.0 if piece.is_floating_point() else piece.clone()
        odd_bytes = -len(values) * values.element_size() % 8
        if odd_bytes:
            values = F.pad(values.view(torch.uint8), (0, odd_bytes))
        words = values.view(torch.int64)
        here = factors[: len(words)]
        product = words * here
        sums.append(((product ^ (product >> 32 & 0xFFFF_FFFF)) * here).sum())
    return torch.stack(sums)


@cache
def _factors(device: torch.device) -> Tensor:
    raw = np.random.PCG64(0).random_raw(_WORDS) | np.uint64(1)  # the same in all versions of numpy
    return torch.from_numpy(raw.view(np.int64)).to(device)


def check_request(prompt_ids: Sequence[Sequence[int]], n: int, seeds: Sequence[int]) -> None:
    """Raise `RunError` for a request that no engine can serve."""
    if not prompt_ids or n < 1:
        raise RunError(f"nothing to sample: {len(prompt_ids)} prompts with n={n} samples each")
    empty = [index for index, ids in enumerate(prompt_ids) if not ids]
    if empty:
        raise RunError(f"prompt {empty[0]} has no tokens; give every prompt at least one")
    if len(seeds) != len(prompt_ids) * n:
        raise RunError(
            f"{len(seeds)} seeds for {len(prompt_ids)} prompts x {n} samples; "
            "give one seed for each sample"
        )
