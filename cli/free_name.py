"""A name that nothing has yet."""

from pathlib import Path


def free_name(path: Path, ending: str = "") -> Path:
    """Return PATH with `ending`, or PATH-2, PATH-3 and so on, where neither it nor PATH exists."""
    number, candidate = 1, path
    while candidate.exists() or candidate.with_name(candidate.name + ending).exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate.with_name(candidate.name + ending)
