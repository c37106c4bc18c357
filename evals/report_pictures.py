"""The pictures of a report and the compact data that its gallery is drawn from."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import RunError
from evals.located import found_in, picture_size
from evals.results import REFERENCES, THUMBNAILS, ResultFolder, Sample, file_name, thumbnail
from evals.suites import in_turn


class _Table:
    """Strings by number, so that a reason said a thousand times is stored once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def gallery(results: Sequence[ResultFolder], group: int, out: Path) -> dict[str, Any]:
    """Copy the pictures of a suite's results to `out`/images and return the gallery's data.

    Only pictures that every result has are shown, the tasks taking turns. Seed `i` of prompt number
    `p` in result `r` lies at images/`group`-`r`/`p`-`i`.webp. The data holds `names`, `tasks`,
    `strings` and, for each prompt, its text, task number and for each seed one cell a result:
    [value, reason, size, boxes].
    Boxes are [label, left, top, right, bottom] in pixels; texts are numbers into `strings`. `kind`
    and `better` are those of the headline's `Metric`: an amount is neither right nor wrong. With
    `references` the picture that prompt `p` edits lies at images/`group`-reference/`p`.webp.
    """
    by_key = [{(s["prompt_id"], s["index"]): s for s in result.samples} for result in results]
    rows: dict[str, list[list[Sample]]] = {}
    for key in by_key[0]:
        if all(key in samples for samples in by_key):
            rows.setdefault(key[0], []).append([samples[key] for samples in by_key])
    shown = in_turn(rows.items(), lambda row: str(row[1][0][0]["task"]))
    for column in range(len(results)):
        (out / "images" / f"{group}-{column}").mkdir(parents=True)
    headline = next(iter(results[0].metrics))
    strings, tasks = _Table(), _Table()
    prompts = []
    references = [results[0].path / REFERENCES / file_name(prompt) for prompt, _ in shown]
    edits = bool(references) and all(file.is_file() for file in references)
    if edits:
        (out / "images" / f"{group}-reference").mkdir()
    for number, (_, seeds) in enumerate(shown):
        if edits:
            copy = out / "images" / f"{group}-reference" / f"{number}.webp"
            shutil.copyfile(references[number], copy)
        for i, cells in enumerate(seeds):
            for column, (result, sample) in enumerate(zip(results, cells, strict=True)):
                target = out / "images" / f"{group}-{column}" / f"{number}-{i}.webp"
                _store(result, sample, target)
        first = seeds[0][0]
        prompts.append(
            {
                "prompt": first["prompt"],
                "task": tasks.number(first["task"]),
                "seeds": [[_cell(sample, headline, strings) for sample in row] for row in seeds],
            }
        )
    return {
        "group": group,
        "names": [result.name for result in results],
        "tasks": list(tasks.numbers),
        "strings": list(strings.numbers),
        "better": results[0].metrics[headline].better,
        "kind": results[0].metrics[headline].kind,
        "references": edits,
        "prompts": prompts,
    }


def _cell(sample: Sample, headline: str, strings: _Table) -> list[Any]:
    details = sample["details"]
    boxes = [
        [
            strings.number(" ".join(str(x) for x in (item.get("color"), item.get("label")) if x)),
            *(round(edge, 1) for edge in box),
        ]
        for item, box in found_in(details)
    ]
    value = sample["values"][headline]
    return [
        None if value is None else round(value, 4),
        strings.number(sample["reason"]),
        picture_size(details),
        boxes,
    ]


def _store(result: ResultFolder, sample: Sample, target: Path) -> None:
    """Copy a picture, a large one at the size of a report, which the evaluation left beside it."""
    source = result.path / sample["image"]
    if not source.is_file():
        raise RunError(
            f"the picture {source} is gone.\n    Fix: run the same `atelier eval` again."
        )
    made = result.path / THUMBNAILS / source.name
    if made.is_file() and made.stat().st_mtime >= source.stat().st_mtime:
        shutil.copyfile(made, target)
        return
    with Image.open(source) as image:
        small = thumbnail(image)
    if small is None:
        shutil.copyfile(source, target)
    else:
        target.write_bytes(small)
