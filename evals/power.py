"""How many prompts a difference needs, and what a suite's own prompts can find."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from common.bootstrap import MIN_CLUSTERS, satterthwaite
from common.errors import RunError
from common.statistics import (
    Components,
    clusters_needed,
    minimum_detectable_effect,
    variance_components,
)
from evals.compare import paired_values
from evals.results import ResultFolder
from evals.suites import Suite, load_suite, task_of
from evals.suites.geneval import TASK_SIZES

ASSUMED = Components(between=0.05, within=0.25)
"""For scores of 0 or 1 without a pilot. `within` is 2 p (1 - p) (1 - rho): two policies that are
right half of the time (p) and whose pictures of one prompt correlate at 0.5 (rho). For the shipped
base and a policy trained from it, tasks have 0.18 to 0.24 within and 0.00 to 0.05 between."""

PUBLISHED_TASKS = {"geneval": TASK_SIZES}
"""Prompts of each task of suites whose prompt file is the user's own."""


@dataclass(frozen=True)
class TaskPlan:
    """One task: its independent prompts, what varies, and what it can find."""

    prompts: int
    components: Components
    detectable: float | None
    """Smallest true difference found four times in five; None with fewer than five prompts, where
    nothing varied in the pilot, and where a rate would have to differ by more than 1."""


@dataclass(frozen=True)
class Plan:
    """What a suite can find with `seeds` pictures for each prompt."""

    seeds: int
    tasks: dict[str, TaskPlan]
    rates: bool

    @property
    def prompts(self) -> int:
        """Independent prompts of all tasks."""
        return sum(task.prompts for task in self.tasks.values())

    @property
    def spread(self) -> float:
        """Standard error of the mean over tasks times the root of the number of prompts."""
        return sqrt(
            sum(
                task.components.cluster_variance(self.seeds) * self.prompts / task.prompts
                for task in self.tasks.values()
            )
        ) / len(self.tasks)

    @property
    def detectable(self) -> float | None:
        """Smallest true difference of the mean over tasks that is found four times in five."""
        tasks = self.tasks.values()
        if self.prompts < MIN_CLUSTERS or min(task.prompts for task in tasks) < 2:
            return None
        variances = [t.components.cluster_variance(self.seeds) / t.prompts for t in tasks]
        freedom = satterthwaite(variances, [task.prompts - 1 for task in tasks])
        return _found(self.spread / sqrt(self.prompts), freedom, self.rates)

    def prompts_needed(self, difference: float) -> int | None:
        """Return how many prompts, shared out over the tasks as in the suite, find the difference.

        The difference is that of the mean over tasks; it is found four times in five. None where
        nothing varied in the pilot.
        """
        return clusters_needed(difference, self.spread, len(self.tasks)) if self.spread else None

    def prompts_needed_in(self, task: str, difference: float) -> int | None:
        """Return how many prompts of one task find the difference of that task alone."""
        spread = sqrt(self.tasks[task].components.cluster_variance(self.seeds))
        return clusters_needed(difference, spread) if spread else None


def plan(
    sizes: Mapping[str, int],
    seeds: int,
    components: Mapping[str, Components] | None = None,
    *,
    rates: bool = True,
) -> Plan:
    """Return what tasks of these sizes (independent prompts) can find.

    `components` come from a pilot (`pilot_components`); tasks without use `ASSUMED`. `rates` says
    that the values lie in [0, 1], so that no difference is larger than 1.
    """
    tasks = {}
    for task, prompts in sizes.items():
        known = (components or {}).get(task, ASSUMED)
        error = sqrt(known.cluster_variance(seeds) / prompts)
        enough = prompts >= MIN_CLUSTERS
        found = _found(error, prompts - 1, rates) if enough else None
        tasks[task] = TaskPlan(prompts, known, found)
    return Plan(seeds, tasks, rates)


def task_sizes(name: str, options: Mapping[str, str]) -> dict[str, int]:
    """Return how many independent prompts (clusters) each task of a suite has."""
    if name in PUBLISHED_TASKS and not options:
        return dict(PUBLISHED_TASKS[name])
    suite: Suite = load_suite(name, options=options)
    clusters: dict[str, set[str]] = defaultdict(set)
    for record in suite.records:
        clusters[task_of(record)].add(str(record.get("cluster", record["prompt_id"])))
    return {task: len(names) for task, names in clusters.items()}


def pilot_components(before: ResultFolder, after: ResultFolder) -> dict[str, Components]:
    """Return what the paired differences of two evaluations vary by, for each task.

    Tasks with too few prompts or one picture for each are left out; RunError if that is all.
    """
    paired = paired_values(before, after)
    change = [b - a for a, b in zip(paired.before, paired.after, strict=True)]
    rows: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(paired.tasks):
        rows[task].append(index)
    found = {
        task: variance_components([change[i] for i in own], clusters)
        for task, own in rows.items()
        if _enough(clusters := [paired.clusters[i] for i in own])
    }
    if not found:
        raise RunError(
            f"{before.path} and {after.path} are too small for a pilot.\n"
            "    Fix: evaluate at least two prompts of a task with two pictures each."
        )
    return found


def _found(error: float, freedom: float, rates: bool) -> float | None:
    effect = minimum_detectable_effect(error, freedom)
    return None if effect == 0 or (rates and effect > 1) else effect


def _enough(clusters: Sequence[str]) -> bool:
    counts = Counter(clusters)
    return len(counts) > 1 and max(counts.values()) > 1
