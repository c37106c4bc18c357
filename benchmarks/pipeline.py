"""Seconds of a rollout in waves that overlap over one that goes stage by stage, with stage times.

    python -m benchmarks.pipeline [--waves 4] [--turns 3] [--threads 1] [--judge 0.02] [--workers 0]

The shipped policy, 12 prompts x 12 samples, GenEval as reward; once as it is, and once with a judge
that takes `--judge` seconds a picture on another machine, which is waited for. Serial is a recipe's
`rollout.waves: 1`, pipelined `rollout.waves: N`. They take turns; the ratio is the median over the
turns of two neighbours. `bound` is what no overlap can beat: all stages over the longest one.

With `--workers N` sampling, rendering and rewards have N actors on Ray each, in both ways.

Overlap needs somewhere to work: a second core, a GPU, another machine. On one core the stages of a
local step only share it, and the first table is then about 1 or a little below.
"""

import argparse
import os
import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch

from data.prompts import draw_records
from policy import Policy, base_path
from policy.quiet import quiet_libraries
from policy.sampling import Sampling
from recipes import load_recipe
from recipes.schema_grpo import GrpoRecipe
from rl.rollouts import Judge, Rollout, Sampler
from rl.stages import Journaled, Score, Stages, build_rewards, open_stages
from rollout.decode import Decode
from rollout.timeline import busy_seconds

PROMPTS, GROUP, LONGEST_PROMPT = 12, 12, 64
SECTIONS = ("rollout", "decode", "rewards")


def judge_of(score: Score, records: list[dict[str, Any]], seconds: float) -> Judge:
    """Return a judge by `score` that is also waited for, `seconds` a picture."""
    asked = [record for record in records for _ in range(GROUP)]

    def judge(images: list[Any], rows: slice) -> list[Any]:
        mine = asked[rows]
        time.sleep(seconds * len(images))
        columns = {"metadata": [record["metadata"] for record in mine]}
        return score(images, [str(record["prompt"]) for record in mine], columns)

    return judge


def stages_of(policy: Policy, workers: int, threads: int, parts: ExitStack) -> Stages:
    """Return the stages in this process, or with `workers` actors on Ray for each of them."""
    overrides = [f"{section}.workers={workers}" for section in SECTIONS]
    overrides += [f"{section}.ray.cpus_per_worker={threads}" for section in SECTIONS]
    recipe = load_recipe("geneval-scenes", overrides).recipe
    assert isinstance(recipe, GrpoRecipe)
    rewards = parts.enter_context(build_rewards(recipe))
    return open_stages(recipe, policy, rewards, LONGEST_PROMPT, Journaled(), parts)


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
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with quiet_libraries():
        policy = Policy.from_pretrained(base_path())
    records = draw_records("scenes", "train", None, steps=1, per_step=PROMPTS, seed=0)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{PROMPTS * GROUP} pictures, {arguments.waves} waves, {arguments.threads} thread(s) a "
        f"stage, {arguments.workers} worker(s) for each of {', '.join(SECTIONS)}, {cores} core(s), "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    with ExitStack() as parts:
        stages = stages_of(policy, arguments.workers, arguments.threads, parts)
        samplers = {
            name: Sampler(
                policy, stages.engine, Sampling(), Decode(2, 1.0), 0, None, waves, [], stages.render
            )
            for name, waves in (("serial", 1), ("pipelined", arguments.waves))
        }
        for name, wait in (
            ("the reward as it is", 0.0),
            (f"a judge that is waited for {arguments.judge:g} s a picture", arguments.judge),
        ):
            judge = judge_of(stages.score, records, wait)
            seconds: dict[str, list[float]] = {key: [] for key in samplers}
            busy: dict[str, list[dict[str, float]]] = {key: [] for key in samplers}
            for turn in range(arguments.turns + 1):
                for key, sampler in samplers.items():
                    passed, rollout = timed(sampler, records, judge)
                    if turn:  # the first turn warms up
                        seconds[key].append(passed)
                        busy[key].append(busy_seconds(rollout.intervals))
            report(name, seconds, busy, together=not arguments.workers)


def report(
    name: str,
    seconds: dict[str, list[float]],
    stages: dict[str, list[dict[str, float]]],
    together: bool,
) -> None:
    """Print the stage times of both ways and their ratio.

    `together`: one model samples and scores, one after the other.
    """
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
    language = (serial["rollout"], serial["score"])
    longest = max(sum(language) if together else max(language), serial["render"], serial["reward"])
    pairs = zip(seconds["serial"], seconds["pipelined"], strict=True)
    ratio = statistics.median(slow / fast for slow, fast in pairs)
    bound = sum(serial.values()) / longest
    print(f"serial / pipelined = {ratio:.2f}  (bound {bound:.2f})")


if __name__ == "__main__":
    main()
