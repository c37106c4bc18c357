"""`atelier sample`: pictures from prompts, one by one and on one sheet."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

_MARGIN = 8
_CAPTION = 18
_SMALLEST_CELL = 144
"""Smaller pictures are enlarged by a whole factor, so that their pixels stay square."""
_LARGEST_CELL = 512
"""Larger pictures are reduced on the sheet; their own files keep every pixel."""
_BATCH = 8
"""Pictures drawn at the same time. A picture does not depend on it."""


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
        reference: Path | None = typer.Option(
            None, help="Picture to edit; the prompts are instructions then."
        ),
        steps: int | None = typer.Option(
            None, min=1, max=1000, help="Steps of the diffusion head. (default: the policy's)"
        ),
        guidance: float | None = typer.Option(
            None, min=0, max=50, help="Classifier-free guidance. (default: the policy's)"
        ),
        temperature: float = typer.Option(1.0, min=0.01, max=10, help="Sampling temperature."),
        top_k: int = typer.Option(0, min=0, help="Only the most probable image tokens; 0: all."),
        top_p: float = typer.Option(
            1.0, min=0.01, max=1, help="Only the most probable image tokens of this mass."
        ),
        device: Literal["cpu", "cuda"] = typer.Option("cpu", help="Where to compute."),
        dtype: Literal["float32", "bfloat16"] = typer.Option("float32", help="Type of weights."),
        out: Path | None = typer.Option(
            None, help="PNG file of the sheet. (default: sample.png, or the next free name)"
        ),
    ) -> None:
        """Draw pictures: one file each, and all of them on one sheet, a row per prompt.

        Every file says in its text field "atelier" how it was made.
        """
        from cli import console
        from cli.free_name import free_name
        from cli.policy_folder import find_policy
        from common.errors import UsageError
        from common.seeds import counter_seed

        if out is not None and out.suffix.lower() != ".png":
            raise UsageError(f"{out} does not end with .png.\n    Fix: --out {out.stem}.png")
        folder = find_policy(policy)
        file = out or free_name(Path("sample"), ".png")
        shown = None if reference is None else _read_reference(folder, reference)
        how: dict[str, Any] = {"steps": steps, "guidance": guidance, "temperature": temperature}
        how |= {"top_k": top_k, "top_p": top_p}

        with console.progress() as progress:
            progress.start("load", None)
            import torch

            from evals.policy_hash import policy_hash
            from policy import Policy

            model = Policy.from_pretrained(folder, dtype=getattr(torch, dtype), device=device)
            weights = policy_hash(model)
            pixels = None
            if shown is not None:
                from policy.pixels import reference_pixels

                pixels = reference_pixels(shown, model.config)
            progress.finish("load")
            progress.start("sample", len(prompts) * n)
            rows: list[list[Image]] = []
            for prompt in prompts:
                # Of the prompt and not of its place, so that a prompt keeps its pictures.
                own = counter_seed(seed, "sample", prompt)
                seeds = [counter_seed(own, "sample", index) for index in range(n)]
                row: list[Image] = []
                for start in range(0, n, _BATCH):
                    some = seeds[start : start + _BATCH]
                    row += model.generate(
                        [prompt] * len(some), references=pixels, seeds=some, **how
                    )
                    progress.advance("sample", len(some))
                rows.append(row)
            progress.finish("sample")
        facts = {
            "policy": policy,
            "policy_hash": weights,
            "seed": seed,
            "reference": None if reference is None else _identity(reference),
            **how,
            "device": device,
            "dtype": dtype,
        }
        write_sheet(rows, prompts, {**facts, "prompts": prompts, "n": n}, file, shown)
        singles = file.with_suffix("")
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), 1):
            for index, picture in enumerate(row):
                name = f"{number}-{index + 1}.png"
                _write_png(picture, {**facts, "prompt": prompt, "index": index}, singles / name)
        console.say(f"wrote {file}", style="bold green")
        width, height = rows[0][0].size
        console.pairs(
            [
                ("pictures", f"{len(prompts)} x {n}, {width}x{height} px, seed {seed}"),
                ("one by one", f"{singles}/"),
            ]
        )


def write_sheet(
    rows: "Sequence[Sequence[Image]]",
    prompts: Sequence[str],
    facts: dict[str, Any],
    file: Path,
    reference: "Image | None" = None,
) -> None:
    """Write a PNG with one captioned row of pictures for each prompt, the reference on its left.

    `facts` go into the PNG's text field "atelier" as JSON, so that the pictures can be made again.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    cell = _cell(max(picture.width for row in rows for picture in row))
    if reference is not None:
        square = ImageOps.fit(reference, (cell, cell), Image.Resampling.LANCZOS)
        rows = [[square, *row] for row in rows]
        prompts = [f"(reference) {prompt}" for prompt in prompts]
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
            how = Image.Resampling.NEAREST if picture.width <= cell else Image.Resampling.LANCZOS
            shown = picture.convert("RGB").resize((cell, cell), how)
            sheet.paste(shown, (_MARGIN + column * (cell + _MARGIN), top + _CAPTION))
    _write_png(sheet, facts, file)


def _cell(side: int) -> int:
    """Return the side on the sheet of pictures of `side` pixels."""
    return min(_LARGEST_CELL, side * max(1, -(-_SMALLEST_CELL // side)))


def _write_png(picture: "Image", facts: dict[str, Any], file: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    from common.atomic import write_bytes

    info = PngInfo()
    info.add_itxt("atelier", json.dumps(facts, ensure_ascii=False))
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=info)
    write_bytes(file, data.getvalue())


def _read_reference(folder: Path, reference: Path) -> "Image":
    """Read the picture to edit, before anything heavy is loaded."""
    from common.errors import UsageError
    from common.pictures import read_picture
    from policy.config import PolicyConfig

    if PolicyConfig.load(folder).edit_template is None:
        raise UsageError(
            f"the policy {folder} draws from text alone and takes no reference picture.\n"
            "    Fix: leave out --reference, or give a policy that was trained to edit."
        )
    return read_picture(reference)


def _identity(reference: Path) -> dict[str, str]:
    digest = hashlib.sha256(reference.read_bytes()).hexdigest()
    return {"name": reference.name, "sha256": digest}
