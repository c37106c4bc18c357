"""A CLIP network through open_clip: unit features of pictures and texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image

from common.errors import RewardError
from rewards.loading import loaded_once
from rewards.networks.weights import does_not_fit, fill, find_file, sha256

OPENAI_VIT_L_14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
"""SHA-256 of OpenAI's ViT-L-14.pt, which stands in the address that open_clip loads it from."""
OPENAI_ARCHITECTURE = "ViT-L-14-quickgelu"
"""What open_clip calls its architecture."""
_NOT_IN_THE_NETWORK = ("input_resolution", "context_length", "vocab_size")


class OpenClip:
    """`model` is open_clip's name of the architecture, `weights` a checkpoint in its format.

    Pictures that are not square are cut to their middle, or with `whole_picture` padded with black.
    OpenAI's networks use QuickGELU: their architecture is called, for example,
    "ViT-L-14-quickgelu".
    """

    def __init__(
        self,
        model: str,
        weights: str,
        revision: str | None = None,
        device: str = "cpu",
        whole_picture: bool = False,
    ) -> None:
        if model not in open_clip.list_models():
            raise RewardError(
                f"open_clip has no model `{model}`. Fix: see open_clip.list_models()."
            )
        what = f"open_clip {model}"
        path = find_file(weights, revision, what)
        self.sha256 = sha256(path)
        self.device = device
        resize_mode = "longest" if whole_picture else "shortest"
        network, preprocess = _load(model, path, self.sha256, resize_mode, what)
        self.network = network.to(device).eval()
        self._preprocess = preprocess
        self._tokenize = open_clip.get_tokenizer(model)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit features, float32 [B, D]."""
        pixels = torch.stack([self._preprocess(image.convert("RGB")) for image in images])
        features = self.network.encode_image(pixels.to(self.device))
        return torch.nn.functional.normalize(features.float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit features, float32 [B, D]; texts beyond the context are cut."""
        tokens = self._tokenize(list(texts)).to(self.device)
        return torch.nn.functional.normalize(self.network.encode_text(tokens).float(), dim=-1)


@loaded_once
def open_clip_model(
    model: str,
    weights: str,
    revision: str | None = None,
    device: str = "cpu",
    whole_picture: bool = False,
) -> OpenClip:
    """Return the network, loaded on first use and kept."""
    return OpenClip(model, weights, revision, device, whole_picture)


def _load(model: str, path: Path, digest: str, resize_mode: str, what: str) -> tuple[Any, Any]:
    if digest == OPENAI_VIT_L_14:
        # A TorchScript archive, which `weights_only` refuses. Its hash says that it is OpenAI's.
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, image_resize_mode=resize_mode
        )
        state = dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        for name in _NOT_IN_THE_NETWORK:
            del state[name]
        fill(network, state, path, what)
        return network, preprocess
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=str(path), image_resize_mode=resize_mode
        )
    except Exception as error:  # zip, pickle, safetensors and torch each have errors of their own
        raise does_not_fit(what, path, error) from error
    return network, preprocess
