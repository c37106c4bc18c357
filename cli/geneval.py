"""`atelier geneval`: pictures to the official GenEval script, and its verdicts back."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb with its two parts."""
    group = typer.Typer(
        no_args_is_help=True, help="Exchange pictures and verdicts with the official script."
    )
    app.add_typer(group, name="geneval", rich_help_panel="Judging")

    @group.command("export")
    def export(
        results: Path = typer.Argument(..., help="Result folder of `atelier eval`."),
        out: Path = typer.Argument(..., help="New folder for 00000/samples/0000.png and so on."),
    ) -> None:
        """Write an evaluation's pictures in the folder layout of evaluate_images.py."""
        from cli import console
        from evals.geneval_layout import export_geneval
        from evals.results import load_results

        number = export_geneval(load_results(results), out)
        console.say(f"wrote {number} pictures to {out}", style="bold green")
        console.say(f"next: python evaluation/evaluate_images.py {out} --outfile results.jsonl ...")

    @group.command("import")
    def import_(
        file: Path = typer.Argument(..., help="What evaluate_images.py wrote (--outfile)."),
        out: Path = typer.Option(..., help="New result folder."),
        images: Path | None = typer.Option(
            None, help="Folder with 00000, 00001, ... (default: where the file says)"
        ),
    ) -> None:
        """Make a result folder of the official script's verdicts, to report and compare."""
        from cli import console
        from cli.eval import summary
        from evals.geneval_layout import import_geneval

        for line in summary(import_geneval(file, out, images=images)):
            console.say(line)
        console.say(f"results: {out}    next: atelier report {out}")
