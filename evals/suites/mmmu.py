"""MMMU: college questions of thirty subjects. Source: Yue et al. (2024), MMMU-Benchmark/MMMU."""

import ast
import re
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError
from common.images import open_image
from common.seeds import counter_seed
from evals.suites.files import NO_CHECKSUM, digest, read_parquet
from evals.suites.questions import (
    LETTERS,
    OWN_WORDS,
    SHORT,
    mmmu_open,
    overall_and_tasks,
    parse_choice,
    with_choices,
)
from evals.suites.suite import Metric, Record, SampleScore, Suite

QUESTIONS = 900
"""Of the validation split."""
_COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1", "image_2")


def mmmu(data: str) -> Suite:
    """Build the suite from the folder with the validation split's parquet files (of any depth).

    Headline `accuracy`. As in the official script, an answer that names no choice counts as a
    choice drawn at random, here by a seed of the question's own. Questions with several pictures
    are left out: a policy is shown one.
    """
    files = sorted(Path(data).rglob("validation*.parquet"))
    if not files:
        raise DataError(f"{data} holds no validation*.parquet.\n    Fix: give MMMU's folder.")
    rows = read_parquet(files, _COLUMNS)
    single = [row for row in rows if row["image_1"] and not row["image_2"]]
    pictures = {row["id"]: row["image_1"]["bytes"] for row in single}
    records = tuple(map(_record, single))
    reasons = [f"{len(records)} questions instead of {QUESTIONS}", OWN_WORDS, NO_CHECKSUM]

    def reference(record: Record) -> Image.Image:
        return open_image(pictures[record["prompt_id"]], f"{data}: {record['prompt_id']}")

    return Suite(
        name="mmmu",
        title="MMMU, validation, one picture",
        version=1,
        records=records,
        score=_score,
        metrics={"accuracy": Metric("Accuracy")},
        not_comparable="; ".join(reasons),
        settings={"data_sha256": digest(files)},
        pictures=1,
        reference=reference,
        answers=True,
        published=lambda samples: overall_and_tasks(samples, "accuracy"),
    )


def _record(row: dict[str, Any]) -> Record:
    options = _list(row["options"])
    question = re.sub(r"<image \d+>", "the picture", row["question"])
    choosing = row["question_type"] == "multiple-choice"
    return {
        "prompt": row["question"],
        "prompt_id": row["id"],
        "questions": [with_choices(question, options) if choosing else f"{question}\n{SHORT}"],
        "metadata": {
            "tag": re.sub(r"^\w+?_|_\d+$", "", row["id"]),  # validation_Art_Theory_3: Art_Theory
            "choices": options if choosing else [],
            "answer": row["answer"],
        },
    }


def _list(text: str) -> list[str]:
    """Return the list of texts that a cell holds; a cell with one text is a list of it."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text]
    return [str(item) for item in found] if isinstance(found, list) else [text]


def _score(answers: list[str], record: Record) -> SampleScore:
    facts = record["metadata"]
    if not facts["choices"]:
        right = mmmu_open(answers[0], _list(facts["answer"]))
        reason = f"answered {answers[0]!r}; right is {facts['answer']}"
    else:
        letter = parse_choice(answers[0], facts["choices"])
        read = letter or "no choice, one was drawn"
        if letter is None:
            place = counter_seed(42, "mmmu", record["prompt_id"]) % len(facts["choices"])
            letter = LETTERS[place]
        right = letter == facts["answer"]
        reason = f"answered {answers[0]!r}, read as {read}; right is {facts['answer']}"
    return SampleScore({"accuracy": float(right)}, reason, {"answers": answers})
