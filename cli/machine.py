"""What this machine has: memory and GPU. Nothing here imports torch."""

import os
import shutil
import subprocess
from pathlib import Path


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its control group's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def gpus() -> list[tuple[str, int]] | None:
    """Return (name, bytes) of every GPU the driver reports; None where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    found = []
    for line in result.stdout.splitlines() if result.returncode == 0 else []:
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            found.append((name.strip(), int(mebibytes) * 2**20))
    return found
