"""What decides a suite's scores, in a form that changes when it changes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards.source import file_hash, source_code


def option_content(value: str) -> str:
    """Return an option as it is, and that of a file or folder as the hash of its content.

    So the same file counts as the same wherever it lies, and another one under the same name does
    not.
    """
    path = Path(value).expanduser()
    if path.is_file():
        return f"sha256:{file_hash(path)}"
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = "".join(f"{file.relative_to(path)} {file_hash(file)}\n" for file in files)
        return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()[:16]}"
    return value


def source_hash(function: Callable[..., Any]) -> str:
    """Return a function's name with a hash of its code (see `rewards.source`)."""
    digest = hashlib.sha256(source_code(function)).hexdigest()[:16]
    return f"{function.__qualname__} of source {digest}"
