"""PickScore (Kirstain et al. 2023): a CLIP fine-tuned on people's choices, through transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from rewards.loading import loaded_once
from rewards.networks.weights import from_pretrained

_SCALE = 26
"""flow_grpo divides by it, so that scores are of the order of 1."""


class PickScore:
    """`weights` and `processor`: folders or hub names."""

    def __init__(
        self,
        weights: str,
        processor: str,
        revision: str | None = None,
        processor_revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self._network = from_pretrained(CLIPModel, weights, revision, "pick_score").to(device)
        self._processor = from_pretrained(
            CLIPProcessor, processor, processor_revision, "pick_score processor"
        )
        self._device = device

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return logit scale x cosine / 26 of each picture and its prompt."""
        inputs = self._processor(
            text=list(prompts),
            images=[image.convert("RGB") for image in images],
            padding=True,
            truncation=True,
            max_length=self._network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        output = self._network(**inputs)
        cosines = (output.image_embeds * output.text_embeds).sum(-1)
        return [float(x) for x in self._network.logit_scale.exp() * cosines / _SCALE]


@loaded_once
def pick_score_model(**args: Any) -> PickScore:
    """Return the network, loaded on first use and kept."""
    return PickScore(**args)
