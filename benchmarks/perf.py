"""Every ratio in one table, compared with the committed ones: `make perf`.

    python -m benchmarks.perf [--only step decode] [--write]

Ratios travel between machines better than seconds, and so only they are kept, in
benchmarks/baselines.json. A ratio is lost when it is more than 10 % below its baseline by more
than twice its scatter (the standard error of the median over turns), so that noise alone fails a
run about once in forty such lines. Exits with 1 if one is lost. --write keeps the measured
ratios as the new baselines.
"""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.timing import Ratio
from common.atomic import write_text

BASELINES = Path(__file__).parent / "baselines.json"
RESULTS = Path(__file__).parent / "results" / "perf.json"
LOSS = 0.10
SCRIPTS = {
    "startup": 7,
    "sync": 7,
    "checkpoint": 7,
    "reward_overlap": 3,
    "decode": 7,
    "logprobs": 3,
    "evaluation": 5,
    "rollout": 5,
    "step": 3,
}
"""The scripts and how many turns each takes."""


def lost(row: Ratio, baseline: float) -> bool:
    """Return whether a ratio is below its baseline by 10 % and by more than noise."""
    return row.value + 2 * row.scatter < (1 - LOSS) * baseline


def measured(script: str, turns: int) -> list[Ratio]:
    """Run one script in a process of its own, so that none warms or clutters another's memory."""
    code = f"from benchmarks.perf import report; report({script!r}, {turns})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return [Ratio(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def report(script: str, turns: int) -> None:
    """Print a script's ratios as one line of JSON."""
    torch.set_num_threads(1)
    rows = importlib.import_module(f"benchmarks.{script}").ratios(turns)
    print(json.dumps([asdict(row) for row in rows]))


def keep(rows: list[Ratio]) -> None:
    """Make these ratios the baselines and results, beside those of other scripts."""
    baselines = json.loads(BASELINES.read_text()) if BASELINES.is_file() else {}
    baselines |= {row.name: round(row.value, 2) for row in rows}
    write_text(BASELINES, json.dumps(baselines, indent=2) + "\n")
    before = json.loads(RESULTS.read_text())["ratios"] if RESULTS.is_file() else []
    ratios = {row["name"]: row for row in before} | {row.name: asdict(row) for row in rows}
    result = {"machine": machine(), "ratios": list(ratios.values())}
    write_text(RESULTS, json.dumps(result, indent=2) + "\n")


def verdict(row: Ratio, baselines: dict[str, float]) -> str:
    """Return what the table says of a ratio."""
    if row.name not in baselines:
        return "no baseline"
    return "LOST" if lost(row, baselines[row.name]) else "kept"


def main() -> int:
    """Measure, print the table and say whether a ratio was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--turns", type=int, help="of every script, instead of its own number")
    parser.add_argument("--write", action="store_true", help="keep these ratios as baselines")
    options = parser.parse_args()
    baselines = json.loads(BASELINES.read_text()) if BASELINES.is_file() else {}
    rows: list[Ratio] = []
    print(f"{'ours against':52}{'ratio':>8}{'+-':>7}{'baseline':>10}  verdict      times")
    for script in options.only:
        found = measured(script, options.turns or SCRIPTS[script])
        rows += found
        for row in found:
            known = f"{baselines[row.name]:.2f}" if row.name in baselines else "-"
            print(
                f"{row.name:52}{row.value:>8.2f}{row.scatter:>7.2f}{known:>10}  "
                f"{verdict(row, baselines):12} {row.detail}",
                flush=True,
            )
        if options.write:
            keep(found)
    failed = [row.name for row in rows if verdict(row, baselines) == "LOST"]
    found = f"lost: {'; '.join(failed)}" if failed else "no ratio lost"
    print(f"PERF ratios={len(rows)} {found}")
    return 1 if failed and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
