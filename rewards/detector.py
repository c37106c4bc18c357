"""What a detector returns, what every detector must offer, and how one is found by name."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from common.errors import RewardError
from common.registry import Registry, nearest
from rewards.loading import loaded_once

DETECTORS = Registry("detector", group="atelier.detectors", error=RewardError)
DETECTORS.add("scenes", "rewards.scene_detector:SceneDetector")
DETECTORS.add("mask2former", "rewards.detectors.mask2former:Mask2Former")
DETECTORS.add("rt_detr", "rewards.detectors.transformers_boxes:RtDetr")
DETECTORS.add("grounding_dino", "rewards.detectors.transformers_boxes:GroundingDino")
DETECTORS.add("owlv2", "rewards.detectors.transformers_boxes:Owlv2")


@dataclass(frozen=True)
class Detection:
    """One found object: class name, score in [0, 1], box in pixels, optional mask [H, W] bool."""

    label: str
    score: float
    box_xyxy: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects and names their colours."""

    name: str
    not_comparable: str | None
    """Why scores from this detector may not be put beside published ones; None if they may."""

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Return all detections of each picture, of any score."""

    def classify_colors(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """Return one colour name for each detection."""


def load_detector(name: str, args: Mapping[str, Any] | None = None) -> Detector:
    """Return the detector called `name`, made with `args` on first use and kept.

    Raises RewardError for an unknown name, an argument it lacks or one that is missing.
    """
    return _made(name, json.dumps(dict(args or {}), sort_keys=True))


@loaded_once
def _made(name: str, args_json: str) -> Detector:
    make = DETECTORS.get(name)
    args = json.loads(args_json)
    known = inspect.signature(make).parameters
    for key in args:
        if key not in known:
            close = nearest(key, known)
            fix = f"Did you mean `{close}`?" if close else f"It takes: {', '.join(known) or '-'}."
            raise RewardError(f"detector `{name}` has no argument `{key}`. {fix}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in args:
            raise RewardError(
                f"detector `{name}` needs `{key}`. Fix: give it under `detector_args`."
            )
    detector: Detector = make(**args)
    return detector
