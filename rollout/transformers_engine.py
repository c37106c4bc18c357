"""Reference engine: the policy's own fixed-length sampler on a causal LM in this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policy.sampling import ImageTokenSampler, Sampling
from rollout.engine import RolloutBatch, WeightMismatch, check_request, fingerprint_tensors
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
        micro_batch: most sequences sampled at the same time.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        image_start_id: int,
        num_image_tokens: int,
        completion_length: int,
        pad_id: int,
        micro_batch: int = 256,
    ) -> None:
        self.model = model
        self.step: int | None = None
        self._sampler = ImageTokenSampler(
            model, image_start_id, num_image_tokens, completion_length, pad_id, micro_batch
        )

    @property
    def dtype(self) -> torch.dtype:
        """See `Engine`."""
        return self.model.dtype

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """See `Engine`."""
        check_request(prompt_ids, n, seeds)
        tokens, logprobs = self._sampler.sample(prompt_ids, n, sampling, seeds)
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
            pushed = ((name, tensor.to(self.dtype)) for name, tensor in tensors.items())
            if fingerprint_tensors(pushed) != self.fingerprint():
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
