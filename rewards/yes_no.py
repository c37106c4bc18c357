"""Yes-or-no questions about a picture, answered by a model behind an OpenAI-compatible endpoint."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from rewards.contract import Score
from rewards.judge_client import JudgeFailure, shared_judge, with_judge
from rewards.plugins import reward

QUESTION = """\
Look at the picture and answer this question about it: {question}

Answer with a JSON object: {{"answer": "yes"}} or {{"answer": "no"}}.\
"""


@reward(name="yes_no")
@with_judge
async def yes_no(
    images: Sequence[Image.Image], prompts: Sequence[str], **judge: Any
) -> list[Score]:
    """Return 1 where the answer to the question is yes, 0 where it is no; None without an answer.

    Each prompt is a question about its picture. The arguments are those of
    `rewards.judge_client.Judge`, `base_url` and `model` at least.
    """
    asked = [
        (QUESTION.format(question=question), [image])
        for question, image in zip(prompts, images, strict=True)
    ]
    return [_score(answer) for answer in await shared_judge(**judge).ask(asked)]


def _score(answer: dict[str, Any] | JudgeFailure) -> Score:
    if isinstance(answer, JudgeFailure):
        return Score(None, str(answer))
    said = str(answer.get("answer", "")).strip().strip(".").lower()
    if said not in ("yes", "no"):
        return Score(None, f"the judge said neither yes nor no: {answer}")
    return Score(float(said == "yes"), said)
