"""Does GRPO improve the base? Five seeds, LoRA and full updates, the OCR recipe, and a control.

    python -m benchmarks.bars                       every run that is missing, then the table
    python -m benchmarks.bars --only lora-0 full-0  these runs only, without the table
    python -m benchmarks.bars --table               the table of what is there

Each run trains a shipped recipe (about 4 minutes on two idle cores), evaluates the policy on the
held-out prompts of its suite at temperature 1, 8 seeds a prompt, and compares it with the base on
the same prompts and seeds: at temperature 1, and at the temperature that suits the base best on
training prompts. Everything is kept under runs/bars and not made again; the table is written to
benchmarks/results/bars.md and bars.json.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.console import progress as progress_bars
from cli.demo import SEEDS, best_temperature
from common.atomic import write_text
from common.progress import Progress

OUT = Path("runs/bars")
RESULTS = Path("benchmarks/results")
CONTROL = "benchmarks/shuffled_reward.py:shuffled_geneval"
FIDELITY_SCENES = 300


@dataclass(frozen=True)
class Run:
    """One training run of the table, and what it is compared on."""

    name: str
    recipe: str
    suite: str = "geneval-scenes"
    overrides: tuple[str, ...] = ()


_CONTROL = (f"rewards.functions=[{{use: '{CONTROL}', weight: 1.0}}]",)
RUNS = (
    *(Run(f"lora-{n}", "geneval-scenes", overrides=(f"seed={n}",)) for n in range(5)),
    Run("full-0", "geneval-scenes-full"),
    *(Run(f"shuffled-{n}", "geneval-scenes", overrides=(f"seed={n}", *_CONTROL)) for n in range(2)),
    Run("ocr-0", "ocr-scenes", "ocr-scenes", ("train.steps=30",)),
)


def main(arguments: list[str]) -> int:
    """Make the missing runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS])
    parser.add_argument("--table", action="store_true", help="only write the table")
    chosen = parser.parse_args(arguments)
    with progress_bars() as progress:
        for run in RUNS:
            if not chosen.table and (chosen.only is None or run.name in chosen.only):
                make(run, progress)
    if chosen.only is None:
        rows = [json.loads(path.read_text()) for r in RUNS if (path := _row_file(r)).is_file()]
        write_text(RESULTS / "bars.json", json.dumps(rows, indent=2) + "\n")
        write_text(RESULTS / "bars.md", table(rows))
        print(table(rows))
    return 0


def make(run: Run, progress: Progress) -> None:
    """Train, evaluate and compare one run, and keep its row of the table."""
    from evals.compare import compare
    from evals.fidelity import fidelity
    from evals.run import evaluate
    from policy import Policy
    from recipes import load_recipe
    from rl.run import train

    if _row_file(run).is_file():
        return
    folder = OUT / run.name
    if not (folder / "run" / "policy").is_dir():
        train(load_recipe(run.recipe, list(run.overrides)), folder / "run", progress)
    trained = Policy.from_pretrained(folder / "run" / "policy")
    evaluate(trained, run.suite, folder / "trained", seeds=SEEDS, progress=progress)
    row: dict[str, Any] = {"run": run.name, "recipe": run.recipe, "overrides": run.overrides}
    for temperature, results in base_results(run.suite, progress).items():
        row[f"against base at {temperature}"] = compare(results, folder / "trained")
    if run.suite == "geneval-scenes":
        row["fidelity"] = fidelity(trained, FIDELITY_SCENES).own_prompt
    metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [entry for line in metrics if "seconds" in (entry := json.loads(line))]
    row["training_seconds"] = sum(sum(entry["seconds"].values()) for entry in steps)
    write_text(_row_file(run), json.dumps(row, indent=2) + "\n")


def base_results(suite: str, progress: Progress) -> dict[float, Path]:
    """Evaluate the base once for all runs, at temperature 1 and at its best; return the folders."""
    from evals.run import evaluate
    from policy import Policy, base_path

    base = Policy.from_pretrained(base_path())
    temperatures = [1.0]
    if suite == "geneval-scenes":
        temperatures.append(best_temperature(base, "base", OUT / "base" / "tune", progress))
    folders = {t: OUT / "base" / f"{suite}-t{t}" for t in temperatures}
    for t, folder in folders.items():
        evaluate(base, suite, folder, seeds=SEEDS, temperature=t, progress=progress)
    return folders


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table of all runs."""
    lines = [
        "# RL bars",
        "",
        f"Made by `python -m benchmarks.bars`: held-out prompts x {SEEDS} pictures, temperature 1, "
        "paired with the base on the same prompts and seeds; 95 % cluster-bootstrap intervals. "
        "`cooled`: the base at its best temperature of 1.0, 0.7 and 0.4, chosen on training "
        "prompts. `shuffled`: the control, rewards permuted within each prompt.",
        "",
        "| run | base | trained | difference | against cooled base | extra objects | "
        "layout diversity | fidelity of the head |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        plain = row["against base at 1.0"]
        cooled = [row[key] for key in row if key.startswith("against") and not key.endswith("1.0")]
        entry, extra = plain["overall"], plain["others"].get("extra_objects")
        spread = plain["layout_diversity"]
        cells = [
            row["run"],
            f"{entry['before']:.3f}",
            f"{entry['after']:.3f}",
            _interval(entry),
            _interval(cooled[0]["overall"]) if cooled else "-",
            f"{extra['before']:.2f} to {extra['after']:.2f}" if extra else "-",
            f"{spread['after'] / spread['before'] - 1:+.1%}" if spread else "-",
            f"{row['fidelity']:.3f}" if "fidelity" in row else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {'met' if met else '**missed**'}: {bar}" for bar, met in bars(rows))]
    return "\n".join(lines) + "\n"


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return what the runs have to show, and whether they do."""
    plain = {row["run"]: row["against base at 1.0"] for row in rows}
    lora = [name for name in plain if name.startswith("lora-")]
    control = [name for name in plain if name.startswith("shuffled-")]
    faithful = [row["fidelity"] for row in rows if row["run"].startswith(("lora-", "full-"))]
    low = {name: entry["overall"]["low"] for name, entry in plain.items()}
    extra = [plain[name]["others"]["extra_objects"]["mean"] for name in lora]
    spread = [plain[name]["layout_diversity"] for name in lora]
    lost = [1 - entry["after"] / entry["before"] for entry in spread]
    return [
        (
            f"five LoRA seeds, every interval above 0 ({len(lora)} run)",
            len(lora) == 5 and all(low[name] > 0 for name in lora),
        ),
        ("the full update's interval above 0", low.get("full-0", -1.0) > 0),
        ("the OCR recipe's interval above 0", low.get("ocr-0", -1.0) > 0),
        (
            f"no control's interval above 0 ({len(control)} run)",
            bool(control) and all(low[name] <= 0 for name in control),
        ),
        (
            "extra objects a picture up by at most 0.05 in every LoRA run",
            bool(extra) and max(extra) <= 0.05,
        ),
        (
            "fidelity of the head at least 0.93 in every run with the true reward",
            bool(faithful) and min(faithful) >= 0.93,
        ),
        (
            "layout diversity down by at most 25 % in every LoRA run",
            bool(lost) and max(lost) <= 0.25,
        ),
    ]


def _interval(entry: dict[str, Any]) -> str:
    return f"{entry['mean']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def _row_file(run: Run) -> Path:
    return OUT / run.name / "row.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
