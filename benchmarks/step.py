"""One GRPO step, the published way against ours: same prompts, groups, pictures and reward.

    python -m benchmarks.step [--turns 3] [--prompts 12] [--group 12] [--write]

Both ways train all weights of the shipped tiny policy's language model with TRL's trainer, in one
process and one thread, step by step in turns: published, ours, ours with the published decode
settings (30 Euler steps, guidance 2). A step is a whole turn of the training loop, logging
included; the first is not counted. Times are CPU seconds (see `benchmarks.timing`). `rank_corr` is
the mean over groups of Spearman's correlation between the rewards of our training decode and of
the full decode (30 steps, guidance 2) of the same tokens from the same noise; groups whose rewards
are all equal in both do not count, and one that is constant in one of the two counts as 0. --write
puts the numbers into benchmarks/results/step.json.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.stats import rankdata
from transformers import TrainerCallback

from benchmarks.machine import machine
from benchmarks.published import GUIDANCE, STEPS, PublishedTrainer
from benchmarks.timing import Ratio, Times, clock
from data.prompts import records_of_run
from policy import Policy, base_path
from policy.policy import to_images
from policy.quiet import quiet_libraries
from policy.sampling import Sampling
from recipes import load_recipe
from rewards.geneval import geneval
from rl.grpo import ImageGRPOTrainer
from rl.rollouts import Decode, Sampler
from rl.run import PROBES, load_policy, trainer_config
from rl.stages import build_rewards
from rollout.sync import ModelSide, verify_sync
from rollout.transformers_engine import TransformersEngine

RESULTS = Path(__file__).parent / "results" / "step.json"
STAGES = ("sync", "rollout", "score", "render", "reward", "update")


class Turns(TrainerCallback):
    """Lets trainers in several threads go on by one step in turn, and times the steps."""

    def __init__(self, gates: list[threading.Semaphore], place: int) -> None:
        self.trainer: Any = None
        self.steps: list[dict[str, float]] = []
        self._gates, self._place = gates, place
        self._started: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step lasts until the next one begins: logging is part of it."""
        self._hand_over()
        self._gates[self._place].acquire()
        self._started = clock()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step ends with the training."""
        self._hand_over()

    def _hand_over(self) -> None:
        if self._started is None:
            return
        whole = clock() - self._started
        stages = dict(self.trainer.seconds)
        stages["update"] = whole - sum(stages.values())
        self.steps.append(stages)
        self._gates[(self._place + 1) % len(self._gates)].release()


def main() -> None:
    """Measure, print both stage tables and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=12, help="prompts a step")
    parser.add_argument("--group", type=int, default=12, help="pictures of a prompt")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(options.turns, options.prompts, options.group)
    show(report)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


def ratios(turns: int) -> list[Ratio]:
    """Return the last line's three numbers, for `make perf`."""
    report = measure(turns, 12, 12)
    times = Times(report["seconds"])
    return [
        times.ratio("step: published way", "published", "ours"),
        times.ratio("step: published way, same decode", "published", "ours, same decode"),
        Ratio(
            "step: rank correlation with the full decode",
            report["rank_corr"],
            detail=f"{report['rank_corr_groups']} groups",
        ),
    ]


def measure(turns: int, prompts: int, group: int) -> dict[str, Any]:
    """Run all three ways and return the report."""
    recipe = load_recipe(
        "geneval-scenes-full",
        [
            f"train.steps={turns + 1}",
            f"rollout.prompts_per_step={prompts}",
            f"rollout.group_size={group}",
            "policy.device=cpu",
            "algorithm.beta=0",  # the published way is spared its reference policy as well
        ],
    ).recipe
    cheap = Decode(recipe.decode.train.steps, recipe.decode.train.guidance)
    gates = [threading.Semaphore(index == 0) for index in range(3)]
    with (
        tempfile.TemporaryDirectory() as folder,
        quiet_libraries(),
        mock.patch.object(time, "perf_counter", clock),  # what rl/ times its stages by
    ):
        contenders = {
            "published": published(recipe, Path(folder) / "a", Turns(gates, 0)),
            "ours": ours(recipe, Path(folder) / "b", Turns(gates, 1), cheap),
            "ours, same decode": ours(
                recipe, Path(folder) / "c", Turns(gates, 2), Decode(STEPS, GUIDANCE)
            ),
        }
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=_train, args=(trainer, failures), daemon=True)
            for trainer, _ in contenders.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not failures:
                thread.join(timeout=1)
        if failures:
            raise failures[0]
    steps = {name: callback.steps[1:] for name, (_, callback) in contenders.items()}
    times = Times({name: [sum(step.values()) for step in rows] for name, rows in steps.items()})
    correlation, groups = rank_correlation(recipe, cheap)
    return {
        "machine": machine(),
        "images": prompts * group,
        "turns": turns,
        "clock": "CPU seconds, one thread",
        "stages": {
            name: {
                stage: statistics.median(row.get(stage, 0.0) for row in rows) for stage in STAGES
            }
            for name, rows in steps.items()
        },
        "seconds": times.seconds,
        "overall": times.ratio("", "published", "ours").value,
        "equal_decode": times.ratio("", "published", "ours, same decode").value,
        "rank_corr": correlation,
        "rank_corr_groups": groups,
    }


def _train(trainer: Any, failures: list[BaseException]) -> None:
    try:
        trainer.train()
    except BaseException as error:  # a thread must not die in silence while others wait for it
        failures.append(error)


def published(recipe: Any, folder: Path, turns: Turns) -> tuple[PublishedTrainer, Turns]:
    """Return the published way on its own copy of the policy."""

    def reward(images: Any, metadata: Any) -> list[float]:
        return [score.value for score in geneval(images, metadata, **_reward_arguments(recipe))]

    policy = load_policy(recipe)
    trainer = PublishedTrainer(
        policy, _arguments(recipe, policy, folder), records_of_run(recipe), reward, [turns]
    )
    turns.trainer = trainer
    return trainer, turns


def ours(recipe: Any, folder: Path, turns: Turns, decode: Decode) -> tuple[ImageGRPOTrainer, Turns]:
    """Return the parts of `rl.run` on their own copy of the policy."""
    policy = load_policy(recipe)
    config = policy.config
    engine = TransformersEngine(
        policy.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    probes = policy.prompt_ids(PROBES)
    trainer = ImageGRPOTrainer(
        policy.ar,
        _arguments(recipe, policy, folder),
        records_of_run(recipe),
        sampler=Sampler(policy, engine, Sampling(), decode, recipe.seed),
        rewards=build_rewards(recipe),
        sync=lambda step: verify_sync(
            engine,
            ModelSide(policy.ar, step, probes, config.image_start_id, config.num_image_tokens),
        ),
        callbacks=[turns],
        checkpoints=folder / "checkpoints",
    )
    turns.trainer = trainer
    return trainer, turns


def rank_correlation(recipe: Any, cheap: Decode) -> tuple[float, int]:
    """Return the mean within-group rank correlation with the full decode, and of how many groups.

    On the base policy, over the prompts of two steps.
    """
    policy = Policy.from_pretrained(base_path())
    config = policy.config
    engine = TransformersEngine(
        policy.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    size, records = (
        recipe.rollout.group_size,
        records_of_run(recipe)[: 2 * recipe.rollout.prompts_per_step],
    )
    ids = policy.prompt_ids([record["prompt"] for record in records])
    batch = engine.generate(ids, size, Sampling(), list(range(len(records) * size)))
    hidden = policy.condition_rows(batch.prompt_ids, batch.completion_ids)
    noise = policy.noise([row // size for row in range(len(hidden))])
    metadata = [record["metadata"] for record in records for _ in range(size)]
    values = []
    for decode in (cheap, Decode(STEPS, GUIDANCE)):
        pixels = policy.render(hidden, noise=noise, steps=decode.steps, guidance=decode.guidance)
        scores = geneval(to_images(pixels), metadata, **_reward_arguments(recipe))
        values.append([score.value for score in scores])
    found = []
    for start in range(0, len(metadata), size):
        low, full = (rankdata(v[start : start + size]) for v in values)
        if low.std() == 0 and full.std() == 0:
            continue
        constant = low.std() == 0 or full.std() == 0
        found.append(0.0 if constant else float(np.corrcoef(low, full)[0, 1]))
    return statistics.mean(found), len(found)


def _reward_arguments(recipe: Any) -> dict[str, Any]:
    [function] = recipe.rewards.functions
    return dict(function.args)


def _arguments(recipe: Any, policy: Policy, folder: Path) -> Any:
    arguments = trainer_config(recipe, folder, policy.config.num_tokens)
    arguments.save_strategy = "no"
    return arguments


def show(report: dict[str, Any]) -> None:
    """Print the stage tables and, last, the line of ratios."""
    print(
        f"{report['images']} pictures a step, {report['turns']} turns, {report['clock']}, "
        f"{report['machine']['processor']}"
    )
    base = report["stages"]["published"]
    for name, stages in report["stages"].items():
        whole = statistics.median(report["seconds"][name])
        print(f"\n{name}: {whole:.2f} s a step, {report['images'] / whole:.1f} pictures/s")
        print(f"  {'stage':10}{'s':>8}{'share':>8}{'published / this':>18}")
        for stage, seconds in stages.items():
            if seconds:
                ratio = f"{base[stage] / seconds:.1f}" if base[stage] else "-"
                print(f"  {stage:10}{seconds:>8.2f}{seconds / whole:>8.0%}{ratio:>18}")
    print(f"\nrank correlation over {report['rank_corr_groups']} groups of the base policy")
    print(
        f"STEP RATIO overall={report['overall']:.1f} equal_decode={report['equal_decode']:.1f} "
        f"rank_corr={report['rank_corr']:.2f}"
    )


if __name__ == "__main__":
    main()
