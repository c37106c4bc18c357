"""Compare two evaluations on the same prompts and seeds, and say no more than the numbers carry."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.statistics import Difference, holm, paired_difference
from evals.results import (
    ResultFolder,
    Sample,
    cluster_of,
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

    def of_task(self, task: str) -> "Paired":
        """Return the pairs of one task."""
        rows = [i for i, name in enumerate(self.tasks) if name == task]
        columns = (self.before, self.after, self.prompts, self.clusters, self.tasks)
        return Paired(*([column[i] for i in rows] for column in columns))  # type: ignore[arg-type]

    def difference(self) -> Difference:
        """Return the paired difference, averaged over tasks."""
        return paired_difference(self.before, self.after, self.clusters, self.tasks)

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

    def win_tie_loss(self, better: str) -> dict[str, int]:
        """Return on how many prompts the mean over seeds gets better, stays or gets worse."""
        gains: dict[str, float] = defaultdict(float)
        sign = 1 if better == "higher" else -1
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
    the tasks, the overall one is the raw p-value. Raises RunError if the two are not of the same
    suite and version, share no prompt, or used different seeds.
    """
    a = before if isinstance(before, ResultFolder) else load_results(before)
    b = after if isinstance(after, ResultFolder) else load_results(after)
    pairs = _pairs(a, b)
    headline, *others = b.metrics
    better = b.metrics[headline].better
    values = _values(pairs, headline)
    if not values.prompts:
        raise RunError(
            f"no picture of {a.path} and {b.path} was scored in both.\n"
            "    Fix: read the reasons in samples.jsonl."
        )
    of_task = {task: values.of_task(task) for task in dict.fromkeys(values.tasks)}
    differences = [paired.difference() for paired in of_task.values()]
    adjusted = holm([difference.p_value for difference in differences])
    first, second = a.results["settings"], b.results["settings"]
    other_values = {name: _values(pairs, name) for name in others}
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
        "overall": _entry(values, better, values.difference()),
        "tasks": {
            task: _entry(paired, better, difference, p_value)
            for (task, paired), difference, p_value in zip(
                of_task.items(), differences, adjusted, strict=True
            )
        },
        "others": {
            name: _entry(paired, b.metrics[name].better, paired.difference())
            for name, paired in other_values.items()
            if paired.prompts
        },
        "layout_diversity": _entry(diversity, DIVERSITY.better, diversity.difference())
        if diversity.prompts
        else None,
    }


def paired_values(before: ResultFolder, after: ResultFolder) -> Paired:
    """Return the headline values of both evaluations that `compare` would pair."""
    return _values(_pairs(before, after), next(iter(after.metrics)))


def compare_all(baseline: ResultFolder, candidates: Sequence[ResultFolder]) -> list[dict[str, Any]]:
    """Compare each candidate with the baseline; the overall p-values are Holm's over candidates."""
    comparisons = [compare(baseline, candidate) for candidate in candidates]
    adjusted = holm([comparison["overall"]["p_value"] for comparison in comparisons])
    for comparison, candidate, p_value in zip(comparisons, candidates, adjusted, strict=True):
        entry = comparison["overall"]
        difference = Difference(**{field.name: entry[field.name] for field in fields(Difference)})
        better = candidate.metrics[comparison["metric"]].better
        entry["p_adjusted"] = round(p_value, 6)
        entry["verdict"], entry["verdict_text"] = verdict(difference, p_value, better)
    return comparisons


def verdict(
    difference: Difference, p_value: float, better: str = "higher", alpha: float = ALPHA
) -> tuple[str, str]:
    """Return a code ("better", "worse", "not shown") and a sentence.

    A side is named only if the interval excludes 0, the (adjusted) p-value is below `alpha` and
    the difference is at least the detectable one. A true difference of just that size is told from
    0 four times in five, but named only about every second time, when it is measured that large.
    """
    detectable = difference.minimum_detectable
    if difference.low is None or difference.high is None or detectable is None:
        return "not shown", "Fewer than two prompts in a task: no difference can be shown."
    could = f"A true difference of {detectable:.3f} would be told from 0 four times in five."
    if difference.low <= 0 <= difference.high:
        return "not shown", f"No difference shown: the interval includes 0. {could}"
    if p_value >= alpha:
        return "not shown", f"No difference shown: p = {p_value:.3f}. {could}"
    if abs(difference.mean) < detectable:
        return "not shown", f"Suggestive only: smaller than the detectable effect. {could}"
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
    for left, right in pairs:
        # A seed that is not known (an imported evaluation) says nothing against pairing prompts.
        if None not in (left["seed"], right["seed"]) and left["seed"] != right["seed"]:
            raise RunError(
                f"{a.path} and {b.path} used different seeds for {left['prompt_id']!r}.\n"
                "    Fix: evaluate both with this version."
            )
    return pairs


def _values(pairs: Sequence[tuple[Sample, Sample]], metric: str) -> Paired:
    scored = [
        (left, right)
        for left, right in pairs
        if left["values"].get(metric) is not None and right["values"].get(metric) is not None
    ]
    return Paired(
        [left["values"][metric] for left, _ in scored],
        [right["values"][metric] for _, right in scored],
        [right["prompt_id"] for _, right in scored],
        [cluster_of(right) for _, right in scored],
        [right["task"] for _, right in scored],
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
    )


def _entry(
    paired: Paired, better: str, difference: Difference, p_adjusted: float | None = None
) -> dict[str, Any]:
    p_value = difference.p_value if p_adjusted is None else p_adjusted
    code, text = verdict(difference, p_value, better)
    before, after = paired.means()
    return {
        "before": round(before, 6),
        "after": round(after, 6),
        **estimate_dict(difference),
        "p_adjusted": round(p_value, 6),
        **paired.win_tie_loss(better),
        "verdict": code,
        "verdict_text": text,
    }
