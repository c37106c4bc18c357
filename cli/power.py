"""`atelier power`: how many prompts does a difference need?"""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from evals.power import Plan

DIFFERENCES = (0.01, 0.02, 0.03, 0.05, 0.1)


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Judging")
    def power(
        options: list[str] | None = typer.Argument(
            None, metavar="OPTION=VALUE", help="Options of the suite, such as prompts=FILE."
        ),
        suite: str = typer.Option("geneval-scenes", help="Benchmark suite."),
        seeds: int = typer.Option(4, min=1, max=1000, help="Pictures per prompt."),
        difference: float | None = typer.Option(
            None, min=0.0001, help="True difference to find. (default: a table of several)"
        ),
        pilot: tuple[Path, Path] | None = typer.Option(
            None, metavar="A B", help="Two result folders of the suite, to measure the spread on."
        ),
    ) -> None:
        """Say what a suite can find, and how many prompts a difference needs.

        Found: four times in five, by a two-sided test at the 5 % level, paired on prompt and seed.

        Without a pilot the spread is assumed, for scores of 0 or 1.
        """
        from cli import console
        from cli.eval import parse_options
        from evals.power import pilot_components, plan, task_sizes
        from evals.results import load_results

        measured, rates = None, True
        if pilot is not None:
            before, after = load_results(pilot[0]), load_results(pilot[1])
            measured = pilot_components(before, after)
            rates = next(iter(after.metrics.values())).kind == "rate"
        sizes = task_sizes(suite, parse_options(options or []))
        found = plan(sizes, seeds, measured, rates=rates)
        for line in lines(suite, found, [difference] if difference else DIFFERENCES):
            console.say(line)
        if measured is None:
            console.say("The spread is assumed. Measure it: atelier power --pilot A B")
        elif missing := sorted(set(found.tasks) - set(measured)):
            console.say(f"The pilot is too small for {', '.join(missing)}: assumed there.")


def lines(suite: str, found: "Plan", differences: "list[float] | tuple[float, ...]") -> list[str]:
    """Return the plan as lines of at most 80 columns: a row a task, a column a difference."""
    width = max(len(task) for task in [*found.tasks, "overall"])
    columns = "".join(f"{f'{d:g}':>9}" for d in differences)
    told = [
        f"{suite}: {found.prompts} independent prompts x {found.seeds} pictures",
        "",
        f"{'':<{width}}  {'has':>5}  {'finds':>6}   needs for a difference of",
        f"{'':<{width}}  {'':>5}  {'':>6}{columns}",
    ]
    rows = [("overall", found.prompts, found.detectable)]
    rows += [(name, task.prompts, task.detectable) for name, task in found.tasks.items()]
    for name, prompts, detectable in rows:
        needs = [
            found.prompts_needed(d) if name == "overall" else found.prompts_needed_in(name, d)
            for d in differences
        ]
        finds = "-" if detectable is None else f"{detectable:.3f}"
        cells = "".join(f"{'-' if n is None else f'{n:,}':>9}" for n in needs)
        told.append(f"{name:<{width}}  {prompts:>5}  {finds:>6}{cells}")
    return told
