"""The connector between hidden states of the language model and the diffusion head."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class ConnectorNorm(nn.Module):
    """RMS norm with the published start: every weight is the square root of 5.5."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 5.5**0.5))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension in float32 and scale."""
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(states.dtype) * self.weight


class Connector(nn.Sequential):
    """Linear - GELU(tanh) - Linear - RMSNorm (published code, `blip3o_arch.py:31-41`).

    With `positions` > 0 a learned vector per row is added to the result, so that a small head
    knows which cell of the picture a row speaks of; the published model has none.
    """

    def __init__(self, hidden_size: int, width: int, positions: int = 0) -> None:
        super().__init__(
            nn.Linear(hidden_size, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
            ConnectorNorm(width),
        )
        self.position = nn.Parameter(torch.zeros(positions, width)) if positions else None

    @property
    def width(self) -> int:
        """Channels of a condition row."""
        norm: ConnectorNorm = self[3]  # type: ignore[assignment]
        return len(norm.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Map hidden states [B, R, hidden] to conditions [B, R, width]."""
        conditions = super().forward(input)
        return conditions if self.position is None else conditions + self.position

    def save_pretrained(self, path: Path) -> None:
        """Write config.json and model.safetensors into folder `path`."""
        self.save_config(path)
        save_file(self.state_dict(), path / "model.safetensors")

    def save_config(self, path: Path) -> None:
        """Write config.json into folder `path`."""
        path.mkdir(parents=True, exist_ok=True)
        linear: nn.Linear = self[0]  # type: ignore[assignment]
        facts = {
            "hidden_size": linear.in_features,
            "width": self.width,
            "positions": 0 if self.position is None else len(self.position),
        }
        (path / "config.json").write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: Path) -> "Connector":
        """Read a folder written by `save_pretrained`."""
        connector = cls(**json.loads((path / "config.json").read_text()))
        connector.load_state_dict(load_file(path / "model.safetensors"))
        return connector


def new_reference_connector(latent_channels: int, width: int, positions: int = 0) -> Connector:
    """Return a connector for reference latents, started almost silent (spec section 1.9 (a))."""
    connector = Connector(latent_channels, width, positions)
    for module in connector:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=0.1)
            nn.init.zeros_(module.bias)
    return connector
