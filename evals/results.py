"""The result folder of one evaluation: its versioned schema, its summary and how it is read back.

results/NAME/
    settings.json    what identifies the evaluation (policy hash, suite, prompts, sampling)
    prompts.jsonl    the suite's prompt records
    samples.jsonl    one row for each picture, appended as pictures are made
    images/*.webp    the pictures, lossless, each with its own origin in its metadata
    thumbnails/      smaller copies of pictures wider or higher than 512 pixels, for reports
    references/      of a suite of edits the picture that each prompt is about, at a report's size
    results.json     the summary, written at the end
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from common.atomic import write_bytes
from common.errors import RunError
from common.journal import read_journal
from common.statistics import Estimate, mean_interval
from evals.diversity import prompt_diversity
from evals.suites import Metric, SampleScore, Suite, task_of

SCHEMA = "atelier.results/1"
RESULTS, SETTINGS, PROMPTS = "results.json", "settings.json", "prompts.jsonl"
SAMPLES, IMAGES, THUMBNAILS, REFERENCES = "samples.jsonl", "images", "thumbnails", "references"
THUMBNAIL = 512
"""Pictures wider or higher than this are shown in reports at this size."""

Sample = dict[str, Any]
"""A row of samples.jsonl: prompt_id, index, prompt, task, cluster, seed (None: not known), image
(its path in the folder), bytes (its size), values, reason, details, seconds {generate, score}."""


@dataclass(frozen=True)
class ResultFolder:
    """A finished evaluation: where it lies, its summary and its samples in order."""

    path: Path
    results: dict[str, Any]
    samples: list[Sample]

    @property
    def name(self) -> str:
        """The name shown in reports."""
        return str(self.results["policy"]["name"])

    @property
    def suite(self) -> str:
        """The suite's name."""
        return str(self.results["suite"]["name"])

    def records(self) -> dict[str, dict[str, Any]]:
        """Read the prompt records that were evaluated, by prompt id."""
        return read_records(self.path)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The suite's metrics, headline first."""
        return {name: Metric(**facts) for name, facts in self.results["suite"]["metrics"].items()}


def load_results(path: Path | str) -> ResultFolder:
    """Read a result folder.

    Raises RunError if it is missing, unfinished, of another schema, or its samples do not add up.
    """
    folder = Path(path)
    file = folder / RESULTS
    if not file.is_file():
        if (folder / SAMPLES).is_file():
            fix = "it was not finished, run the same `atelier eval` again to go on."
        else:
            fix = "give a folder that `atelier eval ... --out` wrote."
        raise RunError(f"{folder} has no {RESULTS}.\n    Fix: {fix}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(
            f"{file} is damaged ({error}).\n    Fix: run `atelier eval` again."
        ) from error
    if results.get("schema") != SCHEMA:
        raise RunError(
            f"{file} has schema {results.get('schema')!r}, this version reads {SCHEMA!r}.\n"
            "    Fix: evaluate again with this version."
        )
    samples = list(read_samples(folder).values())
    if len(samples) != results["images"]:
        raise RunError(
            f"{folder / SAMPLES} holds {len(samples)} samples, {RESULTS} counts "
            f"{results['images']}.\n    Fix: run the same `atelier eval` again."
        )
    return ResultFolder(folder, results, samples)


def read_samples(folder: Path) -> dict[tuple[str, int], Sample]:
    """Return the rows of samples.jsonl by (prompt_id, index); of a repeated one the last."""
    return {(row["prompt_id"], row["index"]): row for row in read_journal(folder / SAMPLES)}


def cluster_of(sample: Sample) -> str:
    """Return what is resampled as one: the fact asked for where the suite names it, or the prompt.

    Rows of older versions have none.
    """
    return str(sample.get("cluster", sample["prompt_id"]))


def webp(image: Image.Image, origin: Mapping[str, Any]) -> bytes:
    """Return the picture as lossless WebP, with where it comes from as JSON in its metadata.

    The JSON is EXIF's ImageDescription; `read_origin` gives it back.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "atelier"
    exif[ExifTags.Base.ImageDescription] = json.dumps(origin)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="WEBP", lossless=True, quality=70, method=2, exif=exif)
    return buffer.getvalue()


def thumbnail(image: Image.Image) -> bytes | None:
    """Return the picture at a report's size as WebP; None if it is no larger than that."""
    if max(image.size) <= THUMBNAIL:
        return None
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=85)
    return buffer.getvalue()


def file_name(prompt_id: str, index: int | None = None) -> str:
    """Return a readable file name that no two prompts share and that every file system takes.

    `index` is that of the sample; without one the name is the prompt's own.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "-", prompt_id).strip("-")[:60]
    digest = hashlib.blake2b(prompt_id.encode(), digest_size=4).hexdigest()
    return f"{readable}-{digest}.webp" if index is None else f"{readable}-{digest}-{index:02d}.webp"


def store_references(folder: Path, suite: Suite) -> None:
    """Keep the pictures that a suite of edits is about, those that are not there yet."""
    if suite.reference is None or suite.answers:
        return
    (folder / REFERENCES).mkdir(exist_ok=True)
    for record in suite.records:
        file = folder / REFERENCES / file_name(record["prompt_id"])
        if not file.is_file():
            picture = suite.reference(record)
            write_bytes(file, thumbnail(picture) or webp(picture, {}))


def read_origin(file: Path) -> dict[str, Any]:
    """Return what `webp` wrote into a picture's metadata; empty if it is not one of ours."""
    with Image.open(file) as image:
        exif = image.getexif()
    if exif.get(ExifTags.Base.Software) != "atelier":
        return {}
    return dict(json.loads(exif[ExifTags.Base.ImageDescription]))


def summarise(samples: Sequence[Sample], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Return per-task and overall means with 95 % intervals, unscored counts and diversity.

    Clusters are resampled as a whole (see `cluster_of`).
    `overall` is the unweighted mean over tasks (GenEval's convention). A metric that no sample of
    a task has is null there, and null overall.
    """
    tasks = list(dict.fromkeys(sample["task"] for sample in samples))
    of_task = {task: [s for s in samples if s["task"] == task] for task in tasks}
    diversity = diversity_by_prompt(samples)
    first = {sample["prompt_id"]: sample for sample in samples}
    return {
        "tasks": {
            task: {
                "prompts": len({s["prompt_id"] for s in rows}),
                "images": len(rows),
                "metrics": {name: _summary(rows, name, metrics[name]) for name in metrics},
                "unscored": {name: count_unscored(rows, name) for name in metrics},
            }
            for task, rows in of_task.items()
        },
        "overall": {name: _over_tasks(samples, of_task, name, metrics[name]) for name in metrics},
        "unscored": {name: count_unscored(samples, name) for name in metrics},
        "layout_diversity": estimate_dict(
            mean_interval(
                list(diversity.values()),
                [cluster_of(first[prompt]) for prompt in diversity],
                [first[prompt]["task"] for prompt in diversity],
            )
        )
        if diversity
        else None,
    }


def held_out_row(suite: Suite, scores: Sequence[SampleScore]) -> dict[str, Any]:
    """Return the row of a training curve: one score for each of the suite's records, in order.

    By the rule of `summarise`: a metric is the mean over tasks, None if a task has no score.
    `standard_error` and `per_task` are the headline's.
    """
    samples = [
        {
            "prompt_id": record["prompt_id"],
            "cluster": record.get("cluster", record["prompt_id"]),
            "task": task_of(record),
            "values": score.values,
        }
        for record, score in zip(suite.records, scores, strict=True)
    ]
    tasks = list(dict.fromkeys(sample["task"] for sample in samples))
    of_task = {task: [s for s in samples if s["task"] == task] for task in tasks}
    found = {
        name: _over_tasks(samples, of_task, name, metric) for name, metric in suite.metrics.items()
    }
    means = {name: estimate["mean"] if estimate else None for name, estimate in found.items()}
    headline = found[suite.headline]
    per_task = {
        task: _summary(rows, suite.headline, suite.metrics[suite.headline])
        for task, rows in of_task.items()
    }
    return {
        **means,
        "standard_error": headline["standard_error"] if headline else None,
        "per_task": {task: entry["mean"] for task, entry in per_task.items() if entry},
    }


def diversity_by_prompt(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the layout diversity of each prompt that has one (see `evals.diversity`)."""
    pictures: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        pictures.setdefault(sample["prompt_id"], []).append(sample["details"])
    found = {prompt: prompt_diversity(details) for prompt, details in pictures.items()}
    return {prompt: value for prompt, value in found.items() if value is not None}


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the prompt records of a result folder by prompt id."""
    return {record["prompt_id"]: record for record in read_journal(folder / PROMPTS)}


def finished_samples(folder: Path) -> dict[tuple[str, int], Sample]:
    """Return the samples whose row and whole picture are both on disk."""
    return {
        key: row
        for key, row in read_samples(folder).items()
        if (image := folder / row["image"]).is_file() and image.stat().st_size == row["bytes"]
    }


def unscored(sample: Sample, suite: Suite) -> bool:
    """Return whether a sample has no value for the suite's headline."""
    return sample["values"].get(suite.headline) is None


def append_samples(folder: Path, rows: Sequence[Sample]) -> None:
    """Add a batch's rows with one flush to the disk: one a row would take longer than painting."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with (folder / SAMPLES).open("ab") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def differences_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each key whose values differ; of dictionaries, for each key inside."""
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences_of(old, new)
        elif old != new:
            found.append(f"{key} is {old!r} there and {new!r} now")
    return found


def count_unscored(samples: Sequence[Sample], metric: str) -> int:
    """Return how many samples have no value for the metric."""
    return sum(sample["values"].get(metric) is None for sample in samples)


def estimate_dict(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as plain JSON values, rounded to six places."""
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in asdict(estimate).items()
    }


def _over_tasks(
    samples: Sequence[Sample], of_task: Mapping[str, Sequence[Sample]], name: str, metric: Metric
) -> dict[str, Any] | None:
    """Summarise the mean over tasks; None if one of them has no score."""
    if any(count_unscored(rows, name) == len(rows) for rows in of_task.values()):
        return None
    return _summary(samples, name, metric, by_task=True)


def _summary(
    samples: Sequence[Sample], name: str, metric: Metric, *, by_task: bool = False
) -> dict[str, Any] | None:
    scored = [s for s in samples if s["values"].get(name) is not None]
    if not scored:
        return None
    return estimate_dict(
        mean_interval(
            [s["values"][name] for s in scored],
            [cluster_of(s) for s in scored],
            [s["task"] for s in scored] if by_task else None,
            amounts=metric.kind == "amount",
        )
    )
