"""`atelier score`: what rewards say about pictures that exist already."""

import logging
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from evals.score_images import RewardSummary
    from rewards.spec import RewardSpec

_MOST_REASONS = 3


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Judging")
    def score(
        source: Path = typer.Argument(
            ..., metavar="SOURCE", help="Folder of pictures, or a .jsonl file with their prompts."
        ),
        reward: list[str] | None = typer.Option(
            None, "--reward", "-r", help="Name or file.py:function; may be repeated."
        ),
        arg: list[str] | None = typer.Option(
            None, metavar="REWARD.KEY=VALUE", help="An argument of a reward; may be repeated."
        ),
        recipe: str | None = typer.Option(
            None, help="Take the rewards of this recipe, with weights and gates."
        ),
        prompt: str | None = typer.Option(None, help="Prompt of the pictures that have none."),
        out: Path | None = typer.Option(
            None, help="Folder for scores.jsonl and gallery.html; by default a new one."
        ),
        cache: Path | None = typer.Option(
            None, help="File that keeps scores: equal pictures are not judged again."
        ),
    ) -> None:
        """Score pictures with any rewards: a table, a JSONL file and a gallery."""
        from cli import console
        from common.errors import RewardError, UsageError

        if bool(reward) == bool(recipe):
            raise UsageError("which rewards?\n    Fix: --reward NAME, or --recipe RECIPE")
        specs = _of_recipe(recipe) if recipe else _named(reward or [], arg or [])
        folder = _folder(out)
        from data.image_records import image_records
        from evals.score_gallery import write_gallery
        from evals.score_images import score_images
        from rewards.cache import ScoreCache
        from rewards.runner import RewardRunner

        # Every reason is shown below; the warnings of a training run would be the same again.
        logging.getLogger("atelier.rewards").addHandler(logging.NullHandler())
        records = image_records(source, prompt)
        kept = ScoreCache(cache) if cache else None
        beside = source if source.is_dir() else source.parent
        with (
            console.progress() as progress,
            RewardRunner(specs, folder=beside, cache=kept) as runner,
        ):
            runner.check_records(records)
            folder.mkdir(parents=True, exist_ok=True)
            rows, summaries = score_images(records, runner, folder / "scores.jsonl", progress)
            progress.start("gallery", None)
            command = "atelier " + shlex.join(sys.argv[1:])
            title = f"{len(rows)} pictures of {source}"
            page = folder / "gallery.html"
            write_gallery(rows, summaries, page, title=title, command=command)
            progress.finish("gallery")
        refusals = Counter(row.refusal for row in rows if row.refusal)
        _show(list(summaries.values()), len(rows), refusals)
        console.pairs([("gallery", str(page)), ("rows", str(folder / "scores.jsonl"))])
        if not any(summary.values for summary in summaries.values()):
            raise RewardError("no picture could be scored; the reasons stand above.")


def _of_recipe(name: str) -> "list[RewardSpec]":
    from common.errors import UsageError
    from recipes import load_recipe
    from recipes.locate import located
    from recipes.schema_grpo import GrpoRecipe
    from rewards.spec import spec_from

    loaded = load_recipe(name)
    if not isinstance(loaded.recipe, GrpoRecipe):
        raise UsageError(f"{name} has no rewards.\n    Fix: name a grpo recipe")
    functions = located(loaded.recipe, loaded.files).rewards.functions
    return [spec_from(function.model_dump()) for function in functions]


def _named(uses: list[str], arguments: list[str]) -> "list[RewardSpec]":
    from cli import reward_arguments
    from common.errors import UsageError
    from rewards.spec import RewardSpec

    names = {use.rpartition(":")[2]: use for use in uses}
    if len(names) < len(uses):
        raise UsageError(
            "two of the rewards have the same name, and results are told apart by it.\n"
            "    Fix: give each once, or rename a function."
        )
    args = reward_arguments.parse(arguments, prefixed=list(names))
    return [RewardSpec(use, args=args.get(name, {})) for name, use in names.items()]


def _folder(out: Path | None) -> Path:
    """Return the folder to write to; an earlier result is never written over."""
    from cli.free_name import free_name
    from common.errors import UsageError

    free = free_name(Path("scores"))
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already.\n    Fix: --out {free}")
    return out or free


def _show(summaries: "list[RewardSummary]", count: int, refusals: "Counter[str]") -> None:
    """Print a line for each reward, then why pictures were refused or not scored."""
    from cli import console

    width = max(6, *(len(summary.name) for summary in summaries))
    heads = ("mean", "sd", "min", "max", "scored", "ms/image")
    console.say("reward".ljust(width) + "".join(head.rjust(10) for head in heads), style="bold")
    for summary in summaries:
        values = summary.values
        numbers = [summary.mean, summary.spread, min(values), max(values)] if values else []
        cells = [f"{number:.3f}" for number in numbers] or ["-"] * 4
        cells += [f"{len(values)}/{count}", f"{1000 * summary.seconds / count:.1f}"]
        console.say(summary.name.ljust(width) + "".join(cell.rjust(10) for cell in cells))
    for reason, times in _common(refusals):
        console.say(f"{times} refused: {reason}", style="yellow")
    for summary in summaries:
        for note in sorted(summary.notes):
            console.say(f"{summary.name}: not comparable with published scores; {note}", "dim")
        for reason, times in _common(summary.failures):
            console.say(f"{summary.name}: {times} not scored: {reason}", style="yellow")


def _common(reasons: "Counter[str]") -> Iterator[tuple[str, int]]:
    """Yield the commonest reasons, each as one line, with how often they occur."""
    for reason, times in reasons.most_common(_MOST_REASONS):
        yield " ".join(reason.split()), times
    if len(reasons) > _MOST_REASONS:
        rest = sum(reasons.values()) - sum(n for _, n in reasons.most_common(_MOST_REASONS))
        yield "other reasons, see the gallery", rest
