"""`atelier eval`: score a policy on a benchmark suite, resumable, with intervals."""

from pathlib import Path
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("eval", rich_help_panel="Judging")
    def evaluate_policy(
        policy: str = typer.Argument(..., help="base, a policy folder or a finished run."),
        suite: str = typer.Option("geneval-scenes", help="Benchmark suite."),
        seeds: int = typer.Option(4, min=1, max=1000, help="Pictures per prompt."),
        limit: int | None = typer.Option(
            None, min=1, help="Number of prompts, the tasks taking turns. [default: all]"
        ),
        temperature: float = typer.Option(1.0, min=0.01, max=10, help="Sampling temperature."),
        steps: int | None = typer.Option(
            None, min=1, max=1000, help="Steps of the diffusion head. [default: the policy's]"
        ),
        guidance: float | None = typer.Option(
            None, min=0, max=50, help="Classifier-free guidance. [default: the policy's]"
        ),
        batch_size: int = typer.Option(64, min=1, help="Pictures made at once."),
        out: Path | None = typer.Option(
            None, help="Result folder; an unfinished one is continued. [default: results/NAME]"
        ),
    ) -> None:
        """Make pictures for a suite's prompts, score them and write a result folder.

        Run the same command again after an interruption and it goes on where it stopped.
        """
        from cli import console
        from cli.policy_folder import find_policy
        from evals.environment import command_line
        from evals.suites import load_suite

        chosen = load_suite(suite, limit)
        folder = find_policy(policy)
        name = out.name if out is not None else f"{_name(policy)}-{suite}"
        out = out or Path("results") / name
        with console.progress() as progress:
            progress.start("load", None)
            from evals.run import evaluate
            from policy import Policy

            model = Policy.from_pretrained(folder)
            progress.finish("load")
            results = evaluate(
                model,
                chosen,
                out,
                seeds=seeds,
                temperature=temperature,
                steps=steps,
                guidance=guidance,
                limit=limit,
                batch_size=batch_size,
                progress=progress,
                name=name,
                command=command_line(),
            )
        for line in _summary(results):
            console.say(line)
        console.say(f"results: {out}    next: atelier report {out}")


def _name(policy: str) -> str:
    """A folder name for a policy: the run's name for runs/NAME/policy."""
    path = Path(policy)
    return path.parent.name if path.name == "policy" and path.parent.name else path.name


def _summary(results: dict[str, Any]) -> list[str]:
    """One line for the overall score and one for each task."""
    headline = next(iter(results["suite"]["metrics"]))
    rows = [("overall", results["overall"][headline])]
    rows += [(task, facts["metrics"][headline]) for task, facts in results["tasks"].items()]
    lines = [f"{results['suite']['title']}, {headline}, {results['images']} pictures"]
    for task, estimate in rows:
        if estimate is None:
            lines.append(f"  {task:<16} not scored")
            continue
        interval = (
            f"[{estimate['low']:.3f}, {estimate['high']:.3f}]"
            if estimate["low"] is not None
            else "no interval: fewer than two prompts"
        )
        lines.append(f"  {task:<16} {estimate['mean']:.3f}  {interval}")
    if unscored := results["unscored"][headline]:
        lines.append(f"  {unscored} pictures could not be scored and are left out")
    return lines
