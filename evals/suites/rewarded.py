"""Suites whose score is one reward, such as a preference model."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evals.suites.identity import source_hash
from evals.suites.suite import Metric, Record, SampleScore, Suite
from recipes.yaml_loader import parse_yaml
from rewards.plugins import load_reward
from rewards.runner import RewardRunner, RewardSpec

TIMEOUT_S = 600.0
NEUTRAL = (
    "api_key_env", "budget_usd", "cache", "concurrency", "retries", "timeout_s", "usd_per_million",
)  # fmt: skip
"""Arguments of a judge that cannot change a score."""


def reward_suite(
    name: str,
    title: str,
    records: Sequence[Record],
    reward: str,
    arguments: Mapping[str, str],
    not_comparable: str | None,
    *,
    settings: Mapping[str, Any] | None = None,
    pictures: int | None = None,
    published: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]] | None = None,
    folder: Path | None = None,
) -> Suite:
    """Return a suite over `records` whose one metric is the reward.

    `reward` is a registered name or "file.py:function" and `arguments` are its own, as typed on a
    command line. Relative paths in the records start at `folder` (default: the working directory).
    Raises RewardError for a reward that cannot be loaded or cannot score a record.
    """
    args = typed(arguments)
    runner = RewardRunner([RewardSpec(reward, timeout_s=TIMEOUT_S, args=args)], folder=folder)
    runner.check_records(records)
    [metric] = runner.names

    def score(image: Image.Image, record: Record) -> SampleScore:
        columns = {key: [value] for key, value in record.items() if key != "prompt"}
        [scored] = runner.score([image], [str(record["prompt"])], columns)
        details = scored.details.get(metric) or {}
        return SampleScore({metric: scored.total}, scored.reasons.get(metric, ""), details)

    return Suite(
        name=name,
        title=title,
        version=1,
        records=tuple(records),
        score=score,
        metrics={metric: Metric(metric, "amount")},
        not_comparable=not_comparable,
        settings={
            "reward": reward,
            "reward_source": source_hash(load_reward(reward, **args).function),
            **(settings or {}),
            **recorded(arguments, "reward"),
        },
        pictures=pictures,
        published=published,
        close=runner.close,
    )


def typed(arguments: Mapping[str, str]) -> dict[str, Any]:
    """Return arguments typed on a command line with their values read as in a recipe."""
    return {
        key: parse_yaml(text.encode(), f"option {key}").value for key, text in arguments.items()
    }


def recorded(arguments: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return what is recorded of arguments: those that decide a score, under names of their own.

    The others stand there as "any", whatever they are.
    """
    return {
        key if key in NEUTRAL else f"{prefix}_{key}": "any" if key in NEUTRAL else text
        for key, text in arguments.items()
    }


def mean_over_prompts(samples: Sequence[Mapping[str, Any]], metric: str) -> float:
    """Return the mean over prompts of the mean over each prompt's pictures."""
    return mean([mean(values) for values in by_prompt(samples, metric).values()])


def by_prompt(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float]]:
    """Return the values of each prompt, in the order of the samples."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        values[sample["prompt_id"]].append(sample["values"][metric])
    return dict(values)


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)
