"""`atelier eval`: score a policy on a benchmark suite, resumable, with intervals."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("eval", rich_help_panel="Judging")
    def evaluate_policy(
        policy: str = typer.Argument(..., help="base, a policy folder or a finished run."),
        options: list[str] | None = typer.Argument(
            None, metavar="OPTION=VALUE", help="Options of the suite, such as prompts=FILE."
        ),
        suite: str = typer.Option("geneval-scenes", help="Benchmark suite."),
        seeds: int = typer.Option(4, min=1, max=1000, help="Pictures per prompt."),
        limit: int | None = typer.Option(
            None, min=1, help="Number of prompts, the tasks taking turns. (default: all)"
        ),
        temperature: float = typer.Option(1.0, min=0.01, max=10, help="Sampling temperature."),
        steps: int | None = typer.Option(
            None, min=1, max=1000, help="Steps of the diffusion head. (default: the policy's)"
        ),
        guidance: float | None = typer.Option(
            None, min=0, max=50, help="Classifier-free guidance. (default: the policy's)"
        ),
        engine: Literal["transformers", "vllm"] = typer.Option(
            "transformers", help="What draws the image tokens."
        ),
        dtype: Literal["float32", "bfloat16"] = typer.Option("float32", help="Number format."),
        device: Literal["auto", "cpu", "cuda"] = typer.Option(
            "auto", help="auto = cuda where there is a GPU, else cpu."
        ),
        batch_size: int = typer.Option(64, min=1, help="Pictures made at once."),
        out: Path | None = typer.Option(
            None, help="Result folder; an unfinished one is continued. (default: results/NAME)"
        ),
    ) -> None:
        """Make pictures for a suite's prompts, score them and write a result folder.

        Run the same command again after an interruption and it goes on where it stopped.
        """
        from cli import console
        from cli.policy_folder import find_policy, recipe_of
        from common.errors import UsageError
        from evals.environment import command_line
        from evals.suites import load_suite

        if engine == "vllm" and temperature > 2:
            raise UsageError("vLLM samples at temperatures up to 2.\n    Fix: --temperature 2")
        chosen = load_suite(suite, options=parse_options(options or []))
        folder = find_policy(policy)
        name = out.name if out is not None else f"{_name(policy)}-{suite}"
        out = out or Path("results") / name
        with closing(chosen), console.progress() as progress:
            progress.start("load", None)
            import torch

            from evals.engines import sampled_by
            from evals.policy_hash import policy_hash
            from evals.run import evaluate
            from policy import Policy

            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model = Policy.from_pretrained(folder, getattr(torch, dtype), device)
            prompts = [str(record["prompt"]) for record in chosen.limited(limit).records]
            with sampled_by(engine, model, folder, prompts) as painter:
                progress.finish("load")
                results = evaluate(
                    painter,
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
                    weights=policy_hash(model),
                    recipe=recipe_of(folder),
                    command=command_line(),
                    setup={"engine": engine, "dtype": dtype, "device": device},
                )
        for line in summary(results):
            console.say(line)
        console.say(f"results: {out}    next: atelier report {out}")


def parse_options(words: list[str]) -> dict[str, str]:
    """Return OPTION=VALUE words as a dictionary; raise UsageError for a word without `=`."""
    from common.errors import UsageError

    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UsageError(f"`{word}` is not OPTION=VALUE.\n    Fix: write e.g. prompts=FILE.")
        options[key] = value
    return options


def _name(policy: str) -> str:
    """A folder name for a policy: the run's name for runs/NAME/policy."""
    path = Path(policy)
    return path.parent.name if path.name == "policy" and path.parent.name else path.name


def _why_none(clusters: Sequence[int]) -> str:
    """Why a mean over tasks has no interval; `clusters` are each task's independent prompts."""
    from common.bootstrap import MIN_CLUSTERS

    if sum(clusters) < MIN_CLUSTERS:
        return f"it takes {MIN_CLUSTERS} independent prompts"
    return "a task has a single prompt" if min(clusters) == 1 else "amounts are all alike"


def summary(results: dict[str, Any]) -> list[str]:
    """Return what results.json says as lines: the overall score, the tasks, what to make of it."""
    facts = results["suite"]
    headline = next(iter(facts["metrics"]))
    rows = [("overall", results["overall"][headline])]
    if len(results["tasks"]) > 1:  # a single one is the overall score
        rows += [(task, part["metrics"][headline]) for task, part in results["tasks"].items()]
    width = max(len(task) for task, _ in rows)
    lines = [f"{facts['title']}, {headline}, {results['images']} pictures"]
    if lacking := results.get("not_supported"):
        return [*lines, f"  not supported: {lacking}"]
    scored = [part["metrics"][headline] for part in results["tasks"].values()]
    sizes = [estimate["clusters"] for estimate in scored if estimate is not None]
    for task, estimate in rows:
        if estimate is None:
            lines.append(f"  {task:<{width}}  not scored")
            continue
        counts = sizes if task == "overall" else [estimate["clusters"]]
        interval = (
            f"[{estimate['low']:.3f}, {estimate['high']:.3f}]"
            if estimate["low"] is not None
            else f"no interval: {_why_none(counts)}"
        )
        lines.append(f"  {task:<{width}}  {estimate['mean']:.3f}  {interval}")
    if unscored := results["unscored"][headline]:
        lines.append(f"  {unscored} pictures could not be scored and are left out")
    if published := results.get("published"):
        told = ", ".join(f"{name} {value:.4g}" for name, value in published.items())
        lines.append(f"as published: {told}")
    why_not = facts["not_comparable"]
    lines.append(f"comparable with the leaderboard: {f'no, {why_not}' if why_not else 'yes'}")
    return lines
