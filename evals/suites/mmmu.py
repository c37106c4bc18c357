"""MMMU: college questions of thirty subjects, about up to seven pictures each.

Source: Yue et al. (2024); MMMU-Benchmark/MMMU, eval/data_utils.py and eval_utils.py. How pictures
are named in questions and options: EvolvingLMMs-Lab/lmms-eval, tasks/mmmu/utils.py.
"""

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
_PICTURES = tuple(f"image_{number}" for number in range(1, 8))
_COLUMNS = ("id", "question", "options", "answer", "question_type", *_PICTURES)


def mmmu(data: str) -> Suite:
    """Build the suite from the folder with the validation split's parquet files (of any depth).

    Headline `accuracy`. As in the official script, an answer that names no choice counts as a
    choice drawn at random, here by a seed of the question's own. Questions about several pictures
    are asked of policies with `answer_about(images, question)`; of others they are not scored.
    """
    files = sorted(Path(data).rglob("validation*.parquet"))
    if not files:
        raise DataError(f"{data} holds no validation*.parquet.\n    Fix: give MMMU's folder.")
    rows = read_parquet(files, _COLUMNS)
    pictures = {row["id"]: [row[x]["bytes"] for x in _PICTURES if row[x]] for row in rows}
    records = tuple(_record(row, len(pictures[row["id"]])) for row in rows)
    reasons = [OWN_WORDS, NO_CHECKSUM]
    if len(records) != QUESTIONS:
        reasons.insert(0, f"{len(records)} questions instead of {QUESTIONS}")

    def several(record: Record) -> list[Image.Image]:
        name = record["prompt_id"]
        return [open_image(data_of, f"{data}: {name}") for data_of in pictures[name]]

    return Suite(
        name="mmmu",
        title="MMMU, validation",
        version=2,
        records=records,
        score=_score,
        metrics={"accuracy": Metric("Accuracy")},
        not_comparable="; ".join(reasons),
        settings={"data_sha256": digest(files)},
        pictures=1,
        reference=lambda record: several(record)[0],
        answers=True,
        several=several,
        published=lambda samples: overall_and_tasks(samples, "accuracy"),
    )


def _record(row: dict[str, Any], pictures: int) -> Record:
    name = "the picture" if pictures == 1 else r"picture \1"
    question, *options = (
        re.sub(r"<image (\d+)>", name, text) for text in [row["question"], *_list(row["options"])]
    )
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
