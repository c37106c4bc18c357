"""TextVQA: questions about text in photographs.

Source: Singh et al. (2019). The accuracy as in EvolvingLMMs-Lab/lmms-eval, tasks/textvqa/utils.py.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError
from common.pictures import read_picture
from evals.suites.files import NO_CHECKSUM, digest, read_json
from evals.suites.questions import OWN_WORDS, SHORT, overall_and_tasks, vqa_accuracy
from evals.suites.suite import Metric, Record, SampleScore, Suite

QUESTIONS = 5000
"""Of the validation split."""


def textvqa(questions: str, images: str) -> Suite:
    """Build the suite from TextVQA_0.5.1_val.json and the folder of its pictures.

    Headline `accuracy`: VQA accuracy against ten people's answers, after VQA's normalisation.
    """
    file = Path(questions)
    rows = read_json(file)
    records = tuple(_record(file, row) for row in (rows.get("data", []) if rows else []))
    if not records:
        raise DataError(f"{file} has no questions.\n    Fix: give TextVQA_0.5.1_val.json.")
    reasons = [OWN_WORDS, NO_CHECKSUM]
    if len(records) != QUESTIONS:
        reasons.insert(0, f"{len(records)} questions instead of {QUESTIONS}")

    def reference(record: Record) -> Image.Image:
        return read_picture(Path(images) / f"{record['metadata']['picture']}.jpg")

    return Suite(
        name="textvqa",
        title="TextVQA",
        version=1,
        records=records,
        score=_score,
        metrics={"accuracy": Metric("VQA accuracy")},
        not_comparable="; ".join(reasons),
        settings={"questions_sha256": digest([file])},
        pictures=1,
        reference=reference,
        answers=True,
        published=lambda samples: overall_and_tasks(samples, "accuracy"),
    )


def _record(file: Path, row: Any) -> Record:
    try:
        return {
            "prompt": row["question"],
            "prompt_id": str(row["question_id"]),
            "questions": [f"{row['question']}\n{SHORT}"],
            "metadata": {"tag": "textvqa", "picture": row["image_id"], "people": row["answers"]},
        }
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file}: a question lacks {error}.\n    Fix: give the validation split, with answers."
        ) from error


def _score(answers: list[str], record: Record) -> SampleScore:
    people = record["metadata"]["people"]
    value = vqa_accuracy(answers[0], people)
    reason = f"answered {answers[0]!r}; people said {', '.join(dict.fromkeys(people))}"
    return SampleScore({"accuracy": value}, reason, {"answers": answers})
