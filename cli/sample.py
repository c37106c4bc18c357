"""`atelier sample`: pictures from prompts, on one sheet."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

_MARGIN = 8
_CAPTION = 18
_SMALLEST_CELL = 144
"""Smaller pictures are enlarged by a whole factor, so that their pixels stay square."""


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Runs")
    def sample(
        policy: str = typer.Argument(
            ..., metavar="POLICY", help="base, a policy folder or a finished run."
        ),
        prompts: list[str] = typer.Argument(..., metavar="PROMPT", help="What to draw."),
        n: int = typer.Option(4, "--n", "-n", min=1, max=64, help="Pictures per prompt."),
        seed: int = typer.Option(0, min=0, help="The same seed draws the same pictures."),
        steps: int | None = typer.Option(
            None, min=1, max=1000, help="Steps of the diffusion head. [default: the policy's]"
        ),
        guidance: float | None = typer.Option(
            None, min=0, max=50, help="Classifier-free guidance. [default: the policy's]"
        ),
        temperature: float = typer.Option(1.0, min=0.01, max=10, help="Sampling temperature."),
        out: Path | None = typer.Option(
            None, help="PNG file to write. [default: sample.png, or the next free name]"
        ),
    ) -> None:
        """Draw pictures and put them on one sheet, a row per prompt."""
        from cli import console
        from cli.policy_folder import find_policy
        from common.errors import UsageError
        from common.seeds import counter_seed

        if out is not None and out.suffix.lower() != ".png":
            raise UsageError(f"{out} does not end with .png.\n    Fix: --out {out.stem}.png")
        folder = find_policy(policy)
        file = out or _free_name(Path("sample.png"))

        with console.progress() as progress:
            progress.start("load", None)
            from policy import Policy

            model = Policy.from_pretrained(folder)
            progress.finish("load")
            progress.start("sample", len(prompts) * n)
            rows: list[list[Image]] = []
            for prompt in prompts:
                rows.append(
                    model.generate(
                        [prompt] * n,
                        steps=steps,
                        guidance=guidance,
                        temperature=temperature,
                        # Of the prompt and not of its place, so that a prompt keeps its pictures.
                        seed=counter_seed(seed, "sample", prompt),
                    )
                )
                progress.advance("sample", n)
            progress.finish("sample")
        facts = {
            "policy": policy,
            "prompts": prompts,
            "n": n,
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "temperature": temperature,
        }
        write_sheet(rows, prompts, facts, file)
        console.say(f"wrote {file}", style="bold green")
        width, height = rows[0][0].size
        console.pairs([("pictures", f"{len(prompts)} x {n}, {width}x{height} px, seed {seed}")])


def write_sheet(
    rows: "Sequence[Sequence[Image]]", prompts: "Sequence[str]", facts: dict[str, Any], file: Path
) -> None:
    """Write a PNG with one captioned row of pictures for each prompt.

    `facts` go into the PNG's text field "atelier" as JSON, so that the pictures can be made again.
    """
    import io
    import json

    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    from common.atomic import write_bytes

    side = max(picture.width for row in rows for picture in row)
    factor = max(1, -(-_SMALLEST_CELL // side))
    cell = side * factor
    width = _MARGIN + max(len(row) for row in rows) * (cell + _MARGIN)
    height = _MARGIN + len(rows) * (_CAPTION + cell + _MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        top = _MARGIN + number * (_CAPTION + cell + _MARGIN)
        caption = " ".join(prompt.split())
        while draw.textlength(caption, font=font) > width - 2 * _MARGIN:
            caption = caption[: -max(2, len(caption) // 20)].rstrip("…") + "…"
        draw.text((_MARGIN, top), caption, fill="black", font=font)
        for column, picture in enumerate(row):
            size = (picture.width * factor, picture.height * factor)
            large = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
            sheet.paste(large, (_MARGIN + column * (cell + _MARGIN), top + _CAPTION))
    info = PngInfo()
    info.add_itxt("atelier", json.dumps(facts, ensure_ascii=False))
    data = io.BytesIO()
    sheet.save(data, format="PNG", pnginfo=info)
    write_bytes(file, data.getvalue())


def _free_name(file: Path) -> Path:
    number, candidate = 1, file
    while candidate.exists():
        number += 1
        candidate = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return candidate
