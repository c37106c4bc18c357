"""`atelier compare`: is B better than A, by how much, and does that pass?"""

from pathlib import Path
from typing import Any

import typer

from common.errors import AtelierError


class GateFailed(AtelierError):
    """A condition of --fail-if holds."""


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Judging")
    def compare(
        before: Path = typer.Argument(..., metavar="A", help="Result folder of the baseline."),
        after: Path = typer.Argument(..., metavar="B", help="Result folder of the candidate."),
        fail_if: list[str] | None = typer.Option(
            None,
            metavar="CONDITION",
            help='Fail (exit code 1) if it holds: "geneval.overall < -0.01". Repeatable.',
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the comparison as JSON."),
    ) -> None:
        """Compare two evaluations on the same prompts and seeds.

        A CONDITION is SUITE.ENTRY.PART, one of < <= > >= and a number.

        ENTRY is overall, a task, a further metric or layout_diversity.

        PART is low or high (of B - A's 95 % interval), p_adjusted, before or after; default B - A.
        """
        import json
        from dataclasses import asdict

        from cli import console
        from evals.compare import compare as compare_results
        from evals.gate import apply_gate, parse_gate

        gates = [parse_gate(text) for text in fail_if or []]
        comparison = compare_results(before, after)
        outcomes = [apply_gate(gate, comparison) for gate in gates]
        if as_json:
            whole = comparison | {"gates": [asdict(outcome) for outcome in outcomes]}
            console.say(json.dumps(whole, indent=2, ensure_ascii=False))
        else:
            for line in table(comparison):
                console.say(line)
            for outcome in outcomes:
                if not outcome.failed:
                    console.say(f"passed: {outcome.reason}", style="green")
        failures = [outcome.reason for outcome in outcomes if outcome.failed]
        if failures:
            raise GateFailed("\n".join(f"failed: {reason}" for reason in failures))


def table(comparison: dict[str, Any]) -> list[str]:
    """Return a comparison as lines of at most 80 columns where task names are short."""
    a, b = comparison["before"], comparison["after"]
    lines = [
        f"{b['name']} against {a['name']}: {comparison['suite']}, {comparison['metric']}, "
        f"{comparison['prompts']} prompts, {comparison['pairs']} pairs",
        "",
    ]
    tasks = comparison["tasks"] if len(comparison["tasks"]) > 1 else {}  # one is the overall score
    entries = {"overall": comparison["overall"], **tasks, **comparison["others"]}
    if comparison["layout_diversity"] is not None:
        entries["layout diversity"] = comparison["layout_diversity"]
    width = max(map(len, entries))
    head = f"{'A':>6}{'B':>7}{'B - A':>8}  {'95 % interval':<17}{'p':>6}{'finds':>7}"
    lines.append(f"{'':<{width}}{head}  verdict")
    for name, entry in entries.items():
        if name in comparison["others"] and name == next(iter(comparison["others"])):
            lines.append("")
        if entry is None:
            lines.append(f"{name:<{width}}  not scored")
        else:
            lines.append(f"{name:<{width}}{_numbers(entry)}  {entry['verdict']}")
    lines += ["", *comparison["not_scored"].values()]
    if comparison["overall"] is not None:
        lines.append(comparison["overall"]["verdict_text"])
    lines.append("finds: the true difference that these prompts tell from 0 four times in five")
    if differing := comparison["settings_that_differ"]:
        told = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in differing.items())
        lines.append(f"sampled differently: {told}")
    left_out = sum(comparison["unpaired"].values())
    if left_out or comparison["unscored_pairs"]:
        lines.append(
            f"left out: {left_out} pictures without a partner, "
            f"{comparison['unscored_pairs']} pairs with an unscored side"
        )
    return lines


def _numbers(entry: dict[str, Any]) -> str:
    p_value = entry["p_adjusted"]
    p_text = "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    interval = "no interval"
    if entry["low"] is not None:
        interval = f"[{entry['low']:+.3f}, {entry['high']:+.3f}]"
    detectable = entry["minimum_detectable"]
    finds = "-" if detectable is None else f"{detectable:.3f}"
    return (
        f"{entry['before']:>6.3f}{entry['after']:>7.3f}{entry['mean']:>+8.3f}  "
        f"{interval:<17}{p_text:>6}{finds:>7}"
    )
