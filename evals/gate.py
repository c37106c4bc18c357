"""Conditions under which a comparison fails, such as `geneval.overall < -0.01`."""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UsageError
from common.registry import nearest

_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_PARTS = ("mean", "low", "high", "p_adjusted", "before", "after")
_FORM = re.compile(r"\s*([^<>=]+\.[^<>=]+?)\s*(<=|>=|<|>)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", re.I)


@dataclass(frozen=True)
class Gate:
    """One condition: fail if the named number of a comparison stands so to the threshold.

    ENTRY is `overall`, a task, a further metric or `layout_diversity`, PART which number of it; the
    difference without one.
    """

    text: str
    target: str
    """SUITE.ENTRY or SUITE.ENTRY.PART; a suite's and a task's name may have dots as well."""
    relation: str
    threshold: float


@dataclass(frozen=True)
class Outcome:
    """Whether a gate fails, and the sentence that says why or why not."""

    gate: str
    value: float | None
    failed: bool
    reason: str


def parse_gate(text: str) -> Gate:
    """Read SUITE.ENTRY[.PART] < NUMBER, with <, <=, > or >=; raise UsageError if it is not that.

    PART is mean (the difference, the default), low or high (its 95 % interval), p_adjusted, before
    or after.
    """
    match = _FORM.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        target, relation, number = match.groups()
        return Gate(text.strip(), target, relation, float(number))
    except ValueError:
        raise UsageError(
            f"`{text}` is not a condition.\n"
            '    Fix: write SUITE.ENTRY < NUMBER, such as "geneval.overall < -0.01".'
        ) from None


def apply_gate(gate: Gate, comparison: Mapping[str, Any]) -> Outcome:
    """Return whether the comparison fails; a number that is missing fails, with the reason.

    Raises UsageError if the comparison is of another suite or has no such entry.
    """
    suite = comparison["suite"]
    if not gate.target.startswith(f"{suite}."):
        wanted = gate.target.partition(".")[2]
        raise UsageError(
            f"`{gate.text}`: the results are of suite {suite}.\n    Fix: write {suite}.{wanted}."
        )
    entry_name, part = gate.target[len(suite) + 1 :], "mean"
    entries = {"overall": comparison["overall"], **comparison["tasks"], **comparison["others"]}
    entries["layout_diversity"] = comparison["layout_diversity"]
    if entry_name not in entries and entry_name.rpartition(".")[2] in _PARTS:
        entry_name, _, part = entry_name.rpartition(".")
    if entry_name not in entries:
        close = nearest(entry_name, entries)
        fix = f"write {close}" if close else f"choose from {', '.join(entries)}"
        raise UsageError(f"`{gate.text}`: there is no `{entry_name}`.\n    Fix: {fix}.")
    entry = entries[entry_name]
    if entry is None:
        reasons = "; ".join(comparison["not_scored"].values()) or "it could not be measured"
        reason = f"{suite}.{entry_name} is not known: {reasons}"
        return Outcome(gate.text, None, True, reason)
    name = f"{suite}.{entry_name}.{part}"
    value = entry[part]
    if value is None:
        reason = f"{name} is not known: too few independent prompts, or equal amounts"
        return Outcome(gate.text, None, True, reason)
    failed = _OPERATORS[gate.relation](value, gate.threshold)
    relation = gate.relation if failed else f"not {gate.relation}"
    return Outcome(
        gate.text, value, failed, f"{name} is {value:+.4f}, {relation} {gate.threshold:g}"
    )
