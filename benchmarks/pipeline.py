"""Seconds of a rollout in waves that overlap over one that goes stage by stage, with stage times.

    python -m benchmarks.pipeline [--waves 4] [--turns 3] [--threads 1] [--judge 0.02]

The shipped policy, 12 prompts x 12 samples, GenEval as reward; once as it is, and once with a judge
that takes `--judge` seconds a picture on another machine, which is waited for. Serial is a recipe's
`rollout.waves: 1`, pipelined `rollout.waves: N`. They take turns; the ratio is the median over the
turns of two neighbours. `bound` is what no overlap can beat: all stages over the longest one.

Overlap needs somewhere to work: a second core, a GPU, another machine. On one core the stages of a
local step only share it, and the first row is then about 1 or a little below.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch

from data.prompts import draw_records
from policy import Policy, base_path
from policy.quiet import quiet_libraries
from policy.sampling import Sampling
from rewards.runner import RewardRunner
from rewards.spec import RewardSpec
from rl.rollouts import Judge, Rollout, Sampler
from rollout.decode import Decode
from rollout.timeline import busy_seconds
from rollout.transformers_engine import TransformersEngine

PROMPTS, GROUP = 12, 12


def judge_of(runner: RewardRunner, records: list[dict[str, Any]], seconds: float) -> Judge:
    """Return a judge by `runner` that is also waited for, `seconds` a picture."""
    asked = [record for record in records for _ in range(GROUP)]

    def judge(images: list[Any], rows: slice) -> list[Any]:
        mine = asked[rows]
        time.sleep(seconds * len(images))
        columns = {"metadata": [record["metadata"] for record in mine]}
        return runner.score(images, [str(record["prompt"]) for record in mine], columns)

    return judge


def timed(sampler: Sampler, records: list[dict[str, Any]], judge: Judge) -> tuple[float, Rollout]:
    """Return the seconds that pass while a step's rollout is made, and the rollout."""
    begin = time.perf_counter()
    rollout = sampler([str(record["prompt"]) for record in records], GROUP, 0, judge=judge)
    return time.perf_counter() - begin, rollout


def main() -> None:
    """Measure and print one table for each kind of judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--judge", type=float, default=0.02)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with quiet_libraries():
        policy = Policy.from_pretrained(base_path())
    config = policy.config
    images = (config.image_start_id, config.num_image_tokens, config.num_tokens)
    engine = TransformersEngine(policy.ar, *images, config.pad_id)
    samplers = {
        name: Sampler(policy, engine, Sampling(), Decode(2, 1.0), run_seed=0, waves=waves)
        for name, waves in (("serial", 1), ("pipelined", arguments.waves))
    }
    records = draw_records("scenes", "train", None, steps=1, per_step=PROMPTS, seed=0)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{PROMPTS * GROUP} pictures, {arguments.waves} waves, {arguments.threads} thread(s) a "
        f"stage, {cores} core(s), load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    with RewardRunner([RewardSpec("geneval")]) as runner:
        for name, wait in (
            ("local reward", 0.0),
            (f"judge, {arguments.judge:g} s", arguments.judge),
        ):
            judge = judge_of(runner, records, wait)
            seconds: dict[str, list[float]] = {key: [] for key in samplers}
            stages: dict[str, list[dict[str, float]]] = {key: [] for key in samplers}
            for turn in range(arguments.turns + 1):
                for key, sampler in samplers.items():
                    passed, rollout = timed(sampler, records, judge)
                    if turn:  # the first turn warms up
                        seconds[key].append(passed)
                        stages[key].append(busy_seconds(rollout.intervals))
            report(name, seconds, stages)


def report(
    name: str, seconds: dict[str, list[float]], stages: dict[str, list[dict[str, float]]]
) -> None:
    """Print the stage times of both ways and their ratio."""
    print(f"\n{name}")
    names = list(stages["serial"][0])
    print(f"{'':12}{'step':>9}" + "".join(f"{stage:>10}" for stage in names))
    for key, passed in seconds.items():
        means = {stage: statistics.median(s[stage] for s in stages[key]) for stage in names}
        print(
            f"{key:12}{statistics.median(passed):>8.2f}s"
            + "".join(f"{means[stage]:>9.2f}s" for stage in names)
        )
    serial = {stage: statistics.median(s[stage] for s in stages["serial"]) for stage in names}
    # The language model samples and scores: one after the other.
    longest = max(serial["rollout"] + serial["score"], serial["render"], serial["reward"])
    pairs = zip(seconds["serial"], seconds["pipelined"], strict=True)
    ratio = statistics.median(slow / fast for slow, fast in pairs)
    bound = sum(serial.values()) / longest
    print(f"serial / pipelined = {ratio:.2f}  (bound {bound:.2f})")


if __name__ == "__main__":
    main()
