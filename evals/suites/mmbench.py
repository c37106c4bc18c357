"""MMBench: choices that are turned round, so that guessing the place does not pay.

Sources: Liu et al. (2023), circular evaluation. The columns, a picture that is another row's index
and the files' MD5: open-compass/VLMEvalKit, vlmeval/dataset/image_base.py and image_mcq.py.
"""

import base64
import binascii
import hashlib
from pathlib import Path

from PIL import Image

from common.errors import DataError
from common.images import open_image
from evals.suites.files import digest, read_table
from evals.suites.questions import (
    LETTERS,
    OWN_WORDS,
    overall_and_tasks,
    parse_choice,
    with_choices,
)
from evals.suites.suite import Metric, Record, SampleScore, Suite

PUBLISHED_MD5 = {
    "b6caf1133a01c6bb705cf753bb527ed8": "MMBench_DEV_EN",
    "08b8fc3324a5ed74155350f57be69fbd": "MMBench_DEV_CN",
    "30c05be8f2f347a50be25aa067248184": "MMBench_DEV_EN_V11",
    "593f9b5f6bea453d870a798b34ae4f37": "MMBench_DEV_CN_V11",
}
"""The splits with answers, as VLMEvalKit publishes them."""
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
    table = read_table(file, _COLUMNS)
    pictures = {row["index"]: row["image"] for row in table}
    records = tuple(_record(file, row) for row in table if int(row["index"]) < TURNED)
    if not records:
        raise DataError(f"{file} has no questions.\n    Fix: give one of MMBench's TSV files.")

    def reference(record: Record) -> Image.Image:
        name = record["prompt_id"]
        text = pictures.get(pictures[name], pictures[name])  # a row may name another's picture
        try:
            return open_image(base64.b64decode(text, validate=True), f"{file}: {name}")
        except binascii.Error as error:
            raise DataError(f"{file}: question {name} has no picture ({error}).") from error

    published = PUBLISHED_MD5.get(hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest())
    reasons = [_READ, OWN_WORDS]
    if published is None:
        reasons.append(f"{file.name} is none of the published files with answers (by its MD5)")

    return Suite(
        name="mmbench",
        title=published or "MMBench",
        version=1,
        records=records,
        score=_score,
        metrics={
            "circular": Metric("Right in every order"),
            "vanilla": Metric("Right in the first order"),
        },
        not_comparable="; ".join(reasons),
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
