"""Small networks with random weights of fixed seeds, saved in the formats of the published ones."""

import json
from pathlib import Path

import torch


def save_tiny_clip(folder: Path, name: str = "tiny-clip") -> dict[str, str]:
    """Register a small CLIP architecture with open_clip, save weights, return {model, weights}."""
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    weights = folder / f"{name}.pt"
    torch.save(open_clip.create_model(name).state_dict(), weights)
    return {"model": name, "weights": str(weights)}
