"""Compare two evaluations on the same prompts and seeds, and say no more than the numbers carry."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.bootstrap import MIN_CLUSTERS
from common.errors import RunError
from common.statistics import Difference, holm, paired_difference
from evals.results import (
    ResultFolder,
    Sample,
    cluster_of,
    count_unscored,
    differences_of,
    diversity_by_prompt,
    estimate_dict,
    load_results,
)
from evals.suites import Metric

SCHEMA = "atelier.comparison/1"
ALPHA = 0.05
DIVERSITY = Metric("Layout diversity", "amount")


@dataclass(frozen=True)
class Paired:
    """Values of one metric on the same prompts and seeds, all lists of one length."""

    before: list[float]
    after: list[float]
    prompts: list[str]
    clusters: list[str]
    tasks: list[str]
    metric: Metric

    def of_task(self, task: str) -> "Paired":
        """Return the pairs of one task."""
        rows = [i for i, name in enumerate(self.tasks) if name == task]
        return Paired(
            [self.before[i] for i in rows],
            [self.after[i] for i in rows],
            [self.prompts[i] for i in rows],
            [self.clusters[i] for i in rows],
            [task] * len(rows),
            self.metric,
        )

    def difference(self) -> Difference:
        """Return the paired difference, averaged over tasks."""
        amounts = self.metric.kind == "amount"
        return paired_difference(
            self.before, self.after, self.clusters, self.tasks, amounts=amounts
        )

    def means(self) -> tuple[float, float]:
        """Return both means, averaged over tasks."""
        sides = []
        for values in (self.before, self.after):
            groups: dict[str, list[float]] = defaultdict(list)
            for task, value in zip(self.tasks, values, strict=True):
                groups[task].append(value)
            means = [sum(group) / len(group) for group in groups.values()]
            sides.append(sum(means) / len(means))
        return sides[0], sides[1]

    def win_tie_loss(self) -> dict[str, int]:
        """Return on how many prompts the mean over seeds gets better, stays or gets worse."""
        gains: dict[str, float] = defaultdict(float)
        sign = 1 if self.metric.better == "higher" else -1
        for prompt, first, second in zip(self.prompts, self.before, self.after, strict=True):
            gains[prompt] += sign * (second - first)
        wins = sum(gain > 1e-9 for gain in gains.values())
        losses = sum(gain < -1e-9 for gain in gains.values())
        return {"win": wins, "tie": len(gains) - wins - losses, "loss": losses}


def compare(before: ResultFolder | Path | str, after: ResultFolder | Path | str) -> dict[str, Any]:
    """Return the paired differences `after - before`, overall and per task, with verdicts.

    Pictures are paired by prompt and sample index; pairs with an unscored side are left out and
    counted. What is resampled is the cluster that the suite gives a prompt, or the prompt.
    `overall` averages over tasks (GenEval's convention); the tasks' `p_adjusted` are Holm's over
    the tasks, the overall one is the raw p-value. A task of either side without a pair that was
    scored on both is None, with the reason under `not_scored`, and then so is `overall`: a mean
    over the tasks that are left would be another quantity. Raises RunError if the two are not of
    the same suite, version and judge, share no prompt, ask for different things under one prompt
    id, or used different seeds.
    """
    a = before if isinstance(before, ResultFolder) else load_results(before)
    b = after if isinstance(after, ResultFolder) else load_results(after)
    pairs = _pairs(a, b)
    headline, *others = b.metrics
    values = _values(pairs, headline, b.metrics[headline])
    tasks = list(dict.fromkeys(sample["task"] for sample in [*a.samples, *b.samples]))
    of_task = {task: values.of_task(task) for task in tasks if task in values.tasks}
    differences = {task: paired.difference() for task, paired in of_task.items()}
    adjusted = dict(zip(of_task, holm([d.p_value for d in differences.values()]), strict=True))
    first, second = a.results["settings"], b.results["settings"]
    diversity = _diversity(a, b, pairs)
    return {
        "schema": SCHEMA,
        "before": {"name": a.name, "path": str(a.path), "hash": a.results["policy"]["hash"]},
        "after": {"name": b.name, "path": str(b.path), "hash": b.results["policy"]["hash"]},
        "suite": b.suite,
        "metric": headline,
        "prompts": len(set(values.prompts)),
        "clusters": len(set(zip(values.tasks, values.clusters, strict=True))),
        "pairs": len(values.prompts),
        "unscored_pairs": len(pairs) - len(values.prompts),
        "unpaired": {"before": len(a.samples) - len(pairs), "after": len(b.samples) - len(pairs)},
        "settings_that_differ": {
            key: [first.get(key), second.get(key)]
            for key in first | second
            if first.get(key) != second.get(key)
        },
        "not_scored": {
            task: _why_not_scored(task, headline, a, b) for task in tasks if task not in of_task
        },
        "overall": _overall(values, tasks),
        "tasks": {
            task: _entry(of_task[task], differences[task], adjusted[task])
            if task in of_task
            else None
            for task in tasks
        },
        "others": {name: _overall(_values(pairs, name, b.metrics[name]), tasks) for name in others},
        "layout_diversity": _entry(diversity, diversity.difference())
        if diversity.prompts
        else None,
    }


def paired_values(before: ResultFolder, after: ResultFolder) -> Paired:
    """Return the headline values of both evaluations that `compare` would pair."""
    headline, metric = next(iter(after.metrics.items()))
    return _values(_pairs(before, after), headline, metric)


def compare_all(baseline: ResultFolder, candidates: Sequence[ResultFolder]) -> list[dict[str, Any]]:
    """Compare each candidate with the baseline; the overall p-values are Holm's over candidates."""
    comparisons = [compare(baseline, candidate) for candidate in candidates]
    entries = [c["overall"] for c in comparisons if c["overall"] is not None]
    better = baseline.metrics[next(iter(baseline.metrics))].better
    adjusted = holm([entry["p_value"] for entry in entries])
    for entry, p_value in zip(entries, adjusted, strict=True):
        difference = Difference(**{field.name: entry[field.name] for field in fields(Difference)})
        entry["p_adjusted"] = round(p_value, 6)
        entry["verdict"], entry["verdict_text"] = verdict(difference, p_value, better)
    return comparisons


def verdict(difference: Difference, p_value: float, better: str = "higher") -> tuple[str, str]:
    """Return a code ("better", "worse", "not shown") and a sentence.

    A side is named only if the interval excludes 0, the (adjusted) p-value is below `ALPHA` and
    the difference is at least the detectable one. A true difference of just that size is told from
    0 four times in five, but named only about every second time, when it is measured that large.
    """
    detectable = difference.minimum_detectable
    if difference.low is None or difference.high is None:
        few = difference.clusters < MIN_CLUSTERS
        why = (
            f"it takes {MIN_CLUSTERS} independent prompts"
            if few
            else "a task has one prompt or equal amounts"
        )
        return "not shown", f"No interval ({why}): nothing can be shown."
    if detectable is None:
        return "not shown", "Nothing can be shown: the prompts are too few for any difference."
    if difference.low <= 0 <= difference.high:
        return "not shown", "No difference shown: the interval includes 0."
    if p_value >= ALPHA:
        return "not shown", f"No difference shown: p = {p_value:.3f}."
    if abs(difference.mean) < detectable:
        return "not shown", "Suggestive only: smaller than the detectable effect."
    code = "better" if (difference.mean > 0) == (better == "higher") else "worse"
    return code, f"{code.capitalize()}: the interval excludes 0 and so does the permutation test."


def _pairs(a: ResultFolder, b: ResultFolder) -> list[tuple[Sample, Sample]]:
    for fact in ("name", "version"):
        if a.results["suite"][fact] != b.results["suite"][fact]:
            raise RunError(
                f"{a.path} is of suite {fact} {a.results['suite'][fact]!r}, {b.path} of "
                f"{b.results['suite'][fact]!r}: only one suite can be compared.\n"
                "    Fix: evaluate both on it."
            )
    judges = [result.results["suite"].get("settings", {}) for result in (a, b)]
    if differing := differences_of(*judges):
        raise RunError(
            f"{a.path} and {b.path} were judged differently: {'; '.join(differing)}.\n"
            "    Fix: evaluate both with the same suite options and the same reward code."
        )
    first = {(s["prompt_id"], s["index"]): s for s in a.samples}
    pairs = [
        (first[key], sample)
        for sample in b.samples
        if (key := (sample["prompt_id"], sample["index"])) in first
    ]
    if not pairs:
        raise RunError(
            f"{a.path} and {b.path} share no prompt.\n    Fix: evaluate both with the same --limit."
        )
    asked, asks = a.records(), b.records()
    for left, right in pairs:
        key = left["prompt_id"]
        if left["prompt"] != right["prompt"] or asked.get(key) != asks.get(key):
            raise RunError(
                f"{a.path} and {b.path} have different prompts under the id "
                f"{key!r}: {left['prompt']!r} and {right['prompt']!r} (or their "
                "metadata differ).\n    Fix: evaluate both with the same prompt file."
            )
        # A seed that is not known (an imported evaluation) says nothing against pairing prompts.
        if None not in (left["seed"], right["seed"]) and left["seed"] != right["seed"]:
            raise RunError(
                f"{a.path} and {b.path} used different seeds for {left['prompt_id']!r}.\n"
                "    Fix: evaluate both with this version."
            )
    return pairs


def _values(pairs: Sequence[tuple[Sample, Sample]], name: str, metric: Metric) -> Paired:
    scored = [
        (left, right)
        for left, right in pairs
        if left["values"].get(name) is not None and right["values"].get(name) is not None
    ]
    return Paired(
        [left["values"][name] for left, _ in scored],
        [right["values"][name] for _, right in scored],
        [right["prompt_id"] for _, right in scored],
        [cluster_of(right) for _, right in scored],
        [right["task"] for _, right in scored],
        metric,
    )


def _diversity(a: ResultFolder, b: ResultFolder, pairs: Sequence[tuple[Sample, Sample]]) -> Paired:
    first, second = diversity_by_prompt(a.samples), diversity_by_prompt(b.samples)
    rows = {right["prompt_id"]: right for _, right in pairs}
    shared = [prompt for prompt in rows if prompt in first and prompt in second]
    return Paired(
        [first[prompt] for prompt in shared],
        [second[prompt] for prompt in shared],
        shared,
        [cluster_of(rows[prompt]) for prompt in shared],
        [rows[prompt]["task"] for prompt in shared],
        DIVERSITY,
    )


def _overall(values: Paired, tasks: Sequence[str]) -> dict[str, Any] | None:
    """Return the entry of a mean over all tasks; None if one of them has no scored pair."""
    if set(values.tasks) != set(tasks):
        return None
    return _entry(values, values.difference())


def _why_not_scored(task: str, metric: str, a: ResultFolder, b: ResultFolder) -> str:
    sides = []
    for result in (a, b):
        rows = [sample for sample in result.samples if sample["task"] == task]
        scored = len(rows) - count_unscored(rows, metric)
        sides.append(f"{scored} of {len(rows)} pictures scored in {result.path}")
    return f"{task} has no pair that was scored in both ({', '.join(sides)})"


def _entry(
    paired: Paired, difference: Difference, p_adjusted: float | None = None
) -> dict[str, Any]:
    p_value = difference.p_value if p_adjusted is None else p_adjusted
    code, text = verdict(difference, p_value, paired.metric.better)
    before, after = paired.means()
    return {
        "before": round(before, 6),
        "after": round(after, 6),
        **estimate_dict(difference),
        "p_adjusted": round(p_value, 6),
        **paired.win_tie_loss(),
        "verdict": code,
        "verdict_text": text,
    }
