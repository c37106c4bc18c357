"""What happens around the training steps: journal, progress, held-out curve, interruption."""

import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from common.journal import Journal
from common.processes import process_count
from common.progress import Progress
from rollout.micro_batch import Events
from rollout.timeline import Interval, busy_seconds

if TYPE_CHECKING:
    from rl.grpo import ImageGRPOTrainer

HeldOut = Callable[[int], dict[str, Any]]
_LOGGED = {
    "reward": "reward",
    "reward_std": "reward_std",
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_fraction",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "zero_variance_groups": "zero_variance_groups",
    "missing_rewards": "missing_rewards",
    "sampling/sampling_logp_difference/max": "logprob_mismatch_max",
    "sampling/importance_sampling_ratio/mean": "importance_ratio_mean",
}
_REASONS = 3


class JournalCallback(TrainerCallback):
    """Write one row a step to `metrics.jsonl` and show it.

    Before it come the step's `events` (lost workers, halved micro-batches); with workers, the row
    has when each of them was `busy`. Both lists are then emptied.
    """

    def __init__(
        self, journal: Journal, progress: Progress, events: Events, busy: list[Interval]
    ) -> None:
        self.journal = journal
        self.progress = progress
        self._events = events
        self._busy = busy
        self.trainer: ImageGRPOTrainer | None = None
        self._started = self._ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, before the held-out evaluation."""
        self._ended = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Turn the trainer's log into the run's row."""
        if not logs or "reward" not in logs or not state.is_world_process_zero:
            return
        assert self.trainer is not None
        row: dict[str, Any] = {"step": state.global_step}
        row |= {ours: logs[theirs] for theirs, ours in _LOGGED.items() if theirs in logs}
        row["rewards"] = {
            key.removeprefix("parts/"): v for key, v in logs.items() if key.startswith("parts/")
        }
        if self.trainer.policy_lag is not None:
            row["policy_lag"] = self.trainer.policy_lag
        row |= self._details() | self._missing()
        row["samples"] = self._samples()
        row |= self._times()
        events = list(self._events)
        for event in events:
            self.journal.write(event | {"step": state.global_step})
            told = ", ".join(
                f"{key} {_short(value)}" for key, value in event.items() if key != "event"
            )
            self.progress.line(f"step {state.global_step}: {event['event']} ({told})")
        del self._events[: len(events)]  # a draw ahead may have told more meanwhile
        self.journal.write(row)
        facts = {"reward": _rounded(row["reward"]) or "-", "strict": _rounded(row.get("strict"))}
        self.progress.advance("train", 1, **{k: v for k, v in facts.items() if v is not None})

    def _times(self) -> dict[str, Any]:
        """How long each stage was at work, and when: [stage, wave, start, end] from the start."""
        assert self.trainer is not None
        intervals = list(self.trainer.timeline.intervals)
        sampled = max((interval.end for interval in intervals), default=self._started)
        intervals.append(Interval("update", 0, sampled, max(self._ended, sampled)))
        if self.trainer.ahead is not None:
            intervals += self.trainer.ahead.intervals()
        intervals.sort(key=lambda interval: interval.start)
        return self._workers(max(interval.end for interval in intervals)) | {
            "seconds": {k: round(v, 4) for k, v in busy_seconds(intervals).items()},
            "stages": [
                [stage, wave, round(start - self._started, 4), round(end - self._started, 4)]
                for stage, wave, start, end in intervals
            ],
        }

    def _workers(self, last: float) -> dict[str, Any]:
        """When each worker was at work, [worker, start, end], until the step's `last` stage ended.

        Held-out evaluation comes later. Nothing without workers.
        """
        busy = sorted(self._busy)
        del self._busy[: len(busy)]  # what is drawn ahead adds to it meanwhile
        rows = [
            (name, max(0.0, start - self._started), min(end, last) - self._started)
            for name, _, start, end in busy
            if start < last and end > self._started
        ]
        told = [[name, round(start, 4), round(end, 4)] for name, start, end in rows]
        return {"workers": told} if told else {}

    def _details(self) -> dict[str, float]:
        """Mean of what the rewards tell beyond their score (strict, soft, extra objects)."""
        assert self.trainer is not None
        means = {}
        for key, name in (("strict", "strict"), ("soft", "soft"), ("extra", "extra_objects")):
            values = [
                float(details[key])
                for scored in self.trainer.all_scores
                for details in scored.details.values()
                if isinstance(details, dict) and _is_number(details.get(key))
            ]
            if values:
                means[name] = sum(values) / len(values)
        return means

    def _missing(self) -> dict[str, dict[str, int]]:
        """The most common reasons why a reward gave a picture no score, with their numbers."""
        assert self.trainer is not None
        reasons = Counter(
            f"{name}: {scored.reasons.get(name, 'no reason')}"
            for scored in self.trainer.all_scores
            for name, value in scored.parts.items()
            if value is None
        )
        return {"missing_reasons": dict(reasons.most_common(_REASONS))} if reasons else {}

    def _samples(self) -> list[dict[str, Any]]:
        """The first sample of the first groups, for `atelier watch`."""
        assert self.trainer is not None
        scored = list(zip(self.trainer.last_prompts, self.trainer.last_scores, strict=True))
        return [
            {"prompt": prompt, "reward": score.total, "reason": "; ".join(score.reasons.values())}
            for prompt, score in scored[:: self.trainer.num_generations][:3]
        ]


class HeldOutCallback(TrainerCallback):
    """Evaluate on held-out prompts before the first step and every `every` steps."""

    def __init__(self, every: int, held_out: HeldOut, journal: Journal, progress: Progress) -> None:
        self.every = every
        self.held_out = held_out
        self.journal = journal
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The curve starts at the untrained policy."""
        if state.global_step == 0:
            self._run(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add a point to the curve."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._run(state.global_step)

    def _run(self, step: int) -> None:
        row = self.held_out(step)
        self.journal.write({"event": "eval", "step": step, **row})
        headline = _rounded(next(iter(row.values())))  # a suite's first metric decides
        self.progress.line(f"step {step}: held-out {headline}")


class InterruptCallback(TrainerCallback):
    """Turn SIGINT and SIGTERM into a checkpoint and a clean stop after the current step.

    All processes stop after the same step, whichever of them was asked to.
    """

    def __init__(self, progress: Progress) -> None:
        self.interrupted = False
        self._progress = progress
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals; a second one acts at once."""

        def note(number: int, frame: Any) -> None:
            self.interrupted = True
            signal.signal(number, self._before[number])
            self._progress.line(
                "stopping after this step; interrupt again to stop at once, without its checkpoint"
            )

        for number in (signal.SIGINT, signal.SIGTERM):
            # What a script starts with & ignores Ctrl-C, which is meant for others.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training."""
        if process_count() > 1:
            asked = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(asked)
            self.interrupted = bool(asked)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def give_back(self) -> None:
        """Put the handlers of before in place again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _is_number(value: Any) -> bool:
    """Whether a detail counts: a reward of the user's own may keep anything under the same name."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _short(value: Any) -> Any:
    return _rounded(value) if isinstance(value, float) else value
