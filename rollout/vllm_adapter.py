"""A LoRA adapter inside vLLM: swapped in beside a base that stays, and read back from there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_NAME = "policy"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM has room; a smaller adapter leaves the rest of its room empty."""


_LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
"""All linear maps of Qwen3's layers, by vLLM's names."""


def adapter_settings(rank: int | None) -> dict[str, Any]:
    """Return the settings with which vLLM starts to take one adapter of a rank; None: none."""
    if rank is None:
        return {}
    room = next(size for size in _RANKS if size >= rank)
    lora = {"max_loras": 1, "max_lora_rank": room, "lora_target_modules": _LAYERS}
    return {"enable_lora": True, **lora}


def swap_adapter(llm: Any, tensors: Mapping[str, Tensor], rank: int) -> Any:
    """Put `tensors` in the place of the adapter before; return what requests name it by.

    They are those of `rollout.weights.split_tensors`, scale included.
    """
    from vllm.lora.request import LoRARequest

    # vLLM's public way in is a folder in PEFT's format.
    with TemporaryDirectory() as folder:
        named = {f"base_model.model.{n}": t.cpu().contiguous() for n, t in tensors.items()}
        save_file(named, Path(folder) / "adapter_model.safetensors")
        layers = {name.rsplit(".", 3)[1] for name in tensors}
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
        config["target_modules"] = sorted(layers)
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        llm.llm_engine.add_lora(LoRARequest(_NAME, 1, folder, load_inplace=True))
        return LoRARequest(_NAME, 1, folder)


def read_adapter(model: Any, rank: int | None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the adapter, if there is one, out of what vLLM's kernels read."""
    fused = model.packed_modules_mapping
    for path, layer in model.named_modules():
        owner, _, last = path.rpartition(".")
        downs, ups = getattr(layer, "lora_a_stacked", ()), getattr(layer, "lora_b_stacked", ())
        parts = fused.get(last, [last]) if downs else []
        for part, down, up in zip(parts, downs, ups, strict=True):
            # A layer without adapter is zero in both; a trained `lora_A` never is.
            if down.any() or up.any():
                yield f"{owner}.{part}.lora_A.weight", down[0, 0, :rank]
                yield f"{owner}.{part}.lora_B.weight", up[0, 0, :, :rank]
