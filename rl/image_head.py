"""The language model's forward pass of the trainer: log-probs of image tokens alone.

Image tokens are the only legal ones, so the head is evaluated on their rows of the vocabulary and
the policy is the softmax over those rows, exactly as the rollout engines sample.
"""

import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM
from transformers.utils import ModelOutput


@dataclass
class ImageLogprobs(ModelOutput):
    """log_probs, entropy: float32 [B, N] of the last N tokens, natural logarithm."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def image_logprobs(
    hidden: Tensor, head: Tensor, codes: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies, float32 [B, N], of `codes` [B, N] given `hidden` [B, N, H].

    `head` [num_image_tokens, H] holds the image rows of the output embedding.
    """
    logits = F.linear(hidden, head).float() / temperature
    normalised = logits.log_softmax(-1)
    chosen = normalised.gather(-1, codes[..., None])[..., 0]
    return chosen, -(normalised.exp() * normalised).sum(-1)


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
        mask = kwargs["attention_mask"]
        hidden = self.model(
            input_ids=kwargs["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        codes = kwargs["input_ids"][:, -image_tokens:] - image_start_id
        before = hidden[:, -image_tokens - 1 : -1]
        return ImageLogprobs(*image_logprobs(before, self.lm_head.weight[rows], codes, temperature))

    model.forward = types.MethodType(forward, model)
