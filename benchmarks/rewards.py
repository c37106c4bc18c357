"""Images per second and memory of each reward, and how well the runner lets them overlap.

    python -m benchmarks.rewards [--images 256] [--repeats 3] [--workers 1] [--write]

All numbers are of one run on scene-world pictures. The contenders take turns, so that a slow spell
of the machine falls on all of them; each gets the median of its repeats. `judge` stands for a judge
behind a network: it waits, two batches at a time, and computes nothing. "Serial" is one reward
after the other, "together" is the runner with all of them. Overlap efficiency is the time of the
slowest reward alone divided by the time together: 1 means that the others cost nothing. Peak memory
is of a fresh process that loads and runs this one reward. --write puts the numbers into
benchmarks/results/rewards.json.
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
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.scene_painting import render_scene
from data.scenes import caption, sample_scene
from rewards import reward
from rewards.runner import RewardRunner, RewardSpec

RESULTS = Path(__file__).parent / "results" / "rewards.json"
JUDGE_SECONDS = 0.5
TASKS = dict.fromkeys(("single_object", "two_object", "counting", "position"), 1.0)
METADATA = {"tag": "single_object", "include": [{"class": "circle", "count": 1, "color": "red"}]}
SPECS = (
    RewardSpec("geneval"),
    RewardSpec("ocr", args={"box": [0, 0.3333, 1, 0.6667]}),
    RewardSpec("judge"),
)
_slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


@reward(name="judge")
async def judge(images):
    """Wait as for a judge that takes two requests at a time."""
    async with _slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(2)):
        await asyncio.sleep(JUDGE_SECONDS * len(images) / 32)
    return [0.5] * len(images)


def pictures(count: int) -> tuple[list, list[str], dict]:
    """Return scenes with their captions and the columns that the rewards ask for."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, TASKS, "train") for _ in range(count)]
    prompts = [f'{caption(scene)} and a sign that says "CAB"' for scene in scenes]
    return [render_scene(scene) for scene in scenes], prompts, {"metadata": [METADATA] * count}


def timed(runner: RewardRunner, job: tuple) -> float:
    """Return the seconds of one scoring; every picture has to get its scores."""
    begin = time.perf_counter()
    scored = runner.score(*job)
    seconds = time.perf_counter() - begin
    assert all(one.total is not None for one in scored), scored[0].reasons
    return seconds


def peak_memory(name: str) -> float:
    """Return the peak resident MB of a fresh process that scores 64 pictures with one reward."""
    code = f"from benchmarks.rewards import report_peak; report_peak({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def report_peak(name: str) -> None:
    """Print this process's peak memory after scoring; "" scores nothing."""
    job = pictures(64)
    for spec in SPECS:
        if spec.use == name:
            with RewardRunner([spec]) as runner:
                timed(runner, job)
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000)


def main() -> None:
    """Measure, print one table and, if asked, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes of each CPU reward")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    job = pictures(options.images)
    in_processes = [
        spec if spec.use == "judge" else replace(spec, workers=options.workers) for spec in SPECS
    ]
    contenders = {spec.use: [spec] for spec in SPECS}
    contenders["together, threads"] = list(SPECS)
    contenders |= {f"{spec.use}, processes": [spec] for spec in in_processes if spec.workers}
    contenders["together, processes"] = in_processes
    runners = {name: RewardRunner(specs) for name, specs in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(options.repeats + 1):
        for name, runner in runners.items():
            once = timed(runner, job)
            if turn:  # the first turn loads models and starts processes
                seconds[name].append(once)
    for runner in runners.values():
        runner.close()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    base = peak_memory("")
    report = {
        "images": options.images,
        "repeats": options.repeats,
        "workers": options.workers,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "rewards": {
            spec.use: {
                "images_per_s": round(options.images / median[spec.use], 1),
                "ms_per_image": round(1000 * median[spec.use] / options.images, 2),
                "rss_mb": round(peak_memory(spec.use) - base, 1),
            }
            for spec in SPECS
        },
        "process_rss_mb": round(base, 1),
        "overlap": {
            "threads": overlap(median, [s.use for s in SPECS], "together, threads"),
            "processes": overlap(
                median,
                [f"{s.use}, processes" if s.workers else s.use for s in in_processes],
                "together, processes",
            ),
        },
    }
    show(report)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


def overlap(median: dict[str, float], alone: list[str], together: str) -> dict[str, float]:
    """Return seconds alone and together, the speed-up over serial and the overlap efficiency."""
    times = [median[name] for name in alone]
    return {
        "serial_s": round(sum(times), 2),
        "slowest_s": round(max(times), 2),
        "together_s": round(median[together], 2),
        "speedup": round(sum(times) / median[together], 2),
        "efficiency": round(max(times) / median[together], 2),
    }


def show(report: dict) -> None:
    """Print the report as two tables."""
    print(f"{report['images']} images, {report['cores']} core(s), {report['repeats']} repeats")
    memory = f"MB above {report['process_rss_mb']}"
    print(f"{'reward':12}{'images/s':>10}{'ms/image':>10}{memory:>18}")
    for name, row in report["rewards"].items():
        print(f"{name:12}{row['images_per_s']:>10}{row['ms_per_image']:>10}{row['rss_mb']:>18}")
    heads = ("serial_s", "slowest_s", "together_s", "speedup", "efficiency")
    print(f"\n{'runner':12}" + "".join(f"{head:>12}" for head in heads))
    for name, row in report["overlap"].items():
        print(f"{name:12}" + "".join(f"{row[head]:>12}" for head in heads))


if __name__ == "__main__":
    main()
