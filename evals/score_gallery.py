"""One HTML file that shows what rewards saw: the pictures with boxes, the text read, the reasons.

Nothing in it comes from elsewhere or runs: pictures are inside, and it has no script.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from common.atomic import write_text
from common.images import open_image
from evals.located import found_in, picture_size
from evals.pages import TEMPLATES, environment
from evals.score_images import RewardSummary, ScoredImage

_STYLES = ("report.css", "gallery.css")
MOST = 300
"""Pictures in a gallery: about 6 MB."""
THUMBNAIL = 360
_SMALL = 128


@dataclass(frozen=True)
class Box:
    """A box over a picture, in per cent of its sides, with its caption.

    `kind` is "object" or "line" (of text).
    """

    kind: str
    text: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Judgement:
    """What one reward says about a picture."""

    name: str
    value: float | None
    reason: str


@dataclass(frozen=True)
class Card:
    """A picture and everything said about it.

    `picture` is a data URI; a `small` one is shown with square pixels. A picture that was refused
    has none, and `refusal` instead.
    """

    image: str
    prompt: str
    total: float | None
    picture: str | None
    small: bool
    refusal: str | None
    boxes: list[Box]
    judgements: list[Judgement]


def write_gallery(
    rows: Sequence[ScoredImage],
    summaries: Mapping[str, RewardSummary],
    file: Path,
    *,
    title: str,
    command: str,
) -> int:
    """Write the gallery and return how many pictures it shows: unscored ones, then the lowest."""
    chosen = sorted(rows, key=_rank)[:MOST]
    style = "".join((TEMPLATES / name).read_text("utf-8") for name in _STYLES)
    page = environment(autoescape=True).get_template("gallery.html.j2")
    text = page.render(
        cards=map(_card, chosen),
        shown=len(chosen),
        count=len(rows),
        refused=sum(row.refusal is not None for row in rows),
        summaries=list(summaries.values()),
        title=title,
        command=command,
        style=style,
    )
    write_text(file, text)
    return len(chosen)


def _rank(row: ScoredImage) -> float:
    return -math.inf if row.scored.total is None else row.scored.total


def _card(row: ScoredImage) -> Card:
    scored = row.scored
    picture, small = _thumbnail(row.record["path"]) if row.refusal is None else (None, False)
    return Card(
        image=row.record["image"],
        prompt=row.record["prompt"],
        total=scored.total,
        picture=picture,
        small=small,
        refusal=row.refusal,
        boxes=[box for details in scored.details.values() for box in _boxes(details)],
        judgements=[
            Judgement(name, value, scored.reasons.get(name, ""))
            for name, value in scored.parts.items()
        ],
    )


def _boxes(details: Any) -> Iterator[Box]:
    """Yield the boxes of a reward's details (`rewards.contract.Score`): objects, and text read."""
    size = picture_size(details)
    if size is None:
        return
    width, height = size
    found = [("object", *item) for item in found_in(details)]
    found += [("line", *item) for item in found_in(details, "lines")]
    for kind, entry, box in found:
        left, right = (min(max(100 * edge / width, 0), 100) for edge in (box[0], box[2]))
        top, bottom = (min(max(100 * edge / height, 0), 100) for edge in (box[1], box[3]))
        words = [entry.get("color"), entry.get("label"), entry.get("text")]
        text = " ".join(str(word) for word in words if word)
        yield Box(kind, text, left, top, max(right - left, 0), max(bottom - top, 0))


def _thumbnail(path: Path) -> tuple[str, bool]:
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small = max(image.size) < _SMALL
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=82, lossless=small)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode(), small
