"""ImageReward (Xu et al. 2023) on transformers' BLIP: its own package needs an old transformers.

The published checkpoint, ImageReward.pt, holds BLIP's image and text encoders under BLIP's first
names and a head of five linear layers. The score is (head - mean) / std of the text encoder's first
token, which has attended to the picture.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision import transforms

from common.errors import RewardError
from rewards.loading import loaded_once
from rewards.networks.weights import fill, find_file, from_pretrained, read_tensors

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35
_HEAD_WIDTH = 64
"""Of the attention heads, in both encoders."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|position_ids$")
_VISION_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm.", "post_layernorm."),
    ("blocks.", "encoder.layers."),
)
_BLOCK_NAMES = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


class ImageReward:
    """`weights`: ImageReward.pt; `tokenizer`: folder or hub name of bert-base-uncased's."""

    def __init__(
        self,
        weights: str,
        tokenizer: str,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoTokenizer

        what = "image_reward"
        path = find_file(weights, revision, what)
        parts = split(read_tensors(path, what))
        self._vision, self._text = _encoders(parts)
        self._head = linear_head(
            [value.shape for k, value in parts["mlp"].items() if "weight" in k]
        )
        modules = {"vision": self._vision, "text": self._text, "mlp": self._head}
        for name, module in modules.items():
            fill(module, parts[name], path, f"{what} ({name})")
            module.to(device)
        self._tokenizer = from_pretrained(AutoTokenizer, tokenizer, tokenizer_revision, what)
        side = self._vision.config.image_size
        self._prepare = transforms.Compose(
            [
                transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(_CLIP_MEAN, _CLIP_STD),
            ]
        )
        self._device = device

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return the raw score of each picture for its prompt; about 0 on average, std about 1."""
        pixels = torch.stack([self._prepare(image.convert("RGB")) for image in images])
        words = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=_TOKENS,
            return_tensors="pt",
        ).to(self._device)
        seen = self._vision(pixel_values=pixels.to(self._device)).last_hidden_state
        read = self._text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=self._device),
        ).last_hidden_state[:, 0]
        scores = (self._head(read.float())[:, 0] - _MEAN) / _STD
        return [float(score) for score in scores]


@loaded_once
def image_reward_model(**args: Any) -> ImageReward:
    """Return the network, loaded on first use and kept."""
    return ImageReward(**args)


def linear_head(shapes: Sequence[torch.Size]) -> torch.nn.Sequential:
    """Return linear layers of these weight shapes, numbered as in the published heads.

    ImageReward's and the aesthetic predictor's head are a `Sequential` of linear layers with a
    dropout after the first three and nothing between the others: layers 0, 2, 4, 6, 7, ...
    """
    layers: list[torch.nn.Module] = []
    for index, (outputs, inputs) in enumerate(shapes):
        layers.append(torch.nn.Linear(inputs, outputs))
        if index < 3:
            layers.append(torch.nn.Dropout())
    return torch.nn.Sequential(*layers)


def split(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of "vision", "text" and "mlp" under transformers' names."""
    parts: dict[str, dict[str, torch.Tensor]] = {"vision": {}, "text": {}, "mlp": {}}
    starts = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.layers.": "mlp"}
    for name, value in state.items():
        if _UNUSED.search(name):
            continue
        start = next((start for start in starts if name.startswith(start)), None)
        if start is None:
            raise RewardError(
                f"image_reward: the tensor `{name}` is not one of ImageReward. Fix: give the "
                "published ImageReward.pt."
            )
        rest = name.removeprefix(start)
        parts[starts[start]][_vision_name(rest) if starts[start] == "vision" else rest] = value
    return parts


def _vision_name(name: str) -> str:
    old, new = next(((o, n) for o, n in _VISION_NAMES if name.startswith(o)), ("", ""))
    name = new + name[len(old) :]
    for old, new in _BLOCK_NAMES:
        name = name.replace(old, new)
    return name


def _encoders(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[Any, Any]:
    """Return BLIP's encoders, their sizes read from the tensors."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision, text = parts["vision"], parts["text"]
    try:
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        positions = vision["embeddings.position_embedding"].shape[1] - 1
        feed_forward = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
        words, hidden = text["embeddings.word_embeddings.weight"].shape
        seen = text["encoder.layer.0.crossattention.self.key.weight"].shape[1]
        lengths = text["embeddings.position_embeddings.weight"].shape[0]
        inner = text["encoder.layer.0.intermediate.dense.weight"].shape[0]
    except KeyError as error:
        raise RewardError(
            f"image_reward: the tensor {error} is missing. Fix: give the published ImageReward.pt."
        ) from error
    image_side = round(positions**0.5) * patch
    return (
        BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=feed_forward,
                num_hidden_layers=_depth(vision, r"encoder\.layers\.(\d+)\."),
                num_attention_heads=width // _HEAD_WIDTH,
                image_size=image_side,
                patch_size=patch,
                layer_norm_eps=1e-6,  # BLIP's own; transformers' default is another
            )
        ),
        BlipTextModel(
            BlipTextConfig(
                vocab_size=words,
                hidden_size=hidden,
                encoder_hidden_size=seen,
                intermediate_size=inner,
                num_hidden_layers=_depth(text, r"encoder\.layer\.(\d+)\."),
                num_attention_heads=hidden
                // _HEAD_WIDTH,  # transformers' default is 8, BLIP has 12
                max_position_embeddings=lengths,
                is_decoder=True,  # builds the cross-attention; attention stays two-way
            ),
            add_pooling_layer=False,
        ),
    )


def _depth(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))
