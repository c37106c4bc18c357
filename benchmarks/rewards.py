"""Images per second and memory of each reward, and how well the runner lets them overlap.

    python -m benchmarks.rewards [--images 256] [--repeats 3] [--write]

All numbers are of one run on scene-world pictures. The contenders take turns, so that a slow spell
of the machine falls on all of them; each gets the median of its repeats. "threads" and "processes"
are where the runner puts a reward. Peak memory is of a fresh process that loads and runs it on all
pictures.

Overlap is measured on two rewards of equal cost: OCR, which computes, and a judge behind a network,
which waits as long as OCR takes. Efficiency is the time of the slowest reward alone divided by the
time of both: one after the other they reach about 0.5, and 1 means that the second cost nothing.
--write puts the numbers into benchmarks/results/rewards.json.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.scene_painting import render_scene
from data.scenes import caption, sample_scene
from rewards import reward
from rewards.runner import RewardRunner, RewardSpec

RESULTS = Path(__file__).parent / "results" / "rewards.json"
WANTED_EFFICIENCY = 0.85
TASKS = dict.fromkeys(("single_object", "two_object", "counting", "position"), 1.0)
INCLUDE = [{"class": "circle", "count": 1, "color": "red"}]
METADATA = {"tag": "single_object", "include": INCLUDE, "add": INCLUDE}
LIMIT = 600.0
OCR = RewardSpec("ocr", args={"box": [0, 0.3333, 1, 0.6667]}, timeout_s=LIMIT)
SPECS = {
    "geneval": RewardSpec("geneval", timeout_s=LIMIT),
    "ocr": OCR,
    "consistency": RewardSpec("consistency", timeout_s=LIMIT),
}
Job = tuple[list, list[str], dict]
_turns: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}


@reward(name="judge")
async def judge(images, *, seconds):
    """Wait `seconds` for each picture, one batch at a time, and compute nothing."""
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        await asyncio.sleep(seconds * len(images))
    return [0.5] * len(images)


def pictures(count: int) -> Job:
    """Return scenes with their captions and the columns that the rewards ask for."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, TASKS, "train") for _ in range(count)]
    images = [render_scene(scene) for scene in scenes]
    prompts = [f'{caption(scene)} and a sign that says "CAB"' for scene in scenes]
    return images, prompts, {"metadata": [METADATA] * count, "source": images[::-1]}


def timed(runner: RewardRunner, job: Job) -> float:
    """Return the seconds of one scoring; every picture has to get its scores."""
    begin = time.perf_counter()
    scored = runner.score(*job)
    seconds = time.perf_counter() - begin
    assert all(one.total is not None for one in scored), scored[0].reasons
    return seconds


def medians(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each; the first turn loads models and starts processes."""
    turns = [{name: once() for name, once in contenders.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in contenders}


def peak_memory(name: str, images: int) -> float:
    """Return the peak resident MB of a fresh process that scores with one reward ("" = none)."""
    code = f"from benchmarks.rewards import report_peak; report_peak({name!r}, {images})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def report_peak(name: str, images: int) -> None:
    """Print this process's peak memory after scoring."""
    job = pictures(images)
    if name:
        with RewardRunner([SPECS[name]]) as runner:
            timed(runner, job)
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000)


def measure_each(job: Job, repeats: int) -> dict[str, dict[str, float]]:
    """Return images per second in a thread and in a process, and MB of memory, of each reward."""
    count = len(job[0])
    rows = {}
    base = peak_memory("", count)
    for name, spec in SPECS.items():
        with RewardRunner([spec]) as thread, RewardRunner([replace(spec, workers=1)]) as process:
            seconds = medians(
                {
                    "thread": lambda r=thread: timed(r, job),
                    "process": lambda r=process: timed(r, job),
                },
                repeats,
            )
        rows[name] = {
            "images_per_s_thread": round(count / seconds["thread"], 1),
            "images_per_s_process": round(count / seconds["process"], 1),
            "rss_mb": round(peak_memory(name, count) - base, 1),
        }
    return rows


def measure_overlap(job: Job, repeats: int, workers: int) -> dict[str, float]:
    """Return the times of OCR and of a judge as slow, alone and together, and the efficiencies."""
    ocr = replace(OCR, workers=workers)
    with RewardRunner([ocr]) as alone:
        cost = medians({"ocr": lambda: timed(alone, job)}, repeats)["ocr"]
        waiting = RewardSpec("judge", args={"seconds": cost / len(job[0])}, timeout_s=LIMIT)
        with RewardRunner([waiting]) as other, RewardRunner([ocr, waiting]) as both:
            seconds = medians(
                {
                    "ocr": lambda: timed(alone, job),
                    "judge": lambda: timed(other, job),
                    "together": lambda: timed(both, job),
                },
                repeats,
            )
    slowest = max(seconds["ocr"], seconds["judge"])
    serial = seconds["ocr"] + seconds["judge"]
    return {
        "ocr_s": round(seconds["ocr"], 2),
        "judge_s": round(seconds["judge"], 2),
        "together_s": round(seconds["together"], 2),
        "efficiency_serial": round(slowest / serial, 2),
        "efficiency": round(slowest / seconds["together"], 2),
    }


def main() -> None:
    """Measure, print two tables and, if asked, write them; 1 if the runner does not overlap."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    job = pictures(options.images)
    report = {
        "images": options.images,
        "repeats": options.repeats,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "rewards": measure_each(job, options.repeats),
        "overlap": {
            "threads": measure_overlap(job, options.repeats, workers=0),
            "processes": measure_overlap(job, options.repeats, workers=1),
        },
    }
    show(report)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    if any(row["efficiency"] < WANTED_EFFICIENCY for row in report["overlap"].values()):
        sys.exit(f"overlap efficiency is below {WANTED_EFFICIENCY}")


def show(report: dict) -> None:
    """Print the report as two tables."""
    print(f"{report['images']} images, {report['cores']} core(s), {report['repeats']} repeats")
    for key in ("rewards", "overlap"):
        rows = report[key]
        heads = list(next(iter(rows.values())))
        print(f"\n{key:22}" + "".join(f"{head:>22}" for head in heads))
        for name, row in rows.items():
            print(f"{name:22}" + "".join(f"{row[head]:>22}" for head in heads))


if __name__ == "__main__":
    main()
