"""The reward for editing: was what was asked changed, and nothing else?"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from common.errors import AtelierError, RewardError
from common.images import open_image, refusal
from common.registry import nearest
from rewards.contract import Score
from rewards.detector import Detection, Detector, load_detector
from rewards.edit_rules import check_edit, judge_edit
from rewards.geneval_metadata import vocabulary
from rewards.plugins import reward

MEASURES = ("pixels", "ssim", "lpips", "clip", "dino")
_MARGIN = 1 / 24
"""By how much of the picture the box of a changed object is widened on every side."""
_SSIM_WINDOW = 11
"""Of Wang et al. 2004; a smaller one would be another measure."""
_ROOM = 0.5
"""Share of the picture that changed objects may take up where no region was given."""


def check_record(
    record: Mapping[str, Any],
    detector: str = "scenes",
    detector_args: Mapping[str, Any] | None = None,
) -> None:
    """Raise RewardError, naming the record, unless it has a source and describes an edit."""
    check_edit(record, *vocabulary(detector, detector_args))
    source = record["source"]
    if isinstance(source, str) and not Path(source).is_file():
        name = record.get("prompt_id") or record.get("prompt")
        raise RewardError(
            f"prompt record `{name}`: source: no file {source}. Fix: give the path of the picture "
            "to edit, in full or relative to the prompt file."
        )


@reward(name="consistency", check=check_record, paths=("source",))
def consistency(
    images: Sequence[Image.Image],
    source: Sequence[Image.Image | str],
    metadata: Sequence[Mapping[str, Any]],
    *,
    detector: str | Detector = "scenes",
    detector_args: Mapping[str, Any] | None = None,
    min_score: float = 0.3,
    measures: Sequence[str] = ("pixels", "ssim"),
    networks: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Score]:
    """Return success * kept for each edited picture, in [0, 1].

    `success` is how far the objects that changed are those that `metadata` asked to change
    (`rewards.edit_rules`), so a copy of the source scores 0. `kept` is how well the rest was left
    alone: the lowest of the `measures`, taken outside the edited region, so a destroyed
    background scores near 0. The region is `metadata["region"]` in fractions of the picture,
    or else the boxes of the changes that were asked for and made. Where these cover more than half
    of the picture, `kept` falls to 0 with what they leave: an object painted over everything keeps
    nothing. A region that is given may be the whole picture.

    `source` holds the pictures before the edit, or their paths; an edited picture of another size
    is scaled to its source's. Detections of at least `min_score` count. A source that cannot be
    opened or is too small for `ssim` (11 pixels) and a record that describes no edit score None.

    Measures, 1 for equal pictures: `pixels` (share of pixels that changed by no more than 20 of
    255), `ssim`, `lpips` (1 - distance), `clip` and `dino` (cosine of the features). The last three
    need `networks`, for example {"clip": {"model": "ViT-L-14-quickgelu", "weights": "..."},
    "dino": {"weights": "facebook/dinov2-base", "revision": "..."},
    "lpips": {"weights": "alexnet.pth"}}; see `rewards.networks.similarity`.

    Details: success, kept, outside and whole (each measure outside the region and over the whole
    picture), region (boxes in pixels), not_comparable, objects and size.
    """
    judge = load_detector(detector, detector_args) if isinstance(detector, str) else detector
    compare = _comparisons(measures, networks or {})
    pairs: dict[int, tuple[Image.Image, Image.Image]] = {}
    scores: dict[int, Score] = {}
    for index, (image, before, asked) in enumerate(zip(images, source, metadata, strict=True)):
        try:
            check_edit({"prompt": "of this picture", "metadata": asked}, None, None)
            pair = _pair(image, before)
            _refuse_small(pair[0].size, compare)
            pairs[index] = pair
        except AtelierError as error:
            scores[index] = Score(None, str(error))
    found = iter(judge.detect([picture for pair in pairs.values() for picture in pair]))
    for index, pair in pairs.items():
        asked = metadata[index]
        objects = [
            _with_colors(judge, picture, [x for x in next(found) if x.score >= min_score], asked)
            for picture in pair
        ]
        scores[index] = _score(pair, objects, asked, compare)
        scores[index].details["detector"] = judge.name
        scores[index].details["not_comparable"] = judge.not_comparable
    return [scores[index] for index in range(len(images))]


def _score(
    pair: tuple[Image.Image, Image.Image],
    objects: Sequence[Sequence[tuple[Detection, str | None]]],
    asked: Mapping[str, Any],
    compare: Mapping[str, "Compare"],
) -> Score:
    """Score one picture, given the objects before and after the edit with their colours."""
    before, after = pair
    result = judge_edit(asked, *objects)
    boxes = _region(asked, result.boxes, before.size)
    edited = _mask(boxes, before.size)
    # What lies in the region is made equal in both, so it cannot blur into what lies beside it.
    restored = Image.composite(before, after, Image.fromarray(edited))
    outside = {name: measure(before, restored, ~edited) for name, measure in compare.items()}
    everywhere = np.ones_like(edited)
    worst = min(outside, key=outside.__getitem__)
    reasons = [result.reason]
    room = 1.0
    if "region" not in asked:
        taken = float(_mask(result.boxes, before.size).mean())
        room = min(1.0, (1 - taken) / (1 - _ROOM))
        if room < 1:
            reasons.append(f"the changed objects take up {taken:.0%} of the picture")
    kept = outside[worst] * room
    reasons.append(
        "the region is the whole picture: nothing had to be kept"
        if edited.all() and "region" in asked
        else f"kept {kept:.2f} by {worst}"
    )
    details = {
        "success": result.success,
        "kept": kept,
        "outside": outside,
        "whole": {name: measure(before, after, everywhere) for name, measure in compare.items()},
        "region": [list(box) for box in boxes],
        "objects": [
            {
                "label": item.label,
                "color": color,
                "score": round(float(item.score), 4),
                "box": [round(float(edge), 2) for edge in item.box_xyxy],
            }
            for item, color in objects[1]
        ],
        "size": list(before.size),
    }
    return Score(result.success * kept, "\n".join(filter(None, reasons)), details)


Compare = Callable[[Image.Image, Image.Image, np.ndarray], float]


def _comparisons(
    measures: Sequence[str], networks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Compare]:
    """Return one function (source, edited, where to look) -> similarity for each measure."""
    if not measures:
        raise RewardError("reward `consistency`: measures is empty. Fix: name at least one.")
    for name in [*measures, *networks]:
        if name not in MEASURES:
            close = nearest(name, MEASURES)
            fix = f"Did you mean `{close}`?" if close else f"Known: {', '.join(MEASURES)}."
            raise RewardError(f"reward `consistency`: no measure is called `{name}`. {fix}")
    if set(measures) == {"pixels"}:
        return {"pixels": _equal_pixels}
    from rewards.networks import similarity

    return {
        name: _equal_pixels if name == "pixels" else similarity.load(name, networks.get(name))
        for name in measures
    }


def _equal_pixels(before: Image.Image, after: Image.Image, where: np.ndarray) -> float:
    if not where.any():
        return 1.0
    change = np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16)).max(axis=2)
    return float((change <= 20)[where].mean())


def _pair(image: Image.Image, source: Image.Image | str) -> tuple[Image.Image, Image.Image]:
    if isinstance(source, str):
        before = open_image(Path(source))
    elif problem := refusal(source):
        raise RewardError(f"the source: {problem}")
    else:
        before = ImageOps.exif_transpose(source).convert("RGB")
    after = image.convert("RGB")
    return before, after if after.size == before.size else after.resize(before.size)


def _refuse_small(size: tuple[int, int], measures: Collection[str]) -> None:
    if "ssim" in measures and min(size) < _SSIM_WINDOW:
        raise RewardError(
            f"the source is {size[0]} x {size[1]} pixels, and ssim compares windows of "
            f"{_SSIM_WINDOW} x {_SSIM_WINDOW}. Fix: leave `ssim` out of `measures`."
        )


def _with_colors(
    judge: Detector, picture: Image.Image, found: list[Detection], asked: Mapping[str, Any]
) -> list[tuple[Detection, str | None]]:
    named = any("color" in c for name in ("add", "remove") for c in asked.get(name, []))
    colors: list[str] | list[None] = (
        judge.classify_colors(picture, found) if named and found else [None] * len(found)
    )
    return list(zip(found, colors, strict=True))


def _region(
    asked: Mapping[str, Any],
    boxes: Sequence[tuple[float, float, float, float]],
    size: tuple[int, int],
) -> list[tuple[float, float, float, float]]:
    width, height = size
    if "region" in asked:
        x0, y0, x1, y1 = asked["region"]
        return [(x0 * width, y0 * height, x1 * width, y1 * height)]
    dx, dy = _MARGIN * width, _MARGIN * height
    return [(x0 - dx, y0 - dy, x1 + dx, y1 + dy) for x0, y0, x1, y1 in boxes]


def _mask(boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((size[1], size[0]), bool)
    for x0, y0, x1, y1 in boxes:
        mask[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = True
    return mask
