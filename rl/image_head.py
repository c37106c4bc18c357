"""The language model's forward pass of the trainer: log-probs of image tokens alone.

Image tokens are the only legal ones, so the head is evaluated on their rows of the vocabulary and
the policy is the softmax over those rows, exactly as the rollout engines sample.
"""

import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction

from policy.shared_prompt import tail_states

TILE = 16_384
"""Rows of the head that are evaluated at the same time."""


@dataclass
class ImageLogprobs(ModelOutput):
    """log_probs, entropy: float32 [B, N] of the last N tokens, natural logarithm."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def image_logprobs(
    hidden: Tensor, head: Tensor, codes: Tensor, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs and entropies, float32 [B, N], of `codes` [B, N] given `hidden` [B, N, H].

    `head` [num_image_tokens, H] holds the image rows of the output embedding. TRL's function goes
    over them in tiles and computes them again for the gradient, so that logits [B, N,
    num_image_tokens] (3 GB for 16 pictures of the published size) never exist. Without `entropy`
    there is none.
    """
    logprobs, entropies, *_ = ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1),
        head,
        None,  # no bias
        codes.flatten(),
        temperature,
        min(len(head), TILE),
        None,  # no soft cap of the logits
        1.0,  # nor a scale
        ("log_probs", "entropy") if entropy else ("log_probs",),
    )
    return logprobs.view_as(codes), entropies.view_as(codes) if entropy else None


def add_image_head(
    model: Qwen3ForCausalLM, image_start_id: int, num_image_tokens: int, temperature: float
) -> None:
    """Let `model(..., image_tokens=N)` return `ImageLogprobs` of the last N tokens.

    The forward is extended rather than bypassed, so that wrappers around the model (PEFT,
    data-parallel, DeepSpeed) see the call. Without `image_tokens` nothing changes.
    """
    original = model.forward
    rows = slice(image_start_id, image_start_id + num_image_tokens)

    def forward(self: Any, *args: Any, image_tokens: int | None = None, **kwargs: Any) -> Any:
        if image_tokens is None:
            return original(*args, **kwargs)
        ids = kwargs["input_ids"]
        hidden = tail_states(self.model, ids, kwargs["attention_mask"], image_tokens + 1)[:, :-1]
        codes = ids[:, -image_tokens:] - image_start_id
        return ImageLogprobs(*image_logprobs(hidden, self.lm_head.weight[rows], codes, temperature))

    model.forward = types.MethodType(forward, model)
