"""GEdit-Bench: edits in eleven groups, in English and Chinese, judged by VIEScore's formula.

Sources: Liu et al. (2025) and stepfun-ai/Step1X-Edit, GEdit-Bench/generate_image_example.py (the
columns); the size at which pictures are judged: EvolvingLMMs-Lab/lmms-eval, tasks/gedit_bench; Ku
et al., VIEScore (2024).
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from common.errors import DataError, UsageError
from common.images import open_image
from evals.suites.files import digest, read_parquet
from evals.suites.judged import (
    WORKERS,
    ask,
    judge_of,
    not_comparable,
    numbers,
    task_means,
)
from evals.suites.rewarded import mean, recorded
from evals.suites.suite import Metric, Record, SampleScore, Suite

Language = Literal["en", "cn"]
PROMPTS = 606
"""Items of one language."""
JUDGES = ("gpt-4.1", "Qwen2.5-VL-72B-Instruct")
JUDGED_PIXELS = 512 * 512
"""Pixels of both pictures as the judge sees them."""
_COLUMNS = (
    "key", "task_type", "instruction", "instruction_language", "input_image_raw",
    "Intersection_exist",
)  # fmt: skip
SEMANTIC = """\
The second picture was made from the first by this instruction: {instruction}

Give two marks from 0 to 10. The first: how fully the instruction was carried out (0: not at all, \
10: in every respect). The second: how well everything that the instruction does not speak of was \
left as it was (0: another picture altogether, 10: nothing else changed). Answer with a JSON \
object: {{"score": [first mark, second mark], "reason": one sentence}}.\
"""
QUALITY = """\
This picture was made by a machine. Give two marks from 0 to 10. The first: how natural it looks \
(0: light, shadow or distance are impossible, 10: nothing is odd). The second: how free of faults \
it is, such as distortions, smears, seams, broken faces or limbs (0: full of them, 10: none). \
Answer with a JSON object: {"score": [first mark, second mark], "reason": one sentence}.\
"""


def gedit(data: str, language: str = "en", **judge: str) -> Suite:
    """Build the suite from the folder with the dataset's parquet files, which the user supplies.

    `language` is en or cn. Further options are the judge's: base_url, model and others of
    `rewards.judge_client.Judge`. Headline `overall`: sqrt(semantic * quality), each the lower of
    two marks from 0 to 10; groups count alike.
    """
    if language not in get_args(Language):
        raise UsageError(f"language is {language!r}.\n    Fix: write language=en or language=cn.")
    asked = judge_of(judge)
    files = sorted(Path(data).glob("*.parquet"))
    if not files:
        raise DataError(f"{data} holds no .parquet file.\n    Fix: give the dataset's data folder.")
    rows = [r for r in read_parquet(files, _COLUMNS) if r["instruction_language"] == language]
    pictures = {_name(n, row): row["input_image_raw"]["bytes"] for n, row in enumerate(rows)}
    records = tuple(_record(number, row) for number, row in enumerate(rows))
    if not records:
        raise DataError(f"{data} has no items in {language}.\n    Fix: give the whole dataset.")

    def reference(record: Record) -> Image.Image:
        name = record["prompt_id"]
        return open_image(pictures[name], f"{data}: picture {name}")

    def score(image: Image.Image, record: Record) -> SampleScore:
        source = reference(record)
        size = _judged_size(source.size)
        before, after = (x.resize(size, Image.Resampling.LANCZOS) for x in (source, image))
        semantic = SEMANTIC.format(instruction=record["prompt"])
        return viescore(*ask(asked, [(semantic, [before, after]), (QUALITY, [after])]))

    return Suite(
        name=f"gedit-{language}",
        title=f"GEdit-Bench ({language})",
        version=2,
        records=records,
        score=score,
        metrics={
            "overall": Metric("VIEScore, 0 to 10", "amount"),
            "semantic": Metric("Instruction carried out", "amount"),
            "quality": Metric("Picture quality", "amount"),
        },
        not_comparable=not_comparable(asked, JUDGES, len(records), PROMPTS, own_words=True),
        settings={"files_sha256": digest(files), "language": language, **recorded(judge, "judge")},
        pictures=1,
        workers=WORKERS,
        reference=reference,
        published=_published(frozenset(r["prompt_id"] for r in records if r["intersection"])),
    )


def viescore(answers: Sequence[Mapping[str, Any]], why: str) -> SampleScore:
    """Score an edit from the answers to both questions; without both it has no score."""
    nothing = dict.fromkeys(("overall", "semantic", "quality"))
    if not answers:
        return SampleScore(nothing, why)
    marks = [numbers(answer, "score", 2, 10) for answer in answers]
    first, second = marks
    if first is None or second is None:
        return SampleScore(nothing, f"no two marks from 0 to 10 in {list(answers)}")
    semantic, quality = min(first), min(second)
    values = {"overall": sqrt(semantic * quality), "semantic": semantic, "quality": quality}
    reason = "\n".join(str(answer.get("reason", "")) for answer in answers)
    return SampleScore(dict(values), reason, {"semantic": first, "quality": second})


def _judged_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size with `JUDGED_PIXELS` pixels in the shape of `size`."""
    factor = sqrt(JUDGED_PIXELS / (size[0] * size[1]))
    return max(1, int(factor * size[0])), max(1, int(factor * size[1]))


def _name(number: int, row: Mapping[str, Any]) -> str:
    return f"{number:04d}-{row['key']}"


def _record(number: int, row: Mapping[str, Any]) -> Record:
    return {
        "prompt": row["instruction"],
        "prompt_id": _name(number, row),
        "metadata": {"tag": row["task_type"]},
        "intersection": bool(row["Intersection_exist"]),
    }


def _published(intersection: frozenset[str]) -> Any:
    """Means within groups and then over groups, of all items and of the intersection subset."""

    def told(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        shared = [sample for sample in samples if sample["prompt_id"] in intersection]
        sets = {"": samples, ", intersection": shared}
        names = {"G_SC": "semantic", "G_PQ": "quality", "G_O": "overall"}
        return {
            f"{name}{which}": mean(list(task_means(rows, metric).values()))
            for which, rows in sets.items()
            if rows
            for name, metric in names.items()
        }

    return told
