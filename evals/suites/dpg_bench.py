"""DPG-Bench: long prompts, each with a graph of yes-or-no questions about the picture.

Source: Hu et al., ELLA (2024); TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError
from evals.suites.files import NO_CHECKSUM, digest, read_table
from evals.suites.identity import source_hash
from evals.suites.rewarded import TIMEOUT_S, mean, mean_over_prompts, recorded, typed
from evals.suites.suite import Metric, Record, SampleScore, Suite
from rewards.plugins import load_reward
from rewards.runner import RewardRunner, RewardSpec

PROMPTS = 1065
PICTURES = 4
PUBLISHED_JUDGE = "mPLUG-large (damo/mplug_visual-question-answering_coco_large_en)"
_COLUMNS = (
    "item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language",
)  # fmt: skip


def dpg_bench(csv: str, judge: str = "yes_no", **arguments: str) -> Suite:
    """Build the suite from the official dpg_bench.csv, which the user supplies.

    `judge` is a reward that gets questions as prompts and returns 1 for yes and 0 for no: `yes_no`
    (any OpenAI-compatible endpoint; options base_url and model), a plug-in, or "file.py:function",
    such as one around the published judge. Headline `dpg`: the share of a picture's questions that
    are answered yes, those whose parent is not counted as no.
    """
    file = Path(csv)
    records = read_questions(file)
    args = typed(arguments)
    runner = RewardRunner([RewardSpec(judge, timeout_s=TIMEOUT_S, args=args)])

    def score(image: Image.Image, record: Record) -> SampleScore:
        questions = record["metadata"]["questions"]
        texts = [question["question"] for question in questions]
        told = runner.score([image] * len(texts), texts, {})
        return score_answers(questions, [t.total for t in told], [t.reasons for t in told])

    reason = f"judged by `{judge}`, while published numbers are those of {PUBLISHED_JUDGE}"
    if len(records) != PROMPTS:
        reason += f"; {len(records)} prompts instead of {PROMPTS}"
    return Suite(
        name="dpg-bench",
        title="DPG-Bench",
        version=1,
        records=records,
        score=score,
        metrics={
            "dpg": Metric("DPG-Bench score"),
            "yes": Metric("Questions answered yes"),
        },
        not_comparable=f"{reason}; {NO_CHECKSUM}",
        settings={
            "judge": judge,
            "judge_source": source_hash(load_reward(judge, **args).function),
            "csv_sha256": digest([file]),
            **recorded(arguments, "judge"),
        },
        pictures=PICTURES,
        published=_published,
        close=runner.close,
    )


def read_questions(file: Path) -> tuple[Record, ...]:
    """Return one record for each prompt of dpg_bench.csv, with its questions in file order.

    A question has id, parents (ids, without 0), category and question. As in the official script
    the first row of the file is not read; where other questions depend on that one, it counts as
    answered yes. Raises DataError naming the file and the row that makes no sense.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_table(file, _COLUMNS)):
        if number == 0:
            continue
        name = row["item_id"]
        record = found.setdefault(
            name,
            {
                "prompt": row["text"],
                "prompt_id": name,
                "metadata": {"tag": "dpg", "questions": []},
            },
        )
        try:
            parents = [int(text) for text in row["dependency"].split(",")]
            question = {
                "id": int(row["proposition_id"]),
                "parents": [parent for parent in parents if parent != 0],
                "category": row["tuple"].split("(")[0].strip(),
                "question": row["question_natural_language"],
            }
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{file}: row {number + 2} cannot be read ({error}).\n"
                "    Fix: get dpg_bench.csv of TencentQQGYLab/ELLA again."
            ) from error
        record["metadata"]["questions"].append(question)
    if not found:
        raise DataError(f"{file} has no questions.\n    Fix: give the official dpg_bench.csv.")
    return tuple(found.values())


def score_answers(
    questions: Sequence[Mapping[str, Any]],
    answers: Sequence[float | None],
    reasons: Sequence[Mapping[str, str]],
) -> SampleScore:
    """Score one picture from the judge's answers; without one of them it has no score."""
    for question, answer, why in zip(questions, answers, reasons, strict=True):
        if answer not in (0.0, 1.0):
            told = "; ".join(why.values()) or f"the judge gave {answer}, neither 1 nor 0"
            reason = f"no answer to {question['question']!r}: {told}"
            return SampleScore({"dpg": None, "yes": None}, reason)
    said = {q["id"]: float(answer or 0) for q, answer in zip(questions, answers, strict=True)}
    counted = zeroed(said, {q["id"]: q["parents"] for q in questions})
    rows = [
        {
            "id": q["id"],
            "category": q["category"],
            "question": q["question"],
            "yes": said[q["id"]],
            "counted": counted[q["id"]],
        }
        for q in questions
    ]
    missed = [f"no: {row['question']}" for row in rows if not row["yes"]]
    missed += [
        f"not counted, its parent is no: {row['question']}"
        for row in rows
        if row["yes"] > row["counted"]
    ]
    values: dict[str, float | None] = {
        "dpg": mean(list(counted.values())),
        "yes": mean(list(said.values())),
    }
    return SampleScore(values, "\n".join(missed) or "every answer is yes", {"questions": rows})


def zeroed(answers: Mapping[int, float], parents: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """Return the answers with those set to 0 that have a parent of 0.

    In file order and in place, so a zero reaches the children that come after it.
    """
    counted = dict(answers)
    for question, above in parents.items():
        if any(counted.get(parent, 1.0) == 0 for parent in above):
            counted[question] = 0.0
    return counted


def _published(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the score times 100, and the categories as the official script counts them.

    Those are means over all questions of a category, of the answers themselves (not zeroed) about
    the last picture of each prompt.
    """
    last = {sample["prompt_id"]: sample for sample in samples}
    categories: dict[str, list[float]] = defaultdict(list)
    for sample in last.values():
        for row in sample["details"]["questions"]:
            categories[row["category"].split("-")[0].strip()].append(row["yes"])
    score = 100 * mean_over_prompts(samples, "dpg")
    return {"DPG-Bench": score} | {name: 100 * mean(x) for name, x in sorted(categories.items())}
