"""Reaching into vLLM's model: repack what a reload forgets, and read back what it computes with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rollout.engine import WeightMismatch


def repack_tied_head(model: Any) -> None:
    """Make the logits follow a reloaded embedding that is tied to the LM head.

    On the CPU the head computes with its own packed copy of the embedding. `reload_weights` of
    vLLM 0.32 repacks only layers that it loaded tensors into, and a tied head is none of them: the
    inputs would be embedded with the new table and the logits computed from the old one.
    """
    if model.config.tie_word_embeddings and hasattr(model.lm_head, "cpu_linear"):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def read_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of vLLM's Qwen3, fused layers split, packed ones unpacked.

    On the CPU vLLM packs the matrix of a linear layer into its kernel and throws the original away.
    The kernel applied to the identity returns it, exactly, since every product has one term.
    Raises `WeightMismatch` if an embedding or head differs from the packed copy beside it.
    """
    fused = model.packed_modules_mapping
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        path = path.removesuffix(".base_layer")  # inside of it where vLLM takes adapters
        owner, _, last = path.rpartition(".")
        value = parameter.detach()
        if leaf == "weight" and value.numel() == 0:
            value = _unpacked(layer, layer.input_size_per_partition)
        if last in ("embed_tokens", "lm_head"):
            # The table is padded to a round number of rows.
            value = value[: model.config.vocab_size]
        if last in fused:
            parts = value.split(layer.output_sizes)
            for part, piece in zip(fused[last], parts, strict=True):
                yield f"{owner}.{part}.{leaf}", piece
        else:
            yield f"{path}.{leaf}", value
    _check_packed_head(model)


def _unpacked(layer: Any, columns: int) -> Tensor:
    like = layer.weight.detach()
    identity = torch.eye(columns, dtype=like.dtype, device=like.device)
    weight: Tensor = layer.cpu_linear(identity, like, None)
    return weight.t().contiguous()


def _check_packed_head(model: Any) -> None:
    head = model.lm_head
    if not hasattr(head, "cpu_linear"):
        return
    rows = model.config.vocab_size
    if not torch.equal(_unpacked(head, head.weight.shape[1])[:rows], head.weight[:rows]):
        raise WeightMismatch(
            "inside vLLM the LM head's weight and the packed copy that computes the logits differ: "
            "a sync has updated one and not the other"
        )
