"""Object detector of the scene world: exact on its own pictures, built on OpenCV alone.

A pixel belongs to the palette colour on whose mixing line with the background it lies, if that
colour makes up more than half of it; grey pixels (background, plaques, ink) belong to none.
Connected pixels of one colour are one object; the class is the shape whose outline overlaps it
best.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from PIL import Image

from common.scene_world import BACKGROUND, CLASSES, COLORS, IMAGE_SIZE, shape_coverage
from rewards.detector import Detection

_WINDOW = 24
_MIN_PIXELS = 12
_GREY = 40
_CENTERS = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, -1), (-1, 1), (1, 1))
"""Shifts of a box's centre that are tried in turn, in half pixels."""
_IOU_FLOOR, _IOU_CEILING = 0.4, 0.8
_NAMES = tuple(COLORS)
_PAPER = np.array(BACKGROUND, np.float32)[:, None]
_AXES = np.array(list(COLORS.values()), np.float32) - _PAPER.T
_SQUARED_LENGTHS = (_AXES**2).sum(1)[:, None]


@dataclass(frozen=True)
class _SceneDetection(Detection):
    """A detection that remembers its colour and the picture in which it was found."""

    color: str = ""
    image: Image.Image | None = None


class SceneDetector:
    """Finds coloured shapes in 48 x 48 pictures (`rewards.detector.Detector`).

    The score grows linearly from 0 at an overlap (intersection over union with the ideal
    outline) of 0.4 to 1 at 0.8, so GenEval's thresholds 0.3 and 0.9 mean overlaps of 0.52
    and 0.76. Pictures of another size are scaled first; boxes are given in their own pixels, masks
    stay 48 x 48.
    """

    name = "scenes"
    not_comparable: str | None = "the scene world is not GenEval's set of photographs"

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Return the detections of each picture, best first."""
        return [_detect_one(image) for image in images]

    def classify_colors(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """Return for each detection the palette colour most of its pixels have."""
        return [
            # All pixels of an own detection have one colour, which was known when it was found.
            item.color
            if isinstance(item, _SceneDetection) and item.image is image
            else _main_color(image, item)
            for item in detections
        ]


def _detect_one(image: Image.Image) -> list[Detection]:
    colors = _pixel_colors(_pixels(image))
    detections: list[Detection] = []
    scale_x, scale_y = image.width / IMAGE_SIZE, image.height / IMAGE_SIZE
    present = np.bincount(colors.ravel() + 1, minlength=len(_NAMES) + 1)[1:]
    for index in np.flatnonzero(present >= _MIN_PIXELS):
        count, areas, stats, _ = cv2.connectedComponentsWithStats(
            (colors == index).view(np.uint8), connectivity=4
        )
        for component in range(1, count):
            left, top, width, height, pixels = stats[component].tolist()
            if pixels >= _MIN_PIXELS:
                mask = areas == component
                box = (left, top, left + width, top + height)
                label, overlap = _best_shape(mask, box, pixels)
                score = (overlap - _IOU_FLOOR) / (_IOU_CEILING - _IOU_FLOOR)
                x0, y0, x1, y1 = map(float, box)
                detections.append(
                    _SceneDetection(
                        label,
                        min(max(score, 0.0), 1.0),
                        (x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y),
                        mask,
                        _NAMES[index],
                        image,
                    )
                )
    return sorted(detections, key=lambda d: -d.score)


def _main_color(image: Image.Image, detection: Detection) -> str:
    assert detection.mask is not None  # every scene detection carries its mask
    inside = _pixel_colors(_pixels(image))[detection.mask]
    return _NAMES[np.bincount(inside[inside >= 0], minlength=len(_NAMES)).argmax()]


def _pixels(image: Image.Image) -> np.ndarray:
    """Return the picture as uint8 [48, 48, 3]."""
    picture = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if picture.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        picture = cv2.resize(picture, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    return picture


def _pixel_colors(picture: np.ndarray) -> np.ndarray:
    """Return the palette index of each pixel, -1 for background and signs; int64 [H, W]."""
    planes = cv2.split(picture)
    brightest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    darkest = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    vivid = brightest - darkest > _GREY
    colors = np.full(vivid.shape, -1)
    # Only pixels that are not grey can have a colour, and they are few.
    offset = np.stack([plane[vivid] for plane in planes]).astype(np.float32) - _PAPER
    share = sum(_AXES[:, k, None] * offset[k] for k in range(3)) / _SQUARED_LENGTHS
    residual = sum(np.square(offset[k] - share * _AXES[:, k, None]) for k in range(3))
    index = residual.argmin(0)
    at_best = share[index, np.arange(len(index))]
    colors[vivid] = np.where(at_best > 0.5, index, -1)
    return colors


@cache
def _outlines(half_x: bool, half_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ideal outlines in a window whose middle is on a pixel corner, or half a pixel off it.

    Returned as one 0-or-1 row of a float32 [classes, 24 * 24] for each class, with its area.
    """
    middle = _WINDOW / 2
    x, y = middle + half_x / 2, middle + half_y / 2
    shapes = np.stack([shape_coverage(label, x, y, _WINDOW).ravel() > 0.5 for label in CLASSES])
    return shapes.astype(np.float32), shapes.sum(1)


def _best_shape(mask: np.ndarray, box: tuple[int, int, int, int], pixels: int) -> tuple[str, float]:
    """Return the class whose outline, centred in the box, overlaps the mask best, and how well.

    Where no outline fits well, centres half a pixel around the box's are tried too: one faint row
    (the tip of a triangle, the rim of a ring) moves a box by as much.
    `pixels` is the area of the mask; what lies outside the window counts as not overlapping.
    """
    best, best_overlap = 0, -1.0
    for twice_x, twice_y in _CENTERS:
        x, y = box[0] + box[2] + twice_x, box[1] + box[3] + twice_y
        left, top = x // 2 - _WINDOW // 2, y // 2 - _WINDOW // 2
        x0, y0 = max(box[0], left), max(box[1], top)
        x1, y1 = min(box[2], left + _WINDOW), min(box[3], top + _WINDOW)
        window = np.zeros((_WINDOW, _WINDOW), np.float32)
        window[y0 - top : y1 - top, x0 - left : x1 - left] = mask[y0:y1, x0:x1]
        outlines, areas = _outlines(bool(x % 2), bool(y % 2))
        both = (outlines @ window.ravel()).astype(np.int64)  # whole numbers, exact in float32
        overlaps = both / (areas + pixels - both)
        index = int(overlaps.argmax())
        if overlaps[index] > best_overlap:
            best, best_overlap = index, float(overlaps[index])
        if best_overlap >= _IOU_CEILING:
            break
    return CLASSES[best], best_overlap
