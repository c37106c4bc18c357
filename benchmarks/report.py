"""Time, memory and page size of a report over many pictures.

    python -m benchmarks.report [PICTURES] [SIDE]

Writes two result folders of PICTURES / 2 pictures each (four a prompt, SIDE pixels wide, every
reason and box different, as a worst case for the page), builds the report of both and prints one
line. The pictures are copies of a few: reading and writing them costs what real ones cost.
"""

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from evals.report import build_report
from evals.results import IMAGES, PROMPTS, SAMPLES, THUMBNAILS, thumbnail, webp
from evals.run import write_results
from evals.suites import Metric

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SEEDS = 4


def main() -> None:
    """Build the folders and the report, and print what it took."""
    pictures = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    side = int(sys.argv[2]) if len(sys.argv) > 2 else 48
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("before", "after")]
        for number, folder in enumerate(folders):
            write_folder(folder, pictures // 2 // SEEDS, side, number)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, worked = time.perf_counter(), time.process_time()
        page = build_report(folders, Path(place) / "report")
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = page.stat().st_size
    print(
        f"pictures={pictures} side={side} seconds={seconds:.1f} cpu_seconds={cpu:.1f} "
        f"peak_mb={after / 1024:.0f} (before {before / 1024:.0f}) html_mb={size / 1e6:.2f}"
    )


def write_folder(folder: Path, prompts: int, side: int, number: int) -> None:
    """Write an evaluation as `evals.run.evaluate` would, without painting and scoring."""
    rng = np.random.default_rng(number)
    (folder / IMAGES).mkdir(parents=True)
    grid = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
    data, small = webp(image, {}), thumbnail(image)
    samples = []
    for prompt in range(prompts):
        task = TASKS[prompt % len(TASKS)]
        for index in range(SEEDS):
            path = f"{IMAGES}/{prompt}-{index}.webp"
            (folder / path).write_bytes(data)
            if small is not None:
                target = folder / THUMBNAILS / f"{prompt}-{index}.webp"
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(small)
            boxes = (rng.random((3, 4)) * side).round(1).tolist()
            objects = [
                {"label": f"thing {i}", "color": "red", "box": box} for i, box in enumerate(boxes)
            ]
            samples.append(
                {
                    "prompt_id": f"p{prompt}",
                    "index": index,
                    "prompt": f"a photo of thing {prompt} left of a red thing {prompt + 1}",
                    "task": task,
                    "cluster": f"p{prompt}",
                    "seed": prompt * SEEDS + index,
                    "image": path,
                    "bytes": len(data),
                    "values": {"strict": float(rng.random() < 0.4 + 0.2 * number)},
                    "reason": f"expected thing {prompt} left of {prompt + 1}, {boxes[0]}",
                    "details": {"objects": objects, "size": [side, side]},
                    "seconds": {"generate": 0.1, "score": 0.01},
                }
            )
    records = {
        s["prompt_id"]: {"prompt": s["prompt"], "prompt_id": s["prompt_id"]} for s in samples
    }
    (folder / PROMPTS).write_text("".join(json.dumps(r) + "\n" for r in records.values()))
    (folder / SAMPLES).write_text("".join(json.dumps(s) + "\n" for s in samples))
    facts = {
        "policy": {"name": folder.name, "hash": folder.name},
        "suite": {
            "name": "many",
            "title": "Many pictures",
            "version": 1,
            "not_comparable": "made for a measurement",
            "settings": {},
            "metrics": {"strict": asdict(Metric("Right"))},
        },
        "settings": {},
        "command": None,
    }
    write_results(folder, samples, facts)


if __name__ == "__main__":
    main()
