"""The SANA head with its conditions fixed: what no Euler step changes is computed once.

The arithmetic is that of `SanaTransformer2DModel.forward`, from the same modules. While a picture
is sampled its conditions stand still and all pictures are at the same time, so that

- caption projection, caption norm and every cross-attention's keys and values are computed once a
  picture, and those of the null branch once in all;
- the rows of the published null condition are all equal, so that whatever is asked the answer is
  their value: its cross-attention is a constant (with a reference, attention to two rows);
- the time embedding is one row, and scale and shift are the affine part of the layer norms;
- both branches of guidance enter the first block with the same latents, so that everything before
  its cross-attention is computed for one of them;
- channels stay last in memory, which spares the copies between attention and convolution and is
  what convolution kernels are fast at.
"""

from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor
from torch.nn import functional as F


class Denoiser:
    """Velocities of B pictures under conditions [B, R, width], and of the null branch.

    `null_conditions` [1, R, width] are given for guidance; without them there is one branch.
    Evaluation only: nothing here has a gradient.
    """

    @torch.no_grad()
    def __init__(
        self, head: SanaTransformer2DModel, conditions: Tensor, null_conditions: Tensor | None
    ) -> None:
        self._head = head
        self._keys = self._keys_and_values(conditions)
        self._null_keys, self._null_bias = [], None
        if null_conditions is not None:
            # Equal rows share their weight in the softmax: one of them with the logarithm of their
            # number added to its score stands for all.
            rows, counts = torch.unique_consecutive(null_conditions[0], dim=0, return_counts=True)
            self._null_keys = self._keys_and_values(rows[None])
            self._null_bias = counts.log().to(rows.dtype)[None, None, None]

    def _keys_and_values(self, conditions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, heads, R, D] of every block's cross-attention."""
        head = self._head
        attended = head.caption_norm(head.caption_projection(conditions))
        pairs = []
        for block in head.transformer_blocks:
            attention = block.attn2
            keys, values = attention.to_k(attended), attention.to_v(attended)
            if attention.norm_k is not None:
                keys = attention.norm_k(keys)
            pairs.append((_heads(keys, attention.heads), _heads(values, attention.heads)))
        return pairs

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, timestep: Tensor, guided: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the conditioned and the null velocity, both [B, C, H, W], at a time [] or [1].

        The null velocity is None, and costs nothing, if it is not asked for (`guided`) or no null
        conditions were given.
        """
        guided = guided and bool(self._null_keys)
        head = self._head
        patch = head.config.patch_size
        height, width = latents.shape[2] // patch, latents.shape[3] // patch
        states = head.patch_embed(latents)
        modulation, embedded = head.time_embed(
            timestep.reshape(1), batch_size=1, hidden_dtype=states.dtype
        )
        for index, block in enumerate(head.transformer_blocks):
            shift, scale, gate, shift_ff, scale_ff, gate_ff = (
                block.scale_shift_table + modulation.view(6, -1)
            ).unbind()
            attended = block.attn1(_modulated(block.norm1, states, scale, shift))
            states = torch.addcmul(states, attended, gate)
            if index == 0 and guided:
                states = torch.cat([states, states])
            states = states + self._cross_attention(index, block.attn2, states, guided)
            normed = _modulated(block.norm2, states, scale_ff, shift_ff)
            states.addcmul_(_feed_forward(block.ff, normed, height, width), gate_ff)
        shift, scale = (head.scale_shift_table + embedded).unbind()
        states = head.proj_out(_modulated(head.norm_out.norm, states, scale, shift))
        cells = states.reshape(len(states), height, width, patch, patch, -1)
        velocity = cells.permute(0, 5, 1, 3, 2, 4).reshape(len(states), -1, *latents.shape[2:])
        if not guided:
            return velocity, None
        conditioned, null = velocity.chunk(2)
        return conditioned, null

    def _cross_attention(self, index: int, attention: Any, states: Tensor, guided: bool) -> Tensor:
        """Attend from states [B or 2 B, T, inner], the conditioned branch first."""
        # `rescale_output_factor` is 1 in every block of this class; a division is a whole pass.
        keys, values = self._keys[index]
        mixed = _attend(attention, states[: len(keys)], keys, values)
        if not guided:
            return mixed
        keys, values = self._null_keys[index]
        if keys.shape[2] == 1:
            null = attention.to_out[0](_merged(values)).expand_as(mixed)
        else:
            # All pictures share the null branch's keys: one long row of queries.
            null = states[len(mixed) :].flatten(0, 1)[None]
            null = _attend(attention, null, keys, values, self._null_bias).view_as(mixed)
        return torch.cat([mixed, null])


def _attend(
    attention: Any, states: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    queries = attention.to_q(states)
    if attention.norm_q is not None:
        queries = attention.norm_q(queries)
    queries = _heads(queries, attention.heads)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    return attention.to_out[0](_merged(mixed))


def _heads(states: Tensor, heads: int) -> Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merged(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _modulated(norm: Any, states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`norm(states) * (1 + scale) + shift`, in one pass where the norm has no weights itself."""
    if norm.weight is None:
        return F.layer_norm(states, norm.normalized_shape, 1 + scale, shift, norm.eps)
    return torch.addcmul(shift, norm(states), 1 + scale)


def _feed_forward(module: Any, states: Tensor, height: int, width: int) -> Tensor:
    """The gated convolutions of a block (diffusers' `GLUMBConv`) on states [B, T, inner]."""
    cells = states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    inner = F.silu(module.conv_inverted(cells), inplace=True)
    inner, gate = module.conv_depth(inner).chunk(2, dim=1)
    mixed: Tensor = module.conv_point(F.silu(gate).mul_(inner))
    return mixed.flatten(2).transpose(1, 2)
