"""GenEval's colour classification: zero-shot CLIP on the masked crop of an object."""

from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image

from common.errors import RewardError
from rewards.detector import Detection
from rewards.geneval_metadata import COLORS
from rewards.networks.open_clip_model import (
    OPENAI_ARCHITECTURE,
    OPENAI_VIT_L_14,
    OpenClip,
    open_clip_model,
)

_TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
_GREY = "#999"


class ClipColors:
    """Callable (picture, detections) -> colour names.

    Official: OpenAI's ViT-L-14 through open_clip. Each object is cut out over grey along its mask
    and cropped to its box; a colour's text feature is the mean over three templates.
    """

    def __init__(self, weights: str | None, revision: str | None, model: str, device: str) -> None:
        self._clip: OpenClip | None = None
        if weights is not None:
            self._clip = open_clip_model(model, weights, revision, device)
        # The same weights run in an architecture with another activation, and give other features.
        self.official = (
            self._clip is not None
            and self._clip.sha256 == OPENAI_VIT_L_14
            and model == OPENAI_ARCHITECTURE
        )
        self._texts = cache(self._text_features)

    def __call__(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """Return one of the ten colour names for each detection."""
        if not detections:
            return []
        if self._clip is None:
            raise RewardError(
                "the prompts ask for colours and the detector has no `color_weights`. Fix: give "
                "OpenAI's ViT-L-14.pt under `detector_args`."
            )
        features = self._clip.images([cut_out(image, item) for item in detections])
        chosen = [
            int((feature @ self._texts(item.label).T).argmax())
            for feature, item in zip(features, detections, strict=True)
        ]
        return [COLORS[index] for index in chosen]

    def _text_features(self, label: str) -> torch.Tensor:
        """Return unit features [10, D] of the colours of an object called `label`."""
        assert self._clip is not None
        texts = [t.format(color=color, label=label) for color in COLORS for t in _TEMPLATES]
        features = self._clip.texts(texts)
        means = features.reshape(len(COLORS), len(_TEMPLATES), -1).mean(dim=1)
        return torch.nn.functional.normalize(means, dim=-1)


def cut_out(image: Image.Image, item: Detection) -> Image.Image:
    """Return the object over grey, cropped to its box; without a mask, the crop alone."""
    picture = image.convert("RGB")
    if item.mask is not None:
        grey = Image.new("RGB", picture.size, _GREY)
        picture = Image.composite(picture, grey, Image.fromarray(item.mask))
    return picture.crop(item.box_xyxy)
