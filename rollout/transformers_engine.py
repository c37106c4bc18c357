"""Reference engine: the policy's own fixed-length sampler on a causal LM in this process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policy.sampling import ImageTokenSampler, Sampling
from rollout.engine import RolloutBatch, WeightMismatch, check_request, fingerprint_tensors
from rollout.micro_batch import Events, MicroBatch
from rollout.weights import as_mapping, check_names, has_adapters, merged_tensors

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


class TransformersEngine:
    """Samples from `model` itself: give it the trainer's module and every sync is immediate.

    Args:
        model: a `Qwen3ForCausalLM`; LoRA layers may sit inside it.
        image_start_id: vocabulary id of image token 0.
        num_image_tokens: number of image tokens, which follow each other in the vocabulary.
        completion_length: N, tokens of a picture.
        pad_id: any vocabulary id; it fills short prompts on the left and is never attended to.
        micro_batch: most sequences sampled at the same time; halved when memory runs out.
        events: where each halving is noted.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        image_start_id: int,
        num_image_tokens: int,
        completion_length: int,
        pad_id: int,
        micro_batch: int = 256,
        events: Events | None = None,
    ) -> None:
        self.model = model
        self.step: int | None = None
        self._completion_length = completion_length
        self._sampler_of = partial(
            ImageTokenSampler, model, image_start_id, num_image_tokens, pad_id=pad_id
        )
        self._sampler_of(completion_length)  # a model that cannot be sampled from is refused here
        advice = "lower rollout.prompts_per_step, or sample it in more waves (rollout.waves)"
        events = [] if events is None else events
        self._micro_batch = MicroBatch("rollout", micro_batch, advice, events)

    @property
    def dtype(self) -> torch.dtype:
        """See `Engine`."""
        return self.model.dtype

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """See `Engine`."""
        return self._draw(prompt_ids, n, sampling, seeds, self._completion_length)

    def probe(self, prompt_ids: list[list[int]], length: int) -> dict[str, RolloutBatch]:
        """See `Engine`."""
        seeds = list(range(len(prompt_ids)))
        return {"the engine": self._draw(prompt_ids, 1, Sampling(), seeds, length)}

    def _draw(
        self,
        prompt_ids: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[int],
        length: int,
    ) -> RolloutBatch:
        check_request(prompt_ids, n, seeds)

        def sample(size: int) -> tuple[Tensor, Tensor]:
            return self._sampler_of(length, micro_batch=size).sample(prompt_ids, n, sampling, seeds)

        tokens, logprobs = self._micro_batch.attempt(len(seeds), sample)
        return RolloutBatch(
            prompt_ids=[ids for ids in prompt_ids for _ in range(n)],
            completion_ids=tokens.cpu(),
            behaviour_logprobs=logprobs.cpu(),
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See `Engine`. With LoRA inside, the weights are the trainer's own: they are compared."""
        own = dict(merged_tensors(self.model))
        expected = {name: tensor.shape for name, tensor in own.items()}
        tensors = check_names(as_mapping(named_tensors), expected, "transformers")
        if has_adapters(self.model):
            if not all(_equal(own[name], tensor) for name, tensor in tensors.items()):
                raise WeightMismatch(
                    "the engine samples from a module with LoRA inside and was pushed other "
                    "weights; give it a plain copy of the model, or the trainer's own module"
                )
        else:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    own[name].copy_(tensor)
        self.step = step

    def fingerprint(self) -> str:
        """See `Engine`."""
        return fingerprint_tensors(merged_tensors(self.model))

    def close(self) -> None:
        """Nothing to free: the model belongs to the caller."""


def _equal(own: Tensor, pushed: Tensor) -> bool:
    return torch.allclose(own, pushed.to(own), rtol=0, atol=0, equal_nan=True)
