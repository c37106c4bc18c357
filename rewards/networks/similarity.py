"""How alike two pictures are: SSIM, LPIPS, CLIP and DINOv2 features.

Each measure is a function (source, edited, where) -> similarity in [0, 1], 1 for equal pictures;
both are RGB and of one size, and `where` (bool [H, W]) says which pixels count. SSIM and LPIPS are
averaged over those; the features of a network belong to the whole picture.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.errors import RewardError
from rewards.loading import loaded_once
from rewards.networks.open_clip_model import open_clip_model
from rewards.networks.weights import does_not_fit, fill, find_file, from_pretrained, read_tensors

Compare = Callable[[Image.Image, Image.Image, np.ndarray], float]

_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""LPIPS' names of torchvision's networks."""
_SSIM_REACH = 5
"""Rows and columns around a pixel that its 11 x 11 window covers."""
_STRIPE_PIXELS = 2**20
"""SSIM takes 300 bytes a pixel: 18 GB for the largest picture that is let in, if taken at once."""


def load(measure: str, args: Mapping[str, Any] | None) -> Compare:
    """Return the measure "ssim", "lpips", "clip" or "dino", its network made with `args`.

    `clip`: model, weights. `dino`: weights (folder or repository of transformers' Dinov2Model).
    `lpips`: weights (torchvision's ImageNet checkpoint of the backbone), net ("alex", the default,
    "vgg" or "squeeze"). All take revision and device. RewardError if an argument is missing or
    the weights are not there.
    """
    makers: dict[str, Callable[..., Compare]] = {"lpips": Lpips, "clip": Clip, "dino": Dino}
    if measure == "ssim":
        return ssim
    try:
        inspect.signature(makers[measure]).bind(**dict(args or {}))
    except TypeError as error:
        raise RewardError(
            f"measure `{measure}`: {error}. Fix: give its arguments under `networks: {{{measure}: "
            "...}}`, `weights` at least."
        ) from error
    return _kept(makers[measure], **dict(args or {}))


@loaded_once
def _kept(maker: Callable[..., Compare], **args: Any) -> Compare:
    return maker(**args)


def ssim(before: Image.Image, after: Image.Image, where: np.ndarray) -> float:
    """Return the mean of the structural similarity map (Wang et al. 2004), at least 0."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if not where.any():
        return 1.0
    width, height = before.size
    rows = max(1, _STRIPE_PIXELS // width)
    total = 0.0
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(0, top - _SSIM_REACH), min(height, bottom + _SSIM_REACH)
        pair = (_tensor(x.crop((0, first, width, last))) for x in (after, before))
        _, similarity = structural_similarity_index_measure(
            *pair, data_range=1.0, return_full_image=True
        )
        stripe = similarity[0].mean(dim=0)[top - first : bottom - first]
        total += float(stripe[torch.from_numpy(where[top:bottom])].double().sum())
    return min(1.0, max(0.0, total / int(where.sum())))


class Lpips:
    """1 - LPIPS (Zhang et al. 2018). torchmetrics brings the linear heads, not the backbone."""

    def __init__(
        self, weights: str, net: str = "alex", revision: str | None = None, device: str = "cpu"
    ) -> None:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        if net not in _BACKBONES:
            raise RewardError(f"lpips: net is `{net}`. Fix: {', '.join(_BACKBONES)}.")
        what = f"lpips backbone ({_BACKBONES[net]} of torchvision, ImageNet weights)"
        path = find_file(weights, revision, what)
        published = read_tensors(path, what)
        # `pnet_rand` keeps it from downloading. The slices hold the layers under their own numbers.
        network = _NoTrainLpips(net=net, spatial=True, pnet_rand=True)
        own = network.net.state_dict()
        layers = {name: re.sub(r"^slices?\.?\d+", "features", name) for name in own}
        try:
            state = {name: published[layer] for name, layer in layers.items()}
        except KeyError as error:
            raise does_not_fit(what, path, error) from error
        fill(network.net, state, path, what)
        self._network = network.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, before: Image.Image, after: Image.Image, where: np.ndarray) -> float:
        if not where.any():
            return 1.0
        both = [_tensor(picture).to(self._device) for picture in (before, after)]
        distance = self._network(*both, normalize=True)[0, 0].cpu()
        return float((1 - distance[torch.from_numpy(where)].mean()).clamp(0, 1))


class Clip:
    """Cosine of CLIP image features (open_clip)."""

    def __init__(
        self, model: str, weights: str, revision: str | None = None, device: str = "cpu"
    ) -> None:
        self._network = open_clip_model(model, weights, revision, device)

    def __call__(self, before: Image.Image, after: Image.Image, where: np.ndarray) -> float:
        first, second = self._network.images([before, after])
        return max(0.0, float(first @ second))


class Dino:
    """Cosine of the class tokens of DINOv2 (transformers)."""

    def __init__(self, weights: str, revision: str | None = None, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, Dinov2Model

        self._processor = from_pretrained(AutoImageProcessor, weights, revision, "dino processor")
        self._network = from_pretrained(Dinov2Model, weights, revision, "dino").to(device)

    @torch.inference_mode()
    def __call__(self, before: Image.Image, after: Image.Image, where: np.ndarray) -> float:
        pixels = self._processor([before, after], return_tensors="pt").to(self._network.device)
        first, second = self._network(**pixels).pooler_output.float()
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
        return max(0.0, float(cosine))


def _tensor(picture: Image.Image) -> torch.Tensor:
    """Return float32 [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
