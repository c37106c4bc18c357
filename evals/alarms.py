"""What in a training run's numbers asks for a look, in words that say what to do.

Each rule looks at the newest steps of metrics.jsonl. The limits are rules of thumb; the reason for
each stands beside it.
"""

from collections.abc import Mapping, Sequence
from math import hypot, inf, log
from statistics import fmean, median
from typing import Any

Row = Mapping[str, Any]

WINDOW = 5
NO_SIGNAL = 0.9
"""Share of groups whose members all got the same reward: such a group teaches nothing."""
MISMATCH = 0.5
"""Nats between the engine's and the trainer's log-prob of a token; bfloat16 explains about 0.1."""
MISMATCH_ROUNDED = 2.0
"""The same where vLLM keeps keys and values in 8 bits, whatever the policy's format. Measured over
1,152 tokens each: 0.32 with the shipped base, 1.22 with random weights of the sharpest softmax."""
RATIO_OFF = 0.1
"""Distance of the mean importance ratio from 1, its value when both hold the same weights and
nothing is truncated."""
CLIPPED = 0.3
"""Share of clipped tokens at which most of a step's update is thrown away."""
SPIKE = 10.0
"""Gradient norm in multiples of its median."""
COLLAPSED = 0.25
"""Share of the first steps' entropy."""
SPRAYED = 0.2
"""More objects per picture that nobody asked for than in the first steps."""
FALL_ERRORS = 2.5
"""Fall of the held-out score below its best while the reward rises, in standard errors of the
difference of two points. More than the usual 2, because the best of many points is partly luck."""
POINT_ERROR = 0.042
"""Standard error of a point where the run wrote none: about that of 60 prompts, less what two
points over the same prompts share."""


def alarms(
    steps: Sequence[Row],
    held_out: Sequence[Row],
    groups: int | None = None,
    kept: float = 1.0,
    rounded: bool = False,
) -> dict[str, str]:
    """Return a sentence for each thing that looks wrong, by its kind; none for a healthy run.

    `steps` and `held_out` are the rows of metrics.jsonl, `groups` the prompts of a step, `kept` the
    least probability that truncated sampling leaves to a step's tokens (top-p; of top-k: 0);
    `rounded`: whether the engine keeps keys and values in 8 bits.
    """
    if not steps:
        return {}
    found = {
        "unscored": _unscored(steps[-1]),
        "no signal": _no_signal(steps, groups),
        "engine": _apart(steps[-1], kept, rounded),
        "clipped": _clipped(steps),
        "gradient": _spike(steps),
        "entropy": _collapsed(steps),
        "extra objects": _sprayed(steps),
        "reward hacking": parted(steps, held_out),
    }
    return {kind: text for kind, text in found.items() if text is not None}


def headline(row: Row) -> str | None:
    """Return the name of the held-out score that decides: the first one of an evaluation row."""
    beside = ("event", "step", "per_task", "standard_error")
    return next((key for key in row if key not in beside), None)


def _unscored(newest: Row) -> str | None:
    why = next(iter(newest.get("missing_reasons", {})), "look at the reward's own messages")
    if "reward" in newest and newest["reward"] is None:
        return f"no picture of the newest step has a reward: {why}"
    if missing := newest.get("missing_rewards"):
        return f"{missing:g} pictures of the newest step could not be scored: {why}"
    return None


def _no_signal(steps: Sequence[Row], groups: int | None) -> str | None:
    same = _newest(steps, "zero_variance_groups")
    if not groups or len(same) < WINDOW or fmean(same) < NO_SIGNAL * groups:
        return None
    return (
        f"{fmean(same):.0f} of {groups} groups get one reward for all members, which teaches "
        "nothing: raise the temperature or choose harder prompts"
    )


def _apart(newest: Row, kept: float, rounded: bool) -> str | None:
    mismatch, ratio = newest.get("logprob_mismatch_max"), newest.get("importance_ratio_mean")
    # The trainer's softmax is whole: of a truncated one, the ratio is what truncation kept.
    allowed = (MISMATCH_ROUNDED if rounded else MISMATCH) + (-log(kept) if kept else inf)
    # With a policy lag they differ by an update, on purpose; then only the mean ratio tells.
    if mismatch is not None and mismatch > allowed and not newest.get("policy_lag"):
        return f"engine and trainer differ by {mismatch:.2f} nats on a token: stop and check"
    if ratio is not None and not kept - RATIO_OFF <= ratio <= 1 + RATIO_OFF:
        return f"the mean importance ratio is {ratio:.2f}: engine and trainer have parted"
    return None


def _clipped(steps: Sequence[Row]) -> str | None:
    clipped = _newest(steps, "clip_fraction")
    if not clipped or fmean(clipped) <= CLIPPED:
        return None
    return f"{fmean(clipped):.0%} of the tokens are clipped: lower the learning rate"


def _spike(steps: Sequence[Row]) -> str | None:
    norms = _values(steps, "grad_norm")
    if len(norms) < 2 * WINDOW or norms[-1] <= SPIKE * median(norms[:-1]):
        return None
    return f"the gradient norm jumped to {norms[-1]:.3g} from about {median(norms[:-1]):.3g}"


def _collapsed(steps: Sequence[Row]) -> str | None:
    first, newest = _ends(steps, "entropy")
    if first is None or newest is None or first <= 0 or newest >= COLLAPSED * first:
        return None
    return f"entropy fell from {first:.3f} to {newest:.3f}: pictures of a prompt become one"


def _sprayed(steps: Sequence[Row]) -> str | None:
    first, newest = _ends(steps, "extra_objects")
    if first is None or newest is None or newest - first <= SPRAYED:
        return None
    return f"objects nobody asked for went from {first:.2f} to {newest:.2f} a picture"


def parted(steps: Sequence[Row], held_out: Sequence[Row]) -> str | None:
    """Return a sentence if the reward rose while the held-out score fell by more than chance."""
    name = headline(held_out[-1]) if held_out else None
    curve = [row for row in held_out if name and row.get(name) is not None]
    if name is None or len(curve) < 2:
        return None
    best, now = max(curve, key=lambda row: float(row[name])), curve[-1]
    errors = [row.get("standard_error") or POINT_ERROR for row in (best, now)]
    before = _values([row for row in steps if row["step"] <= max(best["step"], WINDOW)], "reward")
    rewards = _newest(steps, "reward")
    if best[name] - now[name] < FALL_ERRORS * hypot(*errors) or not before or not rewards:
        return None
    if fmean(rewards) <= fmean(before[-WINDOW:]):
        return None
    return (
        f"the reward rises and held-out {name} fell from {best[name]:.3f} (step {best['step']}) to "
        f"{now[name]:.3f}: look for what the reward pays that the held-out score does not"
    )


def _values(steps: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in steps if row.get(key) is not None]


def _newest(steps: Sequence[Row], key: str) -> list[float]:
    return _values(steps, key)[-WINDOW:]


def _ends(steps: Sequence[Row], key: str) -> tuple[float | None, float | None]:
    values = _values(steps, key)
    if len(values) < 2 * WINDOW:
        return None, None
    return fmean(values[:WINDOW]), fmean(values[-WINDOW:])
