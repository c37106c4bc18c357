"""Image tokenizer after TA-Tok: SigLIP encoder, bottleneck and SimVQ codebook.

Source: `spec` sections 1.1 and 1.3 of the published BLIP3o-NEXT code (`tok/ta_tok.py`,
`tok/ar_dtok/bottleneck.py`). The decoder of the published tokenizer reconstructs SigLIP features
and is not needed for generation; the tiny policy trains its codebook through a small decoder from
codes to pixel patches instead, kept beside the encoder for previews.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel


class SimVQ(nn.Module):
    """Codebook of fixed vectors seen through one learned linear map (SimVQ).

    Codes are nearest neighbours by cosine similarity, as in the published configuration
    (`l2_normalized: true`, deterministic argmax at inference).
    """

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, dim)
        self.embedding.weight.requires_grad_(False)
        self.embedding_proj = nn.Linear(dim, dim)

    def codebook(self) -> Tensor:
        """Return the unit code vectors, [codes, dim]."""
        return F.normalize(self.embedding_proj(self.embedding.weight), dim=-1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return (code vectors [..., dim], codes int64 [...]) nearest to `features`."""
        codebook = self.codebook()
        codes = (F.normalize(features, dim=-1) @ codebook.T).argmax(-1)
        return codebook[codes], codes


class ImageTokenizer(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] to codes [B, N], N = (H / patch)^2."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        vision = SiglipVisionConfig(**config["encoder"])
        self.encoder = SiglipVisionModel(vision)
        self.select_layer = int(config["select_layer"])
        hidden, dim = vision.hidden_size, int(config["bottleneck_dim"])
        self.encode_task_layer = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
        self.in_linear = nn.Linear(hidden, dim)
        self.quantizer = SimVQ(int(config["codebook_size"]), dim)
        self.patch = int(vision.patch_size)
        self.pixel_decoder: nn.Module | None = None
        if config.get("pixel_decoder_width"):
            width = int(config["pixel_decoder_width"])
            self.pixel_decoder = nn.Sequential(
                nn.Linear(dim, width), nn.GELU(), nn.Linear(width, 3 * self.patch**2)
            )

    def features(self, pixels: Tensor) -> Tensor:
        """Return the continuous bottleneck features, [B, N, dim]."""
        states = self.encoder.embeddings(pixels)
        # hidden_states[select_layer] of the published code; layers above it are never run.
        layers = self.encoder.encoder.layers
        for layer in layers[: len(layers) + 1 + self.select_layer]:
            states = layer(states, attention_mask=None)
        return self.in_linear(self.encode_task_layer(states))

    def encode(self, pixels: Tensor) -> Tensor:
        """Return codes int64 [B, N] in raster order."""
        return self.quantizer(self.features(pixels))[1]

    def patches_to_pixels(self, patches: Tensor) -> Tensor:
        """Lay decoded patches [B, N, 3 * patch^2] out as pictures [B, 3, H, W]."""
        batch, count, _ = patches.shape
        side = int(count**0.5)
        grid = patches.view(batch, side, side, 3, self.patch, self.patch)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(
            batch, 3, side * self.patch, side * self.patch
        )

    def preview(self, codes: Tensor) -> Tensor:
        """Return a rough picture of codes [B, N], in [-1, 1] (only with a pixel decoder)."""
        assert self.pixel_decoder is not None
        return self.patches_to_pixels(self.pixel_decoder(self.quantizer.codebook()[codes]))

    def save_pretrained(self, path: Path) -> None:
        """Write config.json and model.safetensors into folder `path`."""
        self.save_config(path)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()},
            path / "model.safetensors",
        )

    def save_config(self, path: Path) -> None:
        """Write config.json into folder `path`."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: Path) -> "ImageTokenizer":
        """Read a folder written by `save_pretrained`."""
        tokenizer = cls(json.loads((path / "config.json").read_text()))
        weights = load_file(path / "model.safetensors")
        tokenizer.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return tokenizer.eval()
