"""`atelier dpg`: pictures to the official DPG-Bench script."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb with its one part."""
    group = typer.Typer(
        no_args_is_help=True, help="Give pictures to the official DPG-Bench script."
    )
    app.add_typer(group, name="dpg", rich_help_panel="Judging")

    @group.callback()
    def dpg() -> None:
        """Give pictures to the official DPG-Bench script."""

    @group.command("export")
    def export(
        results: Path = typer.Argument(..., help="Result folder of `atelier eval`."),
        out: Path = typer.Argument(..., help="New folder for the sheets ITEM.png."),
    ) -> None:
        """Write each prompt's four pictures on one sheet, as compute_dpg_bench.py reads them."""
        from cli import console
        from evals.dpg_layout import export_dpg
        from evals.results import load_results

        number, side = export_dpg(load_results(results), out)
        console.say(f"wrote {number} sheets to {out}", style="bold green")
        console.say(
            f"next: python dpg_bench/compute_dpg_bench.py --image-root-path {out} "
            f"--resolution {side} --pic-num 4 --csv dpg_bench/dpg_bench.csv"
        )
