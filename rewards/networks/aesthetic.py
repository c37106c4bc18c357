"""The head of LAION's aesthetic predictor (christophschuhmann/improved-aesthetic-predictor)."""

import torch

from rewards.loading import loaded_once
from rewards.networks.image_reward import linear_head
from rewards.networks.weights import fill, find_file, read_tensors


@loaded_once
def aesthetic_head(head: str, revision: str | None, device: str) -> torch.nn.Module:
    """Return the head, CLIP features [B, D] -> [B, 1], loaded on first use and kept."""
    what = "aesthetic head"
    path = find_file(head, revision, what)
    state = {k.removeprefix("layers."): v for k, v in read_tensors(path, what).items()}
    module = linear_head([value.shape for name, value in state.items() if "weight" in name])
    fill(module, state, path, what)
    return module.to(device).requires_grad_(False)
