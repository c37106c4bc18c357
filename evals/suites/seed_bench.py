"""SEED-Bench, its questions about pictures: four choices each.

Source: Li et al. (2023); AILab-CVC/SEED-Bench, DATASET.md (the first benchmark) and eval.py.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError
from common.pictures import read_picture
from evals.suites.files import NO_CHECKSUM, digest, read_json
from evals.suites.questions import (
    LETTERS,
    OWN_WORDS,
    overall_and_tasks,
    parse_choice,
    with_choices,
)
from evals.suites.suite import Metric, Record, SampleScore, Suite

_RANKED = "the publication ranks the choices by likelihood, here a letter is read from an answer"


def seed_bench(questions: str, images: str) -> Suite:
    """Build the suite from SEED-Bench.json and the folder of its pictures; videos are left out.

    Headline `accuracy`; an answer that names no choice is wrong.
    """
    file = Path(questions)
    rows = read_json(file)
    try:
        kinds = {number: name for name, number in rows["question_type"].items()}
        asked = [row for row in rows["questions"] if row["data_type"] == "image"]
        records = tuple(_record(row, kinds[row["question_type_id"]]) for row in asked)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not SEED-Bench.json ({type(error).__name__}: {error}).\n"
            "    Fix: get the file again."
        ) from error

    def reference(record: Record) -> Image.Image:
        return read_picture(Path(images) / record["metadata"]["picture"])

    return Suite(
        name="seed-bench",
        title="SEED-Bench, pictures",
        version=1,
        records=records,
        score=_score,
        metrics={"accuracy": Metric("Accuracy")},
        not_comparable="; ".join([_RANKED, OWN_WORDS, NO_CHECKSUM]),
        settings={"questions_sha256": digest([file])},
        pictures=1,
        reference=reference,
        answers=True,
        published=lambda samples: overall_and_tasks(samples, "accuracy"),
    )


def _record(row: dict[str, Any], kind: str) -> Record:
    choices = [str(row[f"choice_{letter.lower()}"]) for letter in LETTERS[:4]]
    return {
        "prompt": row["question"],
        "prompt_id": str(row["question_id"]),
        "questions": [with_choices(row["question"], choices)],
        "metadata": {
            "tag": kind,
            "picture": row["data_id"],
            "choices": choices,
            "answer": row["answer"],
        },
    }


def _score(answers: list[str], record: Record) -> SampleScore:
    facts = record["metadata"]
    letter = parse_choice(answers[0], facts["choices"])
    reason = f"answered {answers[0]!r}, read as {letter}; right is {facts['answer']}"
    right = float(letter == facts["answer"])
    return SampleScore({"accuracy": right}, reason, {"answers": answers})
