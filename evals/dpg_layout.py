"""To the official DPG-Bench script: four pictures of a prompt on one sheet, named after it.

Layout (TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py --pic-num 4`): DIR/ITEM.png, pictures
1 and 2 above 3 and 4, each as wide as --resolution.
"""

from pathlib import Path

from PIL import Image

from common.errors import RunError
from evals.results import ResultFolder, Sample
from evals.suites.dpg_bench import PICTURES


def export_dpg(results: ResultFolder, out: Path) -> tuple[int, int]:
    """Write one sheet for each prompt of an evaluation; return their number and the resolution.

    Raises RunError if `out` is not empty, the suite is another one, or a prompt has not four
    square pictures of one size.
    """
    if results.suite != "dpg-bench":
        raise RunError(
            f"{results.path} is an evaluation of `{results.suite}`.\n"
            "    Fix: export one of `dpg-bench`."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty.\n    Fix: give a new or an empty folder.")
    prompts: dict[str, list[Sample]] = {}
    for sample in sorted(results.samples, key=lambda sample: sample["index"]):
        prompts.setdefault(sample["prompt_id"], []).append(sample)
    out.mkdir(parents=True, exist_ok=True)
    side = 0
    for name, samples in prompts.items():
        pictures = [_read(results.path / sample["image"]) for sample in samples]
        side = side or pictures[0].width
        if len(pictures) != PICTURES or any(x.size != (side, side) for x in pictures):
            raise RunError(
                f"{results.path}: prompt {name} has not {PICTURES} pictures of {side} x {side}.\n"
                f"    Fix: evaluate with --seeds {PICTURES}."
            )
        sheet = Image.new("RGB", (2 * side, 2 * side))
        for index, picture in enumerate(pictures):
            sheet.paste(picture, (side * (index % 2), side * (index // 2)))
        sheet.save(out / f"{name}.png")
    return len(prompts), side


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
