"""ImgEdit-Bench, the basic part: single edits of nine types, judged from 1 to 5.

Source: Ye et al. (2025); PKU-YuanGroup/ImgEdit, Benchmark/Basic (basic_bench.py, the two steps of
scoring). That script averages however many marks an answer has; here three are needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError
from common.pictures import read_picture
from evals.suites.files import digest, read_json
from evals.suites.judged import (
    WORKERS,
    ask,
    judge_of,
    not_comparable,
    task_means,
)
from evals.suites.rewarded import mean, recorded
from evals.suites.suite import Metric, Record, SampleScore, Suite, task_of

PROMPTS = 737
JUDGES = ("gpt-4o", "gpt-4.1")
MARKS = 3
"""Marks from 1 to 5 in one answer."""


def imgedit(edits: str, images: str, questions: str, **judge: str) -> Suite:
    """Build the suite from the benchmark's own files, which the user supplies.

    `edits` is basic_edit.json, `images` the folder of original pictures and `questions` the JSON of
    a question for each type of edit. Further options are the judge's: base_url, model and others of
    `rewards.judge_client.Judge`. An edit's score is the mean of the judge's three marks, the
    overall score the mean over types.
    """
    asked = judge_of(judge)
    texts = read_json(Path(questions))
    records = _records(Path(edits), texts, Path(questions))

    def reference(record: Record) -> Image.Image:
        return read_picture(Path(images) / record["metadata"]["picture"])

    def score(image: Image.Image, record: Record) -> SampleScore:
        text = texts[task_of(record)].replace("<edit_prompt>", record["prompt"])
        answers, why = ask(asked, [(text, [reference(record), image])], parse_marks)
        if not answers:
            return SampleScore({"score": None}, why)
        marks = answers[0]["marks"]
        return SampleScore(
            {"score": round(mean(list(marks.values())), 2)},
            "; ".join(f"{name} {mark}" for name, mark in marks.items()),
            {"marks": marks},
        )

    return Suite(
        name="imgedit",
        title="ImgEdit-Bench, basic",
        version=1,
        records=records,
        score=score,
        metrics={"score": Metric("ImgEdit score, 1 to 5", "amount")},
        not_comparable=not_comparable(asked, JUDGES, len(records), PROMPTS, own_words=False),
        settings={
            "files_sha256": digest([Path(edits), Path(questions)]),
            **recorded(judge, "judge"),
        },
        pictures=1,
        workers=WORKERS,
        reference=reference,
        published=_published,
    )


def parse_marks(text: str) -> dict[str, Any] | None:
    """Return {"marks": {name: 1 to 5}} of an answer with three lines "Name: mark"; None without."""
    marks = {}
    for line in text.splitlines():
        name, colon, mark = line.strip().strip("*").rpartition(": ")
        if colon and mark.isdigit():
            marks[name.strip("* ")] = int(mark)
    usable = len(marks) == MARKS and all(1 <= mark <= 5 for mark in marks.values())
    return {"marks": marks} if usable else None


def _records(file: Path, texts: Any, questions: Path) -> tuple[Record, ...]:
    rows = read_json(file)
    records = []
    for name, row in rows.items() if isinstance(rows, dict) else ():
        try:
            kind, prompt, picture = row["edit_type"], row["prompt"], row["id"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{file}: entry {name} lacks {error}.\n    Fix: get basic_edit.json again."
            ) from error
        if kind not in texts:
            raise DataError(
                f"{questions} has no question for edits of type {kind!r}.\n"
                "    Fix: give the prompts_json of the benchmark."
            )
        records.append(
            {
                "prompt": prompt,
                "prompt_id": str(name),
                "metadata": {"tag": kind, "picture": picture},
            }
        )
    if not records:
        raise DataError(f"{file} has no edits.\n    Fix: give the benchmark's basic_edit.json.")
    return tuple(records)


def _published(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the types' means, rounded as the official script does, and their mean."""
    types = {kind: round(value, 2) for kind, value in task_means(samples, "score").items()}
    return {"overall": mean(list(types.values())), **types}
