"""Does cheap decoding rank the pictures of a prompt as full decoding does?

GRPO learns from the order of rewards within a group. Every N steps some groups of the step are
decoded fully as well, from the same tokens and noise, and judged again; where the orders part,
training goes on with a better decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from rl.rollouts import Judge, Rollout, Sampler
from rollout.decode import Decode
from rollout.micro_batch import Events


@dataclass(frozen=True)
class DecodeCheck:
    """Compares every `every` steps, on the first `prompts` groups, with the decoding `full`.

    Below the rank correlation `limit`, the sampler's decoding gets twice the steps, up to those of
    `full`; with as many steps, its guidance and interval, and the larger tiles of both (whole
    pictures, if either decodes them). What was found is appended to `events`.
    """

    every: int
    limit: float
    prompts: int
    full: Decode
    events: Events

    def due(self, step: int, used: Decode) -> bool:
        """Whether this step is one of them, and `used` is cheaper than `full` at all."""
        return step % self.every == 0 and raised(used, self.full) != used

    def __call__(
        self,
        sampler: Sampler,
        rollout: Rollout,
        group_size: int,
        *counters: int | str,
        judge: Judge,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        """Compare on groups of `rollout`, and raise the sampler's decoding where it is too cheap.

        `gather` concatenates a tensor of each process, so that all of them decide alike.
        """
        rows = slice(0, min(self.prompts * group_size, len(rollout.images)))
        images = sampler.decoded_again(rollout, rows, group_size, self.full, *counters)
        cheap = [scored.total for scored in rollout.scores[rows]]
        full = [scored.total for scored in judge(images, rows)]
        found = rank_correlations(cheap, full, group_size)
        sums = torch.tensor([[sum(found), len(found)]], dtype=torch.float64)
        total, groups = gather(sums.to(sampler.policy.device)).sum(0).tolist()
        mean = total / groups if groups else None
        if too_low := mean is not None and mean < self.limit:
            sampler.decode = raised(sampler.decode, self.full)
        self.events.append(
            {
                "event": "decode_check",
                "rank_correlation": mean,
                "groups": int(groups),
                "raised": too_low,
                "steps": sampler.decode.steps,
                "guidance": sampler.decode.guidance,
                "guidance_interval": sampler.decode.guidance_interval,
                "tile": sampler.decode.tile,
            }
        )


def raised(used: Decode, full: Decode) -> Decode:
    """Return the next better decoding than `used` on the way to `full`; `used` if there is none."""
    if used.steps < full.steps:
        return replace(used, steps=min(2 * used.steps, full.steps))
    return replace(
        used,
        guidance=full.guidance,
        guidance_interval=full.guidance_interval,
        # None is whole pictures: better than any tile.
        tile=used.tile and full.tile and max(used.tile, full.tile),
    )


def rank_correlations(
    cheap: Sequence[float | None], full: Sequence[float | None], group_size: int
) -> list[float]:
    """Return Spearman's rank correlation of each group that full decoding gives an order.

    Samples that either could not score are left out, and so are groups with fewer than three left
    or with one full reward for all. If cheap decoding gives such a group one reward for all, it has
    lost the order: 0.
    """
    pairs = np.array([cheap, full], dtype=float)  # None becomes NaN
    found = []
    for start in range(0, pairs.shape[1], group_size):
        group = pairs[:, start : start + group_size]
        low, high = group[:, ~np.isnan(group).any(axis=0)]
        if len(high) < 3 or np.ptp(high) == 0:
            continue
        found.append(float(spearmanr(low, high).statistic) if np.ptp(low) else 0.0)
    return found


def decode_of_journal(rows: Sequence[dict[str, Any]], start: Decode) -> Decode:
    """Return the decoding that a run had reached; `start` if no check has raised it."""
    checks = [row for row in rows if row.get("event") == "decode_check"]
    if not checks:
        return start
    # Journals of earlier versions have no interval and no tile, for a check could not change them.
    low, high = checks[-1].get("guidance_interval", start.guidance_interval)
    return replace(
        start,
        steps=checks[-1]["steps"],
        guidance=checks[-1]["guidance"],
        guidance_interval=(low, high),
        tile=checks[-1].get("tile", start.tile),
    )
