"""`atelier pack`: a folder of pictures and captions becomes webdataset shards."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Recipes")
    def pack(
        folder: Path = typer.Argument(
            ..., metavar="PICTURES", help="Folder of pictures, each with its caption in a .txt."
        ),
        out: Path = typer.Argument(..., metavar="SHARDS", help="Folder to write; it must be new."),
        per_shard: int = typer.Option(10_000, min=1, help="Pictures in one shard."),
    ) -> None:
        """Pack pictures with captions, or edits, into webdataset shards to train on.

        A picture a/b.jpg has its caption in a/b.txt.

        If there is an a/b.reference.jpg, it is the picture before the edit,
        and the caption is the instruction.
        """
        from cli import console
        from common.errors import UsageError
        from data.packing import find_pictures
        from data.packing import pack as write

        if out.exists():
            raise UsageError(f"{out} exists already.\n    Fix: choose another folder.")
        with console.progress() as progress:
            progress.start("pack", len(find_pictures(folder)))
            packed = write(folder, out, per_shard, lambda: progress.advance("pack"))
            progress.finish("pack")
        for text in packed.left_out:
            console.say(f"left out {text}", style="yellow")
        shards = "1 shard" if len(packed.shards) == 1 else f"{len(packed.shards)} shards"
        console.say(f"packed {packed.samples} pictures into {shards} in {out}", style="bold green")
        console.say(f"next: atelier train RECIPE data.source={out}", style="dim")
