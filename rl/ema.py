"""A moving average of the weights, kept beside the training."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

EMA_FILE = "ema.safetensors"


class EmaCallback(TrainerCallback):
    """After every step, average = decay * average + (1 - decay) * weight, in float32."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self._weights = dict(named)
        self.average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the weights, unless an average was loaded."""
        if not self.average:
            self.average = {n: p.detach().float().clone() for n, p in self._weights.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the weights."""
        for name, weight in self._weights.items():
            self.average[name].lerp_(weight.float(), 1 - self.decay)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        save_file({n: t.cpu().contiguous() for n, t in self.average.items()}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's average."""
        loaded = load_file(folder / EMA_FILE)
        self.average = {n: loaded[n].to(p.device) for n, p in self._weights.items()}
