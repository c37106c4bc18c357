"""A vision-language model as the judge, behind any OpenAI-compatible endpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from common.errors import RewardError
from rewards.contract import Score
from rewards.judge_client import JudgeFailure, shared_judge, with_judge
from rewards.plugins import reward

QUESTION = """\
You judge how well a picture follows the prompt it was made from, and how well it is made.

Prompt: {prompt}

Give 0 if the picture has nothing to do with the prompt, {max_score} if everything that is asked \
for is there, with the right number, colour and place, and nothing is deformed. Answer with a JSON \
object: {{"score": a number from 0 to {max_score}, "reason": one sentence}}.\
"""


@reward(name="vlm_judge")
@with_judge
async def vlm_judge(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    question: str = QUESTION,
    max_score: float = 10.0,
    **judge: Any,
) -> list[Score]:
    """Return the judge's score over `max_score` for each picture, in [0, 1]; None without one.

    `question` has the place {prompt}, may have {max_score}, and asks for a JSON object with
    "score"; a literal brace is doubled. The other arguments are those of
    `rewards.judge_client.Judge`, `base_url` and `model` at least. Give the reward a time limit
    (`timeout_s` of its recipe entry) that fits all pictures of a step.

    `concurrency` and `budget_usd` hold for all calls of a reward of a run together. With `workers`
    each process has its own; a judge only waits, so leave them out.

    Details: answer (the whole JSON object) and cost (totals of this reward in this run: requests,
    input_tokens, output_tokens, usd, from_cache).
    """
    asked = shared_judge(**judge)
    texts = [_filled(question, prompt, max_score) for prompt in prompts]
    answers = await asked.ask([(t, [i]) for t, i in zip(texts, images, strict=True)])
    cost = dataclasses.asdict(asked.cost)
    return [_score(answer, max_score, cost) for answer in answers]


def _filled(question: str, prompt: str, max_score: float) -> str:
    if "{prompt}" not in question:
        raise RewardError(
            "reward `vlm_judge`: the question has no {prompt}, so every picture would be judged "
            "alike. Fix: put it where the prompt belongs."
        )
    try:
        return question.format(prompt=prompt, max_score=f"{max_score:g}")
    except (KeyError, IndexError, ValueError) as error:
        raise RewardError(
            f"reward `vlm_judge`: the question cannot be filled in ({error}). Fix: double the "
            "braces that stand for themselves."
        ) from error


def _score(answer: dict[str, Any] | JudgeFailure, max_score: float, cost: dict[str, Any]) -> Score:
    if isinstance(answer, JudgeFailure):
        return Score(None, str(answer), {"cost": cost})
    details = {"answer": answer, "cost": cost}
    value = answer.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return Score(None, f"the judge gave no number as score: {value!r}", details)
    if not 0 <= value <= max_score:
        return Score(
            None, f"the judge's score {str(value)[:20]} is not in 0 to {max_score:g}", details
        )
    return Score(value / max_score, str(answer.get("reason", "")), details)
