"""To the official GenEval script and back: its folder layout out, its verdicts in.

Layout (djghosh13/geneval, `evaluation/evaluate_images.py`): DIR/00000/metadata.jsonl with one JSON
object, DIR/00000/samples/0000.png and so on. Its output has one JSON object a line with filename,
tag, prompt, correct, reason, and metadata and details as JSON texts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.atomic import atomic_dir, write_text
from common.errors import DataError, RunError
from common.journal import read_journal
from evals.results import (
    IMAGES,
    PROMPTS,
    SETTINGS,
    ResultFolder,
    Sample,
    append_samples,
    file_name,
    read_origin,
    webp,
)
from evals.run import write_results
from evals.suites import Metric
from evals.suites.geneval import SHA256, asked_for

_ORIGIN = "atelier"
"""Text field of an exported PNG: where the picture comes from, so that it finds its way back."""
_JUDGE = "evaluate_images.py"
_ELSEWHERE = "judged elsewhere: comparable only if the official script ran as published"
_OTHERS = "these are not the prompts of GenEval"


def export_geneval(results: ResultFolder, out: Path) -> int:
    """Write the pictures of an evaluation as the official script reads them; return their number.

    Folders are numbered in the order of the suite's prompts. Raises RunError if `out` is not empty
    or the prompts are not in GenEval's format.
    """
    records = read_journal(results.path / PROMPTS)
    if not records or not all("include" in record["metadata"] for record in records):
        raise RunError(
            f"{results.path}: its prompts are not in GenEval's format.\n"
            "    Fix: export an evaluation of `geneval` or `geneval-scenes`."
        )
    _refuse_used(out)
    numbers = {record["prompt_id"]: f"{number:05d}" for number, record in enumerate(records)}
    with atomic_dir(out, replace=True) as staged:
        for record in records:
            folder = staged / numbers[record["prompt_id"]]
            (folder / "samples").mkdir(parents=True)
            metadata = {**record["metadata"], "prompt": record["prompt"]}
            (folder / "metadata.jsonl").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
        for sample in results.samples:
            source = results.path / sample["image"]
            info = PngInfo()
            info.add_itxt(_ORIGIN, json.dumps(read_origin(source)))
            samples = staged / numbers[sample["prompt_id"]] / "samples"
            with Image.open(source) as image:
                image.save(samples / f"{sample['index']:04d}.png", pnginfo=info)
    return len(results.samples)


def import_geneval(file: Path, out: Path, *, images: Path | None = None) -> dict[str, Any]:
    """Turn the official script's output into a result folder and return its results.json.

    `images` is the folder with 00000, 00001, ...; by default pictures are looked for where the file
    says. Pictures that we exported bring their prompt id, seed, policy hash and suite along; of
    others the seed and the policy are not known, and the suite is GenEval only if the prompts are
    the official ones. Raises DataError naming file and line for a row that is not
    the script's, and for a picture that is missing.
    """
    _refuse_used(out)
    if not file.is_file():
        raise DataError(f"{file}: no such file.\n    Fix: give the output of evaluate_images.py.")
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [_row(file, number, line) for number, line in enumerate(lines, start=1)]
    if not rows:
        raise DataError(f"{file} has no rows.\n    Fix: give the output of evaluate_images.py.")
    rows.sort(key=lambda row: (row["prompt_id"], row["index"]))  # the script's order is the disk's
    with atomic_dir(out, replace=True) as staged:
        return _write(file, rows, images, staged, out.name)


def _write(
    file: Path, rows: Sequence[Mapping[str, Any]], images: Path | None, out: Path, name: str
) -> dict[str, Any]:
    (out / IMAGES).mkdir()
    samples: list[Sample] = []
    origins: list[Mapping[str, Any]] = []
    records: dict[str, dict[str, Any]] = {}
    for row in rows:
        sample, origin = _sample(file, row, images, out)
        samples.append(sample)
        origins.append(origin)
        records[sample["prompt_id"]] = {
            **{key: sample[key] for key in ("prompt", "prompt_id", "cluster")},
            "metadata": row["metadata"],
        }
    write_text(out / SETTINGS, json.dumps({"imported": str(file)}, indent=2) + "\n")
    write_text(out / PROMPTS, "".join(json.dumps(r) + "\n" for r in records.values()))
    append_samples(out, samples)
    hashes = {str(origin.get("policy_hash", "unknown")) for origin in origins}
    facts = {
        "policy": {"name": name, "hash": hashes.pop() if len(hashes) == 1 else "mixed"},
        "suite": suite_judged_by_the_script(
            origins, [record["metadata"] for record in records.values()]
        ),
        "settings": {},
        "command": None,
    }
    return write_results(out, samples, facts)


def suite_judged_by_the_script(
    origins: Sequence[Mapping[str, Any]], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Name the suite that the pictures were made for, or tell by the prompts whether it is GenEval.

    The judge is part of its settings, so that these scores are never paired with our own.
    """
    made_for = {(str(o.get("suite", "")), int(o.get("suite_version", 1))) for o in origins}
    text = "".join(json.dumps(entry) + "\n" for entry in metadata)
    official = hashlib.sha256(text.encode()).hexdigest() == SHA256
    name, version = ("geneval", 1) if official else ("geneval-format", 1)
    if len(made_for) == 1 and "" not in (known := next(iter(made_for))):
        name, version = known
    title = "GenEval" if name == "geneval" else f"{name}, judged by GenEval's own script"
    return {
        "name": name,
        "title": title,
        "version": version,
        "not_comparable": _ELSEWHERE if name == "geneval" else _OTHERS,
        "settings": {"judge": _JUDGE},
        "metrics": {"strict": asdict(Metric("GenEval accuracy (strict)"))},
    }


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        path = Path(row["filename"])
        if not (path.stem.isdigit() and path.parent.parent.name.isdigit()):
            raise ValueError(f"filename is {row['filename']!r}, not .../00000/samples/0000.png")
        return {
            "path": path,
            "prompt_id": path.parent.parent.name,
            "index": int(path.stem),
            "prompt": str(row["prompt"]),
            "task": str(row["tag"]),
            "correct": float(row["correct"]),
            "reason": str(row["reason"] or ""),
            "metadata": json.loads(row["metadata"]),
            "boxes": json.loads(row.get("details") or "{}"),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}:{number}: not a row of GenEval's evaluate_images.py ({error}).\n"
            "    Fix: give that script's output file."
        ) from error


def _sample(
    file: Path, row: Mapping[str, Any], images: Path | None, out: Path
) -> tuple[Sample, dict[str, Any]]:
    path: Path = row["path"]
    if images is not None:
        path = images / path.parent.parent.name / path.parent.name / path.name
    if not path.is_file():
        raise DataError(
            f"{file} names the picture {path}, which is not there.\n"
            "    Fix: say with --images where the folder with 00000, 00001, ... lies."
        )
    with Image.open(path) as image:
        image.load()
        origin = json.loads(image.info.get(_ORIGIN, "{}"))
        size = list(image.size)
        prompt_id = origin.get("prompt_id", row["prompt_id"])
        index = origin.get("index", row["index"])
        target = f"{IMAGES}/{file_name(prompt_id, index)}"
        (out / target).write_bytes(webp(image, origin))
    sample = {
        "prompt_id": prompt_id,
        "index": index,
        "prompt": row["prompt"],
        "task": row["task"],
        "cluster": asked_for(row["metadata"]),
        "seed": origin.get("seed"),
        "image": target,
        "bytes": (out / target).stat().st_size,
        "values": {"strict": row["correct"]},
        "reason": row["reason"] or "every clause holds",
        "details": {"objects": _objects(row["boxes"]), "size": size},
        "seconds": {"generate": 0.0, "score": 0.0},
    }
    return sample, origin


def _objects(boxes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The script's details: class -> boxes [left, top, right, bottom(, score)]."""
    return [
        {"label": label, "color": None, "score": (box[4:] or [None])[0], "box": box[:4]}
        for label, found in boxes.items()
        for box in found
    ]


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty.\n    Fix: give a new or an empty folder.")
