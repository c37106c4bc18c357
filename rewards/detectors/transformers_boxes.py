"""Detectors of transformers that return boxes: RT-DETR, Grounding DINO and OWLv2.

Stand-ins for GenEval's Mask2Former, and, in the case of the last two, detectors for classes that
it does not know. Boxes come without masks, so colours are told from whole crops.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import torch
from PIL import Image

from common.errors import RewardError
from rewards.detector import Detection
from rewards.detectors.clip_colors import ClipColors
from rewards.geneval_metadata import CLASSES
from rewards.networks.weights import from_pretrained

_OTHER_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""COCO's and Pascal VOC's names of GenEval's classes, where they differ."""
_SAME_OBJECT = 0.5
"""Boxes of one class that overlap more than this are one object, found by several queries."""
_BATCH = 8


class _BoxDetector:
    """What the three have in common."""

    name: str

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        color_weights: str | None = None,
        color_revision: str | None = None,
        color_model: str = "ViT-L-14-quickgelu",
        device: str = "cpu",
    ) -> None:
        self._device = device
        self._colors = ClipColors(color_weights, color_revision, color_model, device)
        self.not_comparable: str | None = f"{self.name} is not GenEval's Mask2Former"
        self._load(weights, revision)

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Return the detections of each picture, of any score."""
        pictures = [image.convert("RGB") for image in images]
        chunks = [pictures[i : i + _BATCH] for i in range(0, len(pictures), _BATCH)]
        return [found for chunk in chunks for found in self._detect_some(chunk)]

    def classify_colors(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """Return one of GenEval's ten colour names for each detection."""
        return self._colors(image, detections)

    def _load(self, weights: str, revision: str | None) -> None:
        raise NotImplementedError

    def _detect_some(self, images: list[Image.Image]) -> list[list[Detection]]:
        raise NotImplementedError


class RtDetr(_BoxDetector):
    """RT-DETR and its relatives (`AutoModelForObjectDetection`) trained on COCO's 80 classes.

    Example: weights PekingU/rtdetr_r50vd.
    """

    name = "rt_detr"

    def _load(self, weights: str, revision: str | None) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self._processor = from_pretrained(AutoImageProcessor, weights, revision, self.name)
        network = from_pretrained(AutoModelForObjectDetection, weights, revision, self.name)
        self._network = network.to(self._device)
        names = network.config.id2label
        self._labels = {int(k): _OTHER_NAMES.get(v, v) for k, v in names.items()}
        for name in CLASSES:
            if name not in self._labels.values():
                raise RewardError(
                    f"{self.name}: {weights} does not know the class `{name}`. Fix: give weights "
                    "trained on COCO's 80 classes."
                )

    @torch.inference_mode()
    def _detect_some(self, images: list[Image.Image]) -> list[list[Detection]]:
        pixels = self._processor(images=images, return_tensors="pt").to(self._device)
        results = self._processor.post_process_object_detection(
            self._network(**pixels), threshold=0.0, target_sizes=_sizes(images)
        )
        return [
            _detections(image, [self._labels[i] for i in result["labels"].tolist()], result)
            for image, result in zip(images, results, strict=True)
        ]


class _WordDetector(_BoxDetector):
    """A detector that looks for any words: GenEval's classes, or those it is given."""

    def __init__(
        self,
        weights: str,
        classes: Sequence[str] = CLASSES,
        revision: str | None = None,
        color_weights: str | None = None,
        color_revision: str | None = None,
        color_model: str = "ViT-L-14-quickgelu",
        device: str = "cpu",
    ) -> None:
        self._classes = tuple(classes)
        super().__init__(weights, revision, color_weights, color_revision, color_model, device)


class Owlv2(_WordDetector):
    """OWLv2, asked for "a photo of a CLASS". Example: google/owlv2-base-patch16-ensemble."""

    name = "owlv2"

    def _load(self, weights: str, revision: str | None) -> None:
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        self._processor = from_pretrained(Owlv2Processor, weights, revision, self.name)
        network = from_pretrained(Owlv2ForObjectDetection, weights, revision, self.name)
        self._network = network.to(self._device)

    @torch.inference_mode()
    def _detect_some(self, images: list[Image.Image]) -> list[list[Detection]]:
        texts = [[f"a photo of a {name}" for name in self._classes]] * len(images)
        inputs = self._processor(text=texts, images=images, return_tensors="pt").to(self._device)
        results = self._processor.post_process_grounded_object_detection(
            self._network(**inputs), threshold=0.0, target_sizes=_sizes(images)
        )
        return [
            _one_box_an_object(
                _detections(image, [self._classes[i] for i in result["labels"].tolist()], result)
            )
            for image, result in zip(images, results, strict=True)
        ]


class GroundingDino(_WordDetector):
    """Grounding DINO, asked for all classes in one sentence, "person. bicycle. ...".

    A class' score is the mean probability of its tokens, as in its authors' COCO evaluation.
    Example: weights IDEA-Research/grounding-dino-base.
    """

    name = "grounding_dino"

    def _load(self, weights: str, revision: str | None) -> None:
        from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

        self._processor = from_pretrained(GroundingDinoProcessor, weights, revision, self.name)
        network = from_pretrained(GroundingDinoForObjectDetection, weights, revision, self.name)
        self._network = network.to(self._device)
        self._sentence = " ".join(f"{name}." for name in self._classes)
        self._tokens = self._tokens_of_classes(network.config.max_text_len)

    @torch.inference_mode()
    def _detect_some(self, images: list[Image.Image]) -> list[list[Detection]]:
        inputs = self._processor(
            images=images, text=[self._sentence] * len(images), return_tensors="pt"
        ).to(self._device)
        output = self._network(**inputs)
        # [B, queries, tokens] @ [tokens, classes] -> [B, queries, classes]
        probabilities = output.logits.sigmoid() @ self._tokens.to(self._device)
        scores, labels = probabilities.max(-1)
        results = []
        for index, image in enumerate(images):
            scale = torch.tensor([image.width, image.height] * 2, device=self._device)
            x, y, width, height = output.pred_boxes[index].unbind(-1)
            boxes = torch.stack(
                [x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1
            )
            names = [self._classes[i] for i in labels[index].tolist()]
            found = {"scores": scores[index], "boxes": boxes * scale}
            results.append(_one_box_an_object(_detections(image, names, found)))
        return results

    def _tokens_of_classes(self, length: int) -> torch.Tensor:
        """Return weights [tokens, classes] that average over the tokens of each class."""
        offsets = self._processor.tokenizer(self._sentence, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        if len(offsets) > length:
            raise RewardError(
                f"{self.name}: {len(self._classes)} classes make {len(offsets)} tokens, {length} "
                "fit. Fix: give fewer `classes`."
            )
        table = torch.zeros(length, len(self._classes))
        start = 0
        for index, name in enumerate(self._classes):
            end = start + len(name)
            own = [i for i, (a, b) in enumerate(offsets) if a < b and start <= a and b <= end]
            table[own, index] = 1 / len(own)
            start = end + len(". ")
        return table


def _sizes(images: Sequence[Image.Image]) -> list[tuple[int, int]]:
    return [(image.height, image.width) for image in images]


def _detections(image: Image.Image, names: Sequence[str], result: Any) -> list[Detection]:
    found = []
    for name, score, box in zip(
        names, result["scores"].tolist(), result["boxes"].tolist(), strict=True
    ):
        x0, y0, x1, y1 = (
            min(max(edge, 0.0), float(limit))
            for edge, limit in zip(box, (image.width, image.height) * 2, strict=True)
        )
        found.append(Detection(name, score, (x0, y0, x1, y1)))
    return found


def _one_box_an_object(found: list[Detection]) -> list[Detection]:
    """Keep the best of the boxes of one class that lie on one another."""
    labels = {name: index for index, name in enumerate(dict.fromkeys(d.label for d in found))}
    kept = cv2.dnn.NMSBoxesBatched(
        [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in (d.box_xyxy for d in found)],
        [d.score for d in found],
        [labels[d.label] for d in found],
        score_threshold=0.0,
        nms_threshold=_SAME_OBJECT,
    )
    return [found[int(index)] for index in kept]
