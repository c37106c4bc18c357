"""Names and values of the weights that travel from the trainer to an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import RunError
from rollout.engine import WeightMismatch

_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Push:
    """Weights that were pushed to workers: the how many-th push of the run, and at which step.

    `packed` holds a reference into Ray's object store; in a list, or Ray would fetch the weights
    for every call; vLLM's weight transfer leaves it empty until someone needs it. `fingerprint` is
    what all workers that were asked were seen to hold afterwards.
    """

    number: int
    step: int
    packed: list[Any]
    fingerprint: str | None = None


def check_finite(model: nn.Module, step: int) -> None:
    """Raise RunError if a weight is no number after `step` updates, which change the trained alone.

    Before the first, that of the policy folder is told.
    """
    for name, weight in model.named_parameters():
        if (step == 0 or weight.requires_grad) and not weight.isfinite().all():
            told = f"`{name}` has values that are not finite"
            if step == 0:
                fix = "the policy folder is damaged: copy or convert it again."
                raise RunError(f"{told}.\n    Fix: {fix}")
            fix = "start again with a lower train.learning_rate."
            raise RunError(f"{told} after {step} steps.\n    Fix: {fix}")


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a causal LM, LoRA adapters merged in, under the plain model's names.

    A tied LM head is given once, as the embedding. For a PEFT model the sum base + delta is
    computed tensor by tensor and the model is left as it is, so nothing has to be unmerged
    afterwards. Only LoRA on linear layers is known; any other trained adapter raises.
    """
    adapters = {name: module for name, module in model.named_modules() if _is_lora(module)}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in f".{name}":
            continue
        if owner.endswith(".base_layer") and (layer := adapters.get(owner[: -len(".base_layer")])):
            value = _with_delta(layer, parameter) if leaf == "weight" else parameter.detach()
            name = f"{owner[: -len('.base_layer')]}.{leaf}"
        else:
            value = parameter.detach()
        yield name.removeprefix("base_model.model."), value


def split_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a PEFT causal LM: its base under the plain names, and its adapter.

    The adapter's are `LAYER.lora_A.weight` [r, in] and `LAYER.lora_B.weight` [out, r], the second
    times the adapter's scale, so that what it adds to a layer's weight is their product B A.
    """
    for name, parameter in model.named_parameters():
        value, plain = parameter.detach(), name.removeprefix("base_model.model.")
        if ".lora_" in name:
            path, kind, adapter, leaf = name.rsplit(".", 3)
            layer: Any = model.get_submodule(path)
            if adapter not in layer.active_adapters:
                continue
            if kind == "lora_B":
                value = value * layer.scaling[adapter]
            plain = plain.replace(f".{adapter}.{leaf}", f".{leaf}")
        yield plain.replace(".base_layer.", "."), value


def has_adapters(model: nn.Module) -> bool:
    """Whether LoRA layers sit inside the model."""
    return any(_is_lora(module) for module in model.modules())


def _is_lora(module: nn.Module) -> bool:
    # Asked by shape, not by class: peft must not be imported to sample from a plain model.
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _with_delta(layer: nn.Module, weight: Tensor) -> Tensor:
    merged = weight.detach().clone()
    if layer.disable_adapters:
        return merged
    for adapter in layer.active_adapters:  # type: ignore[union-attr]
        if adapter in layer.lora_A:  # type: ignore[operator]
            with torch.no_grad():
                merged += layer.get_delta_weight(adapter).to(merged.dtype)  # type: ignore[operator]
    return merged


def check_names(
    given: Mapping[str, Tensor], expected: Mapping[str, torch.Size], engine: str
) -> dict[str, Tensor]:
    """Return `given` without a tied head; raise `WeightMismatch` unless names and shapes agree."""
    tensors = dict(given)
    if _TIED_HEAD not in expected:
        tensors.pop(_TIED_HEAD, None)
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    wrong = sorted(n for n in tensors if n in expected and tensors[n].shape != expected[n])
    if missing or unknown or wrong:
        facts = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("misshapen", wrong))
            if names
        )
        raise WeightMismatch(
            f"these are not all the weights of the {engine} engine ({facts}); "
            "push rollout.weights.merged_tensors(model)"
        )
    return tensors


def as_mapping(named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Collect a push; a name given twice raises `WeightMismatch`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in named_tensors:
        if name in tensors:
            raise WeightMismatch(f"the tensor {name} was pushed twice")
        tensors[name] = tensor
    return tensors
