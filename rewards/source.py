"""What a function's results depend on: the code beside it, and what files hold."""

import hashlib
import inspect
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import RewardError

_SITE_PACKAGES = ("purelib", "platlib")


def source_code(function: Callable[..., Any]) -> bytes:
    """Return the file that a function is written in, with the `.py` files beside it.

    Those directly in the same folder count with their names, imported or not; the folder is that of
    the path as it was given, not of what a link points to. A module that lies in site-packages
    itself counts alone. Empty for a function without a file. Raises RewardError for a file that
    cannot be read.
    """
    source = inspect.getsourcefile(inspect.unwrap(function))
    if not source or not os.path.isfile(source):
        return b""
    file = Path(os.path.abspath(source))
    others = sorted(x for x in file.parent.glob("*.py") if x.is_file() and x != file)
    if file.parent.resolve() in {Path(sysconfig.get_path(x)).resolve() for x in _SITE_PACKAGES}:
        others = []  # there lies what is installed, not what belongs to it
    # No Python file holds a zero byte.
    named = [b"\0" + os.fsencode(x.name) + b"\0" + _read(x) for x in others]
    return _read(file) + b"".join(named)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RewardError(
            f"{file} cannot be read ({error.strerror}): the code beside a reward or suite tells "
            "whether its scores are still the same. Fix: make it readable, or move it elsewhere."
        ) from error


def file_hash(path: Path) -> str:
    """Return a hash of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
