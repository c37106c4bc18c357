"""HPS v2 as a benchmark: 800 prompts in each of four styles.

Source: Wu et al. (2023); tgxs002/HPSv2, hpsv2/evaluation.py.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

from common.errors import DataError
from evals.suites.files import NO_CHECKSUM, digest, read_prompts
from evals.suites.rewarded import by_prompt, mean, reward_suite
from evals.suites.suite import Suite, task_of

STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS = 800
GROUP = 80
"""Prompts of a group: the published spread is that between ten groups' means."""


def hps_v2(prompts: str, weights: str, **arguments: str) -> Suite:
    """Build the suite: HPS v2.1, a picture for each prompt; the styles are its tasks.

    `prompts` is the folder with anime.json, concept-art.json, paintings.json and photo.json, each a
    list of prompts; `weights` and the further options are those of the reward `hps_v2`.
    """
    files = [Path(prompts) / f"{style}.json" for style in STYLES]
    records = [record for file in files for record in read_prompts(file)]
    if not all(record["prompt_id"].startswith(task_of(record)) for record in records):
        raise DataError(
            f"{prompts}: the prompts have names of their own.\n"
            "    Fix: give the benchmark's own lists of texts."
        )
    reason = f"prompts and weights cannot be told from the published ones ({NO_CHECKSUM})"
    if len(records) != PROMPTS * len(STYLES):
        reason = f"{len(records)} prompts instead of {PROMPTS * len(STYLES)}"
    return reward_suite(
        "hps-v2",
        "HPS v2.1",
        records,
        "hps_v2",
        {"weights": weights, **arguments},
        reason,
        settings={"prompts_sha256": digest(files)},
        pictures=1,
        published=_published,
    )


def _published(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return for each style the mean over groups and the spread between them, times 100."""
    styles: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        styles[sample["task"]].append(sample)
    told: dict[str, float] = {}
    for style, rows in styles.items():
        values = [mean(pictures) for pictures in by_prompt(rows, "hps_v2").values()]
        groups = [100 * mean(values[i : i + GROUP]) for i in range(0, len(values), GROUP)]
        told |= {style: mean(groups), f"{style}, spread of groups": pstdev(groups)}
    return {"average": mean([told[style] for style in styles]), **told}
