"""The reward runner against rewards called one after the other, as the published trainer does.

    python -m benchmarks.reward_overlap [--turns 3]

Two judges behind a network, which wait and compute nothing, and GenEval on 24 scene pictures. Wall
time: waiting is what overlaps. `benchmarks.rewards` has the speed and memory of every reward.
"""

import asyncio
import time

from benchmarks.rewards import pictures
from benchmarks.timing import Ratio, main, take_turns
from rewards import reward
from rewards.geneval import geneval
from rewards.runner import RewardRunner, RewardSpec

PICTURES, SECONDS = 24, 0.6


@reward(name="waits")
async def waits(images, prompts):
    """Wait as long as a judge takes."""
    await asyncio.sleep(SECONDS)
    return [0.5] * len(images)


def ratios(turns: int) -> list[Ratio]:
    """Return the ratio of the two."""
    images, prompts, columns = pictures(PICTURES)
    specs = [
        RewardSpec("geneval"),
        RewardSpec("waits", name="first"),
        RewardSpec("waits", name="second"),
    ]

    def serially() -> None:
        geneval(images, columns["metadata"])
        for _ in range(2):
            asyncio.run(waits(images, prompts))

    with RewardRunner(specs) as runner:
        times = take_turns(
            {"serial": serially, "ours": lambda: runner.score(images, prompts, columns)},
            turns,
            time.perf_counter,
        )
    return [times.ratio("rewards: one after the other", "serial", "ours")]


if __name__ == "__main__":
    main(ratios, __doc__, turns=3)
