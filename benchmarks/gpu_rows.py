"""What `benchmarks.gpu` measures at: true dimensions or toys, and how rows are kept and printed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from policy import published

PROMPT = 64
"""Tokens of a prompt, template included."""
GROUP = 16
"""Pictures of a prompt."""
QWEN3_06B = published.QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072}
PROMPT = 64
GROUP = 16


@dataclass
class Size:
    """What is measured: true dimensions, or toys that run anywhere."""

    device: str
    dtype: torch.dtype
    models: dict[str, dict[str, Any]]
    sana: dict[str, Any]
    vae: dict[str, Any]
    image_start: int
    image_tokens: int
    tokens: int
    latent: int
    batches: tuple[int, ...]
    images: int
    micro_batch: int
    decodes: tuple[tuple[int, int, float], ...]
    """(latent side, steps, guidance) of each decode row."""
    square: int
    """Side of the matrices that measure the matrix rate."""


TRUE = Size(
    device="cuda",
    dtype=torch.bfloat16,
    models={"Qwen3-0.6B": QWEN3_06B, "Qwen3-1.7B": published.QWEN3},
    sana=published.SANA,
    vae=published.DC_AE,
    image_start=151_674,
    image_tokens=65_536,
    tokens=729,
    latent=32,
    batches=(64, 128, 256, 512),
    images=512,
    micro_batch=16,
    decodes=((32, 30, 2.0), (32, 10, 1.0), (16, 20, 2.0), (16, 10, 1.0)),
    square=8192,
)
_TINY_MODEL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
_TINY_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "sample_size": 4,
}
_TINY_VAE = {
    "latent_channels": 4,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), ()),
    "decoder_qkv_multiscales": ((), ()),
}
TOY = Size(
    device="cpu",
    dtype=torch.float32,
    models={"toy": _TINY_MODEL},
    sana=_TINY_SANA,
    vae=_TINY_VAE,
    image_start=100,
    image_tokens=64,
    tokens=9,
    latent=4,
    batches=(4,),
    images=4,
    micro_batch=2,
    decodes=((4, 2, 2.0), (4, 2, 1.0)),
    square=64,
)


class Bench:
    """Measures rows one after the other and keeps them, the skipped ones with their reason."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.rows: list[dict[str, Any]] = []
        self.matmul = self.bandwidth = 0.0

    def seconds(self, run: Callable[[], object], repeats: int = 3) -> float:
        """Return the median wall seconds of `run`, after one that warms up."""
        times = []
        for turn in range(repeats + 1):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            if turn:
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def once(self, run: Callable[[], None]) -> float:
        """Return the seconds of `run` without warming up: a published step takes minutes."""
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.size.device == "cuda":
            torch.cuda.synchronize()

    def add(self, row: str, value: float, unit: str, share: float | None = None) -> None:
        """Keep and print one measured row."""
        self.rows.append({"row": row, "value": value, "unit": unit, "share_of_ceiling": share})
        of = "" if share is None else f"{share:>8.0%} of the ceiling"
        print(f"{row:58}{value:>12,.2f} {unit:12}{of}", flush=True)

    def section(self, name: str, measure: Callable[["Bench"], None]) -> None:
        """Run one section; what it lacks is said instead of measured."""
        try:
            measure(self)
        except ModuleNotFoundError as error:
            self.skip(name, f"{error.name} is not installed here")
        except torch.OutOfMemoryError:
            self.skip(name, "it does not fit the GPU's memory")
        if self.size.device == "cuda":
            torch.cuda.empty_cache()

    def skip(self, row: str, reason: str) -> None:
        """Keep and print why a row is missing."""
        self.rows.append({"row": row, "skipped": reason})
        print(f"{row:58}{'skipped':>12} {reason}", flush=True)
