"""What a detector returns and what every detector must offer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from PIL import Image

from common.errors import RewardError
from common.registry import Registry

DETECTORS = Registry("detector", group="atelier.detectors", error=RewardError)
DETECTORS.add("scenes", "rewards.scene_detector:SceneDetector")


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
    leaderboard_comparable: str | None
    """Why scores from this detector may not be put beside published ones; None if they may."""

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Return all detections of each picture, of any score."""

    def classify_colors(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """Return one colour name for each detection."""


@cache
def load_detector(name: str) -> Detector:
    """Return the detector called `name`, made on first use and kept; RewardError if unknown."""
    detector: Detector = DETECTORS.get(name)()
    return detector
