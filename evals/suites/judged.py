"""What the suites share whose pictures a vision-language model judges."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from threading import Lock
from typing import Any

from PIL import Image

from evals.suites.files import NO_CHECKSUM
from evals.suites.options import check_options
from evals.suites.rewarded import mean, typed
from rewards.hosting import LoopThread
from rewards.judge_client import Judge, JudgeFailure, Parse

WORKERS = 8
"""Pictures that are judged at the same time."""
_ONE_LOOP = Lock()


@cache
def _event_loop() -> LoopThread:
    """Return the loop of all requests: those of a judge can only be limited within one loop."""
    return LoopThread("judges")


def judge_of(options: Mapping[str, str]) -> Judge:
    """Return the judge that options describe: base_url, model, and what `Judge` has besides."""
    check_options("the judge", Judge, options)
    return Judge(**typed(options))


def ask(
    judge: Judge,
    questions: Sequence[tuple[str, Sequence[Image.Image]]],
    parse: Parse | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """Return the judge's answers to all questions, or none of them and why. Any thread may ask."""
    answers: list[dict[str, Any]] = []
    with _ONE_LOOP:
        loop = _event_loop()
    for answer in loop.submit(judge.ask(questions, parse)).result():
        if isinstance(answer, JudgeFailure):
            return [], str(answer)
        answers.append(answer)
    return answers, ""


def numbers(answer: Mapping[str, Any], key: str, count: int, most: float) -> list[float] | None:
    """Return the `count` numbers from 0 to `most` under a key of an answer; None if it has not."""
    given = answer.get(key)
    found = [
        float(value)
        for value in (given if isinstance(given, list) else [given])
        if isinstance(value, int | float) and not isinstance(value, bool)
        if math.isfinite(value) and 0 <= value <= most
    ]
    whole = len(found) == (len(given) if isinstance(given, list) else 1) == count
    return found if whole else None


def not_comparable(
    judge: Judge, published: Sequence[str], found: int, prompts: int, *, own_words: bool
) -> str:
    """Return why a judged suite's numbers must not stand beside published ones.

    `published` are the judges of publications; `found` of `prompts` records are there;
    `own_words`: the questions are ours and not the publication's.
    """
    reasons = []
    if judge.model not in published:
        reasons.append(f"judged by {judge.model}, not by {' or '.join(published)}")
    if own_words:
        reasons.append("the judge is asked in our own words")
    if found != prompts:
        reasons.append(f"{found} prompts instead of {prompts}")
    return "; ".join([*reasons, NO_CHECKSUM])


def task_means(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Return the mean of each task over its samples."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        values[sample["task"]].append(sample["values"][metric])
    return {task: mean(found) for task, found in values.items()}
