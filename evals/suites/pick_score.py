"""PickScore over a list of prompts. Source: Kirstain et al. (2023)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.suites.files import digest, read_prompts
from evals.suites.rewarded import mean_over_prompts, reward_suite
from evals.suites.suite import Suite

SCALE = 26
"""What the reward `pick_score` divides the published score by."""


def pick_score(prompts: str, weights: str, **arguments: str) -> Suite:
    """Build the suite: PickScore averaged over the prompts of a file.

    `prompts` is a list that `evals.suites.files.read_prompts` understands, such as the 500 prompts
    of Pick-a-Pic's test split; `weights` and the further options are those of the reward
    `pick_score`. The headline is over 26, as in training; publications show the score itself.
    """
    file = Path(prompts)
    return reward_suite(
        f"pick-score/{file.stem}",
        f"PickScore over {file.stem}",
        read_prompts(file),
        "pick_score",
        {"weights": weights, **arguments},
        "publications agree on no list of prompts: compare numbers over the same file alone",
        settings={"prompts_sha256": digest([file])},
        published=_published,
    )


def _published(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    score = mean_over_prompts(samples, "pick_score")
    return {"PickScore": SCALE * score, "PickScore / 26": score}
