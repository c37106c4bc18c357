"""`make demo`: from the shipped base policy to one that RL improved, and the report that proves it.

Trains `recipes/geneval-scenes.yaml`, then compares on held-out prompts. Cooling is the cheap
alternative to training, so each policy also gets its best temperature, chosen on other prompts.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import AtelierError, RunError
from common.progress import Progress

if TYPE_CHECKING:
    from policy import Policy

RECIPE = "geneval-scenes"
SUITE = "geneval-scenes"
TEMPERATURES = (1.0, 0.7, 0.4)
SEEDS = 8
TUNE_PROMPTS, TUNE_SEEDS = 72, 2


def main(out: Path = Path("runs/demo")) -> int:
    """Run the demo in a new folder and return the exit code."""
    from cli import console
    from cli.free_name import free_name

    try:
        folder = free_name(out)
        with console.progress() as progress:
            lines = run(folder, progress)
        for line in lines:
            console.say(line)
    except AtelierError as error:
        console.error(str(error))
        return error.exit_code
    return 0


def run(folder: Path, progress: Progress, overrides: tuple[str, ...] = ()) -> list[str]:
    """Train, evaluate and report; return the result lines."""
    progress.start("load", None)
    from evals.report import build_report
    from policy import Policy, base_path
    from recipes import load_recipe
    from rl.run import train

    progress.finish("load")
    progress.line("1/3  train: GRPO on the scene world")
    train(load_recipe(RECIPE, list(overrides)), folder / "run", progress)
    progress.line("2/3  evaluate base and trained policy on held-out prompts")
    policies = {
        "base": Policy.from_pretrained(base_path()),
        "trained": Policy.from_pretrained(folder / "run" / "policy"),
    }
    best = {
        name: best_temperature(policy, name, folder / "tune", progress)
        for name, policy in policies.items()
    }
    plain = compare_at(policies, dict.fromkeys(policies, 1.0), folder / "results", progress)
    fair = compare_at(policies, best, folder / "results", progress)
    progress.line("3/3  report")
    results = [Path(fair[side]["path"]) for side in ("before", "after")]
    page = build_report(results, folder / "report", run_dir=folder / "run")
    return [
        result_line("AT TEMPERATURE 1", plain),
        result_line("DEMO RESULT", fair) + f" report={page}",
    ]


def best_temperature(policy: "Policy", name: str, folder: Path, progress: Progress) -> float:
    """Return the temperature of the highest score on prompts of training combinations.

    A temperature without a score is left out; RunError if none has one.
    """
    from data.prompts import GENEVAL_TASKS
    from data.scenes import scene_prompts
    from evals.run import evaluate
    from evals.suites import load_suite

    # A class alone cannot be held out: these prompts are the evaluated ones as well.
    tasks = tuple(task for task in GENEVAL_TASKS if task != "single_object")
    tune = replace(
        load_suite(SUITE),
        name=f"{SUITE}-tune",
        title="Choice of the temperature",
        records=tuple(scene_prompts("tune", tasks, n=TUNE_PROMPTS)),
    )
    scores = {}
    for temperature in TEMPERATURES:
        results = evaluate(
            policy,
            tune,
            folder / f"{name}-t{temperature}",
            seeds=TUNE_SEEDS,
            temperature=temperature,
            progress=progress,
        )
        if overall := results["overall"][tune.headline]:
            scores[temperature] = overall["mean"]
    if not scores:
        raise RunError(
            f"{name}: no temperature has a score, so none can be chosen.\n"
            f"    Fix: read the reasons in {folder}/*/samples.jsonl, then run again."
        )
    best = max(scores, key=lambda temperature: scores[temperature])
    shown = ", ".join(f"{score:.3f} at {t}" for t, score in scores.items())
    progress.line(f"{name}: {shown}; best at {best}")
    return best


def compare_at(
    policies: "dict[str, Policy]", temperatures: dict[str, float], folder: Path, progress: Progress
) -> dict[str, Any]:
    """Evaluate both policies on the same held-out prompts and seeds and compare them."""
    from evals.compare import compare
    from evals.run import evaluate

    # One folder for a policy at a temperature: an evaluation that is there is not made again.
    folders = {name: folder / f"{name}-t{temperatures[name]}" for name in policies}
    for name, policy in policies.items():
        evaluate(
            policy,
            SUITE,
            folders[name],
            seeds=SEEDS,
            temperature=temperatures[name],
            progress=progress,
            name=name if temperatures[name] == 1 else f"{name} (T={temperatures[name]})",
        )
    return compare(folders["base"], folders["trained"])


def result_line(title: str, comparison: dict[str, Any]) -> str:
    """Return the one line that says what came out."""
    entry = comparison["overall"]
    score, interval = "base=none trained=none delta=none", "none"
    if entry is not None:
        score = (
            f"base={entry['before']:.2f} trained={entry['after']:.2f} delta={entry['mean']:+.2f}"
        )
        if entry["low"] is not None:
            interval = f"[{entry['low']:+.2f}, {entry['high']:+.2f}]"
    return (
        f"{title} suite={SUITE} {score} ci95={interval} "
        f"prompts={comparison['prompts']} images={2 * comparison['pairs']}"
    )


if __name__ == "__main__":
    sys.exit(main())
