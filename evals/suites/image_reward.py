"""ImageReward as a benchmark of text-to-image policies.

Source: Xu et al. (2023); THUDM/ImageReward, test-benchmark.py and benchmark/benchmark-prompts.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.suites.files import NO_CHECKSUM, digest, read_prompts
from evals.suites.rewarded import mean_over_prompts, reward_suite
from evals.suites.suite import Suite

BENCHMARK = (100, 10)
"""Prompts of the repository's own benchmark, and pictures of each."""
DRAWBENCH = (200, 1)
"""Prompts of DrawBench, and the pictures of each that publications mostly make."""


def image_reward(prompts: str, weights: str, **arguments: str) -> Suite:
    """Build the suite: raw ImageReward-v1.0, averaged over the prompts of a file.

    `prompts` is the repository's benchmark-prompts.json, DrawBench's CSV, or any list that
    `evals.suites.files.read_prompts` understands; `weights` and the further options are those of
    the reward `image_reward`.
    """
    file = Path(prompts)
    records = read_prompts(file)
    protocols = {size: pictures for size, pictures in (BENCHMARK, DRAWBENCH)}
    reason = f"{file.name} and the weights cannot be told from the published ones ({NO_CHECKSUM})"
    if len(records) not in protocols:
        reason = f"{len(records)} prompts are neither ImageReward's 100 nor DrawBench's 200"
    return reward_suite(
        f"image-reward/{file.stem}",
        f"ImageReward over {file.stem}",
        records,
        "image_reward",
        {"weights": weights, **arguments},
        reason,
        settings={"prompts_sha256": digest([file])},
        pictures=protocols.get(len(records)),
        published=_published,
    )


def _published(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {"ImageReward": mean_over_prompts(samples, "image_reward")}
