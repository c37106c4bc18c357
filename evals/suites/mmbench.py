"""MMBench: choices that are turned round, so that guessing the place does not pay.

Source: Liu et al. (2023), circular evaluation.
"""

import base64
import binascii
from pathlib import Path

from PIL import Image

from common.errors import DataError
from common.images import open_image
from evals.suites.files import NO_CHECKSUM, digest, read_table
from evals.suites.questions import (
    LETTERS,
    OWN_WORDS,
    overall_and_tasks,
    parse_choice,
    with_choices,
)
from evals.suites.suite import Metric, Record, SampleScore, Suite

TURNED = 1_000_000
"""Rows with an index from here on are turned copies, which this suite makes itself."""
_COLUMNS = ("index", "question", "A", "B", "answer", "category", "image")
_READ = "the publication asks ChatGPT what an unclear answer means, here it is wrong"


def mmbench(data: str) -> Suite:
    """Build the suite from one of MMBench's TSV files with answers (the dev splits).

    A question is asked once for each of its choices, which move on by one place each time.
    Headline `circular`: all of these answers are right. `vanilla`: the first is.
    """
    file = Path(data)
    rows = [row for row in read_table(file, _COLUMNS) if int(row["index"]) < TURNED]
    pictures = {row["index"]: row["image"] for row in rows}
    records = tuple(_record(file, row) for row in rows)
    if not records:
        raise DataError(f"{file} has no questions.\n    Fix: give one of MMBench's TSV files.")

    def reference(record: Record) -> Image.Image:
        name = record["prompt_id"]
        try:
            return open_image(base64.b64decode(pictures[name], validate=True), f"{file}: {name}")
        except binascii.Error as error:
            raise DataError(f"{file}: question {name} has no picture ({error}).") from error

    return Suite(
        name="mmbench",
        title="MMBench",
        version=1,
        records=records,
        score=_score,
        metrics={
            "circular": Metric("Right in every order"),
            "vanilla": Metric("Right in the first order"),
        },
        not_comparable="; ".join([_READ, OWN_WORDS, NO_CHECKSUM]),
        settings={"data_sha256": digest([file])},
        pictures=1,
        reference=reference,
        answers=True,
        published=lambda samples: overall_and_tasks(samples, "circular"),
    )


def orders(choices: list[str], right: str) -> list[tuple[list[str], str]]:
    """Return the choices in each of their cyclic orders, with the letter that is right in it."""
    place = LETTERS.index(right)
    size = len(choices)
    return [
        (choices[-shift:] + choices[:-shift] if shift else choices, LETTERS[(place + shift) % size])
        for shift in range(size)
    ]


def _record(file: Path, row: dict[str, str]) -> Record:
    choices = [row[letter] for letter in LETTERS[:4] if row.get(letter) not in (None, "", "nan")]
    if row["answer"] not in tuple(LETTERS[: len(choices)]):
        raise DataError(
            f"{file}: question {row['index']} has the answer {row['answer']!r} and {len(choices)} "
            "choices.\n    Fix: give a split with answers, such as MMBench_DEV_EN.tsv."
        )
    hint = row.get("hint") or ""
    text = row["question"] if hint in ("", "nan") else f"{hint}\n{row['question']}"
    turned = orders(choices, row["answer"])
    return {
        "prompt": row["question"],
        "prompt_id": row["index"],
        "questions": [with_choices(text, order) for order, _ in turned],
        "metadata": {"tag": row["category"], "orders": [list(both) for both in turned]},
    }


def _score(answers: list[str], record: Record) -> SampleScore:
    right = [
        parse_choice(answer, choices) == letter
        for answer, (choices, letter) in zip(answers, record["metadata"]["orders"], strict=True)
    ]
    reason = f"right in {sum(right)} of {len(right)} orders; first answered {answers[0]!r}"
    values: dict[str, float | None] = {
        "circular": float(all(right)),
        "vanilla": float(right[0]),
    }
    return SampleScore(values, reason, {"answers": answers})
