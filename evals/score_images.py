"""Score pictures that exist already: rows to a JSONL file, numbers to a summary, a gallery."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from common.errors import DataError
from common.images import open_image
from common.progress import Progress
from rewards.runner import RewardRunner, Scored

_BATCH = 64
_OWN_KEYS = ("path", "image", "prompt")


@dataclass
class RewardSummary:
    """The scores of one reward over all pictures."""

    name: str
    values: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    notes: set[str] = field(default_factory=set)
    """Why the scores may not stand beside published ones."""
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of the scored pictures, NaN without any."""
        return fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the scored pictures, NaN without any."""
        return pstdev(self.values) if self.values else math.nan


@dataclass(frozen=True)
class ScoredImage:
    """A row of the JSONL file that the gallery can show; `refusal` says why it was not opened."""

    record: Mapping[str, Any]
    scored: Scored
    refusal: str | None


def score_images(
    records: Sequence[Mapping[str, Any]], runner: RewardRunner, file: Path, progress: Progress
) -> tuple[list[ScoredImage], dict[str, RewardSummary]]:
    """Score the pictures of `data.image_records`, write a row each to `file`, return the same.

    A picture that cannot be opened has no score and the reason. Raises RewardError, before
    anything is scored, for a record that a reward cannot score.
    """
    runner.check_records(records)
    keys = dict.fromkeys(key for record in records for key in record if key not in _OWN_KEYS)
    summaries = {name: RewardSummary(name) for name in runner.names}
    rows: list[ScoredImage] = []
    progress.start("score", len(records))
    with open(file, "w", encoding="utf-8") as stream:
        for start in range(0, len(records), _BATCH):
            batch = records[start : start + _BATCH]
            images = [_opened(record["path"]) for record in batch]
            columns = {key: [record.get(key) for record in batch] for key in keys}
            scored = runner.score(images, [record["prompt"] for record in batch], columns)
            for record, image, one in zip(batch, images, scored, strict=True):
                stream.write(json.dumps(_row(record, one), ensure_ascii=False, default=str) + "\n")
                refusal = str(image) if isinstance(image, DataError) else None
                rows.append(ScoredImage(record, one, refusal))
                if refusal is None:
                    _add(summaries, one)
            for name, seconds in runner.seconds.items():
                summaries[name].seconds += seconds
            progress.advance("score", len(batch))
    progress.finish("score")
    return rows, summaries


def _opened(path: Path) -> Any:
    """Return the picture, or what is wrong with it, which is then the reason of its row."""
    try:
        return open_image(path)
    except DataError as error:
        return error


def _row(record: Mapping[str, Any], scored: Scored) -> dict[str, Any]:
    return {
        "image": record["image"],
        "prompt_id": record["prompt_id"],
        "prompt": record["prompt"],
        "total": scored.total,
        "scores": scored.parts,
        "reasons": scored.reasons,
        "details": scored.details,
    }


def _add(summaries: Mapping[str, RewardSummary], scored: Scored) -> None:
    for name, value in scored.parts.items():
        summary = summaries[name]
        if value is None:
            summary.failures[scored.reasons[name]] += 1
        else:
            summary.values.append(value)
        note = scored.details.get(name, {}).get("not_comparable")
        if note:
            summary.notes.add(str(note))
