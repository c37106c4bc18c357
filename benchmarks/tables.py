"""The performance tables of README.md and docs/performance.md, made from the results files.

    python -m benchmarks.tables

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; whatever stood there is
replaced. Only measured results are shown: without a results file of a GPU there is no GPU table.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGES = (Path("README.md"), Path("docs/performance.md"))


def step() -> str:
    """Return stage seconds of the three ways and their ratios."""
    report = _read("step.json")
    ways = report["stages"]
    lines = [
        "| stage, CPU seconds | " + " | ".join(ways) + " |",
        "| --- |" + " --- |" * len(ways),
    ]
    for stage in next(iter(ways.values())):
        cells = [f"{stages[stage]:.2f}" if stages[stage] else "-" for stages in ways.values()]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    whole = [statistics.median(report["seconds"][way]) for way in ways]
    lines.append("| whole step | " + " | ".join(f"{seconds:.2f}" for seconds in whole) + " |")
    rates = (f"{report['images'] / seconds:.1f}" for seconds in whole)
    lines.append("| pictures/s | " + " | ".join(rates) + " |")
    # The median over turns of two neighbours, as everywhere; not the ratio of the medians above.
    times = (1.0, report["overall"], report["equal_decode"])
    lines.append("| times as fast | " + " | ".join(f"{ratio:.1f}" for ratio in times) + " |")
    lines += [
        "",
        f"{report['images']} pictures a step, median of {report['turns']} turns, one thread on "
        f"{report['machine']['processor']}. Within-group rank correlation of the training decode "
        f"with the full one: {report['rank_corr']:.2f} over {report['rank_corr_groups']} groups.",
    ]
    return "\n".join(lines)


def perf() -> str:
    """Return the ratios that `make perf` guards."""
    report = _read("perf.json")
    lines = ["| ours against | ratio | +- | measured |", "| --- | --- | --- | --- |"]
    for row in report["ratios"]:
        scatter = f"{row['scatter']:.2f}" if row["scatter"] else "-"
        cells = (row["name"], f"{row['value']:.2f}", scatter, row["detail"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"One thread on {report['machine']['processor']}."]
    return "\n".join(lines)


def growth() -> str:
    """Return the table of exponents."""
    file = RESULTS / "growth.md"
    if not file.is_file():
        return "Not measured yet: `python -m benchmarks.growth --write` does it."
    return file.read_text().rstrip()


def gpu() -> str:
    """Return the rows of every GPU that was measured."""
    files = sorted(RESULTS.glob("gpu-*.json"))
    if not files:
        return "Not measured on a GPU yet: `python -m benchmarks.gpu --write` does it."
    lines = []
    for file in files:
        report = json.loads(file.read_text())
        lines += [f"{report['machine']['gpu']}:", "", "| row | value | share of the ceiling |"]
        lines.append("| --- | --- | --- |")
        for row in report["rows"]:
            if "skipped" in row:
                lines.append(f"| {row['row']} | skipped: {row['skipped']} | - |")
                continue
            share = row["share_of_ceiling"]
            shown = "-" if share is None else f"{share:.0%}"
            lines.append(f"| {row['row']} | {row['value']:,.1f} {row['unit']} | {shown} |")
        lines.append("")
    return "\n".join(lines).rstrip()


TABLES: dict[str, Callable[[], str]] = {"step": step, "perf": perf, "growth": growth, "gpu": gpu}


def filled(page: str) -> str:
    """Return a page with every table that it has a place for."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- begin {name} -->\n\n{TABLES[name]()}\n\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", table, page, flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages."""
    for path in PAGES:
        path.write_text(filled(path.read_text()))


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


if __name__ == "__main__":
    main()
