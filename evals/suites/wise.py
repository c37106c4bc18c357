"""WISE: prompts that take world knowledge, judged for consistency, realism and beauty.

Source: Niu et al. (2025); PKU-YuanGroup/WISE.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError
from evals.suites.files import digest, read_json
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

JUDGES = ("gpt-4o-2024-05-13",)
WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
BEST = 2
"""The best mark."""
CATEGORIES = {
    "culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000,
}  # fmt: skip
"""Category -> its last prompt_id; they follow each other."""
PROMPTS = 1000
QUESTION = """\
Judge a picture that was made from a prompt, as strictly as an expert would.

Prompt: {prompt}
What the prompt means: {explanation}

Give three whole marks, each 0 (poor), 1 (fair) or 2 (without fault). consistency: does it show \
what is meant, all of it? realism: could it be a real scene, with right light, matter and physics? \
aesthetic_quality: is it beautiful? Answer with a JSON object: \
{{"consistency": mark, "realism": mark, "aesthetic_quality": mark, "reason": one sentence}}.\
"""


def wise(prompts: str, **judge: str) -> Suite:
    """Build the suite from the benchmark's JSON files, which the user supplies.

    `prompts` is the folder with them. Further options are the judge's: base_url, model and others
    of `rewards.judge_client.Judge`. Headline `wiscore`: 0.7 consistency + 0.2 realism + 0.1
    aesthetic quality, over 2, so from 0 to 1.
    """
    asked = judge_of(judge)
    files = sorted(Path(prompts).glob("*.json"))
    records = tuple(_record(file, row) for file in files for row in read_json(file))
    if not records:
        raise DataError(f"{prompts} holds no .json file with prompts.\n    Fix: give WISE's data.")

    def score(image: Image.Image, record: Record) -> SampleScore:
        text = QUESTION.format(
            prompt=record["prompt"], explanation=record["metadata"]["explanation"]
        )
        return wiscore(*ask(asked, [(text, [image])]))

    return Suite(
        name="wise",
        title="WISE",
        version=1,
        records=records,
        score=score,
        metrics={
            "wiscore": Metric("WiScore", "amount"),
            **{name: Metric(name.replace("_", " ").capitalize(), "amount") for name in WEIGHTS},
        },
        not_comparable=not_comparable(asked, JUDGES, len(records), PROMPTS, own_words=True),
        settings={"files_sha256": digest(files), **recorded(judge, "judge")},
        pictures=1,
        workers=WORKERS,
        published=_published,
    )


def wiscore(answers: Sequence[Mapping[str, Any]], why: str) -> SampleScore:
    """Score a picture from the judge's answer; without three marks it has no score."""
    nothing = dict.fromkeys(("wiscore", *WEIGHTS))
    if not answers:
        return SampleScore(nothing, why)
    marks: dict[str, float | None] = {}
    total = 0.0
    for name, weight in WEIGHTS.items():
        found = numbers(answers[0], name, 1, BEST)
        if found is None:
            return SampleScore(nothing, f"no {name} from 0 to {BEST} in {answers[0]}")
        marks[name] = found[0]
        total += weight * found[0]
    return SampleScore({"wiscore": total / BEST, **marks}, str(answers[0].get("reason", "")))


def _record(file: Path, row: Mapping[str, Any]) -> Record:
    try:
        number = int(row["prompt_id"])
        tag = next(name for name, last in CATEGORIES.items() if number <= last)
        return {
            "prompt": row["Prompt"],
            "prompt_id": str(number),
            "metadata": {"tag": tag, "explanation": row["Explanation"]},
        }
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise DataError(
            f"{file}: an entry is no prompt of WISE ({type(error).__name__}: {error}).\n"
            "    Fix: give the folder with the benchmark's own files alone."
        ) from error


def _published(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the categories' means, and the mean over prompts, which is the published overall."""
    overall = mean([sample["values"]["wiscore"] for sample in samples])
    return {"overall": overall, **task_means(samples, "wiscore")}
