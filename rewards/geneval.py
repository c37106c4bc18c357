"""The GenEval reward: does the picture show the objects, numbers, colours and places asked for?

The rules are in `rewards.geneval_rules` (`evaluate_detections`), the check of prompt records is
in `rewards.geneval_metadata` (`check_metadata`); both are offered here too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image, ImageOps

from common.errors import RewardError
from rewards.contract import Score
from rewards.detector import Detection, Detector, load_detector
from rewards.geneval_metadata import check_clauses, check_metadata
from rewards.geneval_rules import (
    GenEvalResult,
    evaluate_detections,
    evaluate_like_flow_grpo,
    extra_objects,
    keep_detections,
)
from rewards.plugins import reward

__all__ = [
    "GenEvalResult",
    "check_metadata",
    "evaluate_detections",
    "evaluate_like_flow_grpo",
    "extra_objects",
    "geneval",
    "keep_detections",
]


@reward(name="geneval", check=check_metadata)
def geneval(
    images: Sequence[Image.Image],
    metadata: Sequence[Mapping[str, Any]],
    *,
    detector: str | Detector = "scenes",
    detector_args: Mapping[str, Any] | None = None,
    strict_weight: float = 0.5,
    soft_weight: float = 0.5,
    extra_penalty: float = 0.15,
    max_extra: int = 3,
    compat: Literal["flow_grpo"] | None = None,
) -> list[Score]:
    """Return strict_weight * strict + soft_weight * soft - extra_penalty * min(extra, max_extra).

    `strict` is 1 or 0 by the official rules, `soft` the graded score, `extra` the number of objects
    beyond those asked for: without its price, spraying objects pays. `detector` is a registered
    name, made with `detector_args`, or a `Detector`.

    strict_weight=1, soft_weight=0, extra_penalty=0 give GenEval's own score; strict_weight=0,
    soft_weight=1, extra_penalty=0, compat="flow_grpo" the one that the flow_grpo reward server
    trains on. With `compat` the `mask2former` detector is shown red and blue exchanged, as that
    server does by mistake.

    Details: strict, soft, extra, detector, not_comparable (why the score must not stand beside a
    published one, or None), objects and size. An object's colour is None unless the rules asked.
    A record that the rules cannot be applied to scores None.
    """
    if compat not in (None, "flow_grpo"):
        raise RewardError(
            f"reward `geneval`: compat is `{compat}`. Fix: write `flow_grpo` or leave it out."
        )
    judge = load_detector(detector, detector_args) if isinstance(detector, str) else detector
    evaluate = evaluate_detections if compat is None else evaluate_like_flow_grpo
    caveats = [judge.not_comparable] if judge.not_comparable else []
    if compat is not None:
        caveats.append("the rules are those of flow_grpo's reward server, not GenEval's")
    elif strict_weight != 1 or soft_weight != 0 or extra_penalty * max_extra != 0:
        caveats.append("the score is a mixture, GenEval's is the strict verdict alone")
    upright = [ImageOps.exif_transpose(image) for image in images]
    quirk = compat is not None and judge.name == "mask2former"
    detections = judge.detect([_exchanged(x) for x in upright] if quirk else upright)
    scores = []
    for image, asked, found in zip(upright, metadata, detections, strict=True):
        try:
            check_clauses(asked, "this prompt")
        except RewardError as error:
            scores.append(Score(None, str(error)))
            continue
        names = _ColorNotes(judge, image)
        result = evaluate(asked, found, names)
        extra = extra_objects(asked, found)
        value = strict_weight * result.correct + soft_weight * result.soft
        value -= extra_penalty * min(extra, max_extra)
        details = {
            "strict": float(result.correct),
            "soft": result.soft,
            "extra": extra,
            "detector": judge.name,
            "not_comparable": "; ".join(caveats) or None,
            "objects": _described(asked, found, names),
            "size": list(image.size),
        }
        scores.append(Score(value, result.reason, details))
    return scores


class _ColorNotes:
    """Classifies colours for the rules and remembers them for the report."""

    def __init__(self, detector: Detector, image: Image.Image) -> None:
        self._detector = detector
        self._image = image
        self.known: dict[int, str] = {}

    def __call__(self, detections: Sequence[Detection]) -> list[str]:
        colors = self._detector.classify_colors(self._image, detections)
        self.known.update(zip(map(id, detections), colors, strict=True))
        return colors


def _exchanged(image: Image.Image) -> Image.Image:
    red, green, blue = image.convert("RGB").split()
    return Image.merge("RGB", (blue, green, red))


def _described(
    asked: Mapping[str, Any], found: Sequence[Detection], names: _ColorNotes
) -> list[dict[str, Any]]:
    kept = keep_detections(asked, found)
    return [
        {
            "label": label,
            "color": names.known.get(id(item)),
            "score": round(float(item.score), 4),
            "box": [round(float(edge), 2) for edge in item.box_xyxy],
        }
        for label, items in kept.items()
        for item in items
    ]
