"""Attention for groups of samples that share a prompt: the prompt's keys are stored and read once.

`GroupCache` takes the place of the library's cache and hands `group_attention` the prompt's keys
and the samples' own keys apart, so that neither is copied or repeated: the queries of a whole group
meet the prompt in one matrix product. Plugged in through transformers' `AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "atelier_group"


@dataclass(frozen=True)
class Split:
    """Keys or values: of the prompts [P, heads, Tp, D] and of the samples so far [B, heads, t, D].

    B is P times the samples of a group, the samples of one prompt in a row.
    """

    prompt: Tensor
    own: Tensor


class GroupCache:
    """Prompt keys of P prompts, then room for `steps` tokens of each of their samples."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Any, Any]:
        """Store [*, heads, T, D] of one layer and return what that layer attends to."""
        if layer not in self._prompt:
            self._prompt[layer] = (keys, values)
            return keys, values
        if layer not in self._own:
            batch, heads, _, width = keys.shape
            shape = (batch, heads, self._steps, width)
            self._own[layer] = (keys.new_empty(shape), values.new_empty(shape))
        own_keys, own_values = self._own[layer]
        own_keys[:, :, self._length] = keys[:, :, 0]
        own_values[:, :, self._length] = values[:, :, 0]
        end = self._length + 1
        prompt_keys, prompt_values = self._prompt[layer]
        return (
            Split(prompt_keys, own_keys[:, :, :end]),
            Split(prompt_values, own_values[:, :, :end]),
        )

    def advance(self) -> None:
        """Move on by one token, after all layers have stored theirs."""
        self._length += 1


def group_attention(
    module: nn.Module,
    query: Tensor,
    key: Split,
    value: Split,
    attention_mask: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend one token a sample: query [B, H, 1, D], mask additive [P, 1, 1, Tp] over the prompt.

    Returns [B, 1, H, D]. The softmax is taken in float32.
    """
    prompts, heads, width, size = key.prompt.shape
    batch, all_heads = query.shape[:2]
    per_head = all_heads // heads
    group = batch // prompts
    length = key.own.shape[2]
    alone = query.view(batch, heads, per_head, size) * scaling
    together = alone.view(prompts, group, heads, per_head, size).transpose(1, 2)
    together = together.reshape(prompts, heads, group * per_head, size)
    to_prompt = torch.matmul(together, key.prompt.transpose(2, 3)) + attention_mask
    to_prompt = to_prompt.view(prompts, heads, group, per_head, width).transpose(1, 2)
    to_own = torch.matmul(alone, key.own.transpose(2, 3))
    scores = torch.cat([to_prompt.reshape(batch, heads, per_head, width), to_own], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    prompt_weights, own_weights = weights.split([width, length], dim=-1)
    prompt_weights = prompt_weights.view(prompts, group, heads, per_head, width).transpose(1, 2)
    mixed = torch.matmul(
        prompt_weights.reshape(prompts, heads, group * per_head, width), value.prompt
    )
    mixed = mixed.view(prompts, heads, group, per_head, size).transpose(1, 2)
    mixed = mixed.reshape(batch, heads, per_head, size) + torch.matmul(own_weights, value.own)
    return mixed.reshape(batch, 1, all_heads, size), None


@contextmanager
def use_group_attention(model: Any) -> Iterator[None]:
    """Let the model attend with `group_attention` inside, with its own implementation after."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, group_attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
