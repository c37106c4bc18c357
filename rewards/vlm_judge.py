"""A vision-language model as the judge, behind any OpenAI-compatible endpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from common.errors import RewardError
from rewards.contract import Score
from rewards.judge_client import JudgeFailure, shared_judge
from rewards.plugins import reward

QUESTION = """\
You judge how well a picture follows the prompt it was made from, and how well it is made.

Prompt: {prompt}

Give 0 if the picture has nothing to do with the prompt, {max_score} if everything that is asked \
for is there, with the right number, colour and place, and nothing is deformed. Answer with a JSON \
object: {{"score": a number from 0 to {max_score}, "reason": one sentence}}.\
"""


@reward(name="vlm_judge")
async def vlm_judge(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    base_url: str,
    model: str,
    question: str = QUESTION,
    max_score: float = 10.0,
    api_key_env: str | None = None,
    temperature: float = 0.0,
    max_tokens: int = 512,
    retries: int = 3,
    timeout_s: float = 60.0,
    concurrency: int = 8,
    cache: str | None = None,
    usd_per_million: Sequence[float] = (0.0, 0.0),
    budget_usd: float | None = None,
) -> list[Score]:
    """Return the judge's score over `max_score` for each picture, in [0, 1]; None without one.

    `question` has the place {prompt}, may have {max_score}, and asks for a JSON object with
    "score"; a literal brace is doubled. For the other arguments see `rewards.judge_client.Judge`.
    Give the reward a time limit (`timeout_s` of its recipe entry) that fits all pictures of a step.

    `concurrency` and `budget_usd` hold for all calls of a reward of a run together. With `workers`
    each process has its own; a judge only waits, so leave them out.

    Details: answer (the whole JSON object) and cost (totals of this reward in this run: requests,
    input_tokens, output_tokens, usd, from_cache).
    """
    if len(usd_per_million) != 2:
        raise RewardError(
            f"reward `vlm_judge`: usd_per_million is {list(usd_per_million)}. Fix: write the price "
            "of input and of output tokens."
        )
    judge = shared_judge(
        base_url=base_url,
        model=model,
        api_key_env=api_key_env,
        temperature=temperature,
        max_tokens=max_tokens,
        retries=retries,
        timeout_s=timeout_s,
        concurrency=concurrency,
        cache=cache,
        usd_per_million=(usd_per_million[0], usd_per_million[1]),
        budget_usd=budget_usd,
    )
    texts = [_filled(question, prompt, max_score) for prompt in prompts]
    answers = await judge.ask([(t, [i]) for t, i in zip(texts, images, strict=True)])
    cost = dataclasses.asdict(judge.cost)
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
