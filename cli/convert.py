"""`atelier convert`: between a published BLIP3o-NEXT checkpoint and a policy folder."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Runs")
    def convert(
        checkpoint: Path = typer.Argument(
            ..., help="Published checkpoint folder, or with --to-upstream a converted policy."
        ),
        out: Path = typer.Option(..., help="Folder to write; it must not exist."),
        diffusion: str | None = typer.Option(
            None,
            metavar="DIR_OR_REPO",
            help="Folder or hub repository with the configs transformer, vae and scheduler.",
        ),
        image_tokenizer: Path | None = typer.Option(
            None, metavar="FILE", help="The published ta_tok.pth."
        ),
        to_upstream: bool = typer.Option(
            False, "--to-upstream", help="The way back: a policy becomes a published checkpoint."
        ),
    ) -> None:
        """Turn a published checkpoint into a policy folder, or a policy back into one."""
        from cli import console
        from cli.policy_folder import find_policy, read_parts
        from common.errors import UsageError

        if out.exists():
            raise UsageError(f"{out} exists already.\n    Fix: give --out another name.")
        if to_upstream:
            if diffusion or image_tokenizer:
                raise UsageError(
                    "--diffusion and --image-tokenizer belong to the way in.\n"
                    "    Fix: leave them out with --to-upstream."
                )
            policy = find_policy(str(checkpoint))
            from policy.convert import to_upstream as write

            count = write(policy, out)
            console.say(f"wrote {out}", style="bold green")
            console.pairs([("tensors", f"{count:,}")])
            return
        if diffusion is None or image_tokenizer is None:
            missing = "--diffusion" if diffusion is None else "--image-tokenizer"
            raise UsageError(
                f"{missing} is missing.\n    Fix: atelier convert CHECKPOINT --diffusion "
                "DIR_OR_REPO --image-tokenizer FILE --out POLICY"
            )
        with console.progress() as progress:
            progress.start("convert", None)
            from policy.convert import convert as write_policy

            config = write_policy(checkpoint, diffusion, image_tokenizer, out)
            progress.finish("convert")
        console.say(f"wrote {out}", style="bold green")
        parts = read_parts(out)
        rows = [(name, f"{part.parameters:,} parameters") for name, part in parts.items()]
        rows.append(("picture", f"{config.image_size} px, {config.num_tokens} image tokens"))
        if config.edit_template is not None:
            rows.append(("references", ", ".join(("image tokens", *config.routes))))
        console.pairs(rows)
        console.say(f'next: atelier sample {out} "a red circle"')
