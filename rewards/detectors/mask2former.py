"""GenEval's detector, Mask2Former, through transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from common.errors import RewardError
from rewards.detector import Detection
from rewards.detectors.clip_colors import ClipColors
from rewards.detectors.mmdet_names import config_of, from_mmdet, is_mmdet
from rewards.geneval_metadata import CLASSES
from rewards.networks.weights import fill, from_pretrained, read_tensors, sha256

OFFICIAL_SHA256 = "743b7d99"
"""How the SHA-256 of the official checkpoint begins; mmdet puts it into its files' names."""
_TOP = 100
_MASK_FLOOR = 0.1
"""Masks of detections below are not kept: no rule looks at them, and 100 of them fill memory."""
_LONG_SIDE, _SHORT_SIDE = 1333, 800
_DIVISOR = 32
_MEAN = np.array((123.675, 116.28, 103.53), np.float32)
_STD = np.array((58.395, 57.12, 57.375), np.float32)


class Mask2Former:
    """Mask2Former with mmdet's preparation of pictures and reading of results (80 COCO classes).

    `weights` is the official checkpoint (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_
    20220504_001756-743b7d99.pth, converted while loading) or a transformers folder or repository,
    as facebook/mask2former-swin-small-coco-instance, which is another training run: its scores
    differ. `color_weights` and `color_model` are for `ClipColors`; without weights, prompts that
    ask for a colour cannot be scored. Scores are comparable with published ones only if both files
    are the official ones, which is told by their hashes.
    """

    name = "mask2former"

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        color_weights: str | None = None,
        color_revision: str | None = None,
        color_model: str = "ViT-L-14-quickgelu",
        device: str = "cpu",
        short_side: int = _SHORT_SIDE,
    ) -> None:
        self._network, official = _load(weights, revision)
        self._network.to(device)
        self._device = device
        self._short_side = short_side
        self._colors = ClipColors(color_weights, color_revision, color_model, device)
        reasons = []
        if not official:
            reasons.append(f"detector weights {weights} are not GenEval's own")
        if short_side != _SHORT_SIDE:
            reasons.append(f"pictures are scaled to {short_side} pixels instead of {_SHORT_SIDE}")
        if not self._colors.official:
            reasons.append("colours are not told by OpenAI's ViT-L-14.pt as ViT-L-14-quickgelu")
        self.not_comparable: str | None = "; ".join(reasons) or None

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Return 100 detections of each picture, of any score (see `read_output`)."""
        return [self._detect_one(image) for image in images]

    def classify_colors(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """Return one of GenEval's ten colour names for each detection."""
        return self._colors(image, detections)

    @torch.inference_mode()
    def _detect_one(self, image: Image.Image) -> list[Detection]:
        pixels, (height, width) = prepare(image, self._short_side)
        output = self._network(pixel_values=pixels.to(self._device))
        # Masks at the size of the padded input, then without the padding, then of the picture.
        masks = interpolate(output.masks_queries_logits, pixels.shape[-2:], mode="bilinear")
        masks = masks[..., :height, :width]
        masks = interpolate(masks, (image.height, image.width), mode="bilinear")
        return read_output(output.class_queries_logits[0], masks[0])


def prepare(
    image: Image.Image, short_side: int = _SHORT_SIDE
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return the network's input [1, 3, H, W] and the (height, width) of the picture in it.

    As mmdet's test pipeline: scaled to fit 1333 x 800 (bilinear, OpenCV), normalised, and padded
    with zeros at the right and below to multiples of 32.
    """
    array = np.asarray(image.convert("RGB"))
    long_side = short_side * _LONG_SIDE / _SHORT_SIDE
    scale = min(long_side / max(array.shape[:2]), short_side / min(array.shape[:2]))
    height, width = (int(side * scale + 0.5) for side in array.shape[:2])
    scaled = cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)
    normal = (scaled.astype(np.float32) - _MEAN) / _STD
    pixels = torch.from_numpy(normal).permute(2, 0, 1)[None]
    return pad(pixels, (0, -width % _DIVISOR, 0, -height % _DIVISOR)), (height, width)


def read_output(classes: torch.Tensor, masks: torch.Tensor) -> list[Detection]:
    """Return the detections of one picture as mmdet's instance post-processing does.

    `classes` are logits [queries, 81], the last being "nothing"; `masks` are logits
    [queries, H, W]. Of all pairs of a query and a class the 100 most probable are kept, so one
    query may be found as several classes. Score: class probability x mean of the mask's
    probabilities where they exceed one half. The box encloses that mask; it is zero if empty. The
    mask itself comes along with scores above 0.1.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    scores, places = probabilities.flatten().topk(min(_TOP, probabilities.numel()))
    labels = (places % probabilities.shape[1]).tolist()
    queries = (places // probabilities.shape[1]).tolist()
    detections = []
    for score, label, query in zip(scores.tolist(), labels, queries, strict=True):
        inside = masks[query] > 0
        quality = float((masks[query].sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        mask = inside.cpu().numpy()
        kept = mask if score * quality > _MASK_FLOOR else None
        detections.append(Detection(CLASSES[label], score * quality, _box(mask), kept))
    return detections


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not columns.size:
        return (0.0, 0.0, 0.0, 0.0)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _load(weights: str, revision: str | None) -> tuple[Any, bool]:
    """Return the network and whether its weights are the official ones."""
    from transformers import Mask2FormerForUniversalSegmentation

    what = "mask2former"
    path = Path(weights).expanduser()
    if not path.is_file():
        network = from_pretrained(Mask2FormerForUniversalSegmentation, weights, revision, what)
        _check_classes(network.config.num_labels, weights)
        return network, False
    state = read_tensors(path, what)
    if not is_mmdet(state):
        raise RewardError(
            f"{what}: {path} is not an mmdet checkpoint of Mask2Former. Fix: give that file, or "
            "the folder or hub name of a transformers model."
        )
    config = config_of(state)
    _check_classes(config.num_labels, weights)
    network = Mask2FormerForUniversalSegmentation(config)
    tensors = from_mmdet(state)
    # These two are transformers' own and never used here: a norm of the last Swin stage, and the
    # class weights of the loss.
    unused = ("encoder.swin.layernorm.", "criterion.")
    for name, value in network.state_dict().items():
        if any(part in name for part in unused):
            tensors[name] = value
    fill(network, tensors, path, what)
    return network, sha256(path).startswith(OFFICIAL_SHA256)


def _check_classes(number: int, weights: str) -> None:
    if number != len(CLASSES):
        raise RewardError(
            f"mask2former: {weights} tells {number} classes apart; GenEval needs COCO's 80 in "
            "their order. Fix: give weights trained on COCO instances."
        )
