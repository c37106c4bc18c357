"""One process at a time in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UsageError
from common.processes import is_main_process

LOCK = ".lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be) for this process; UsageError if another process holds it.

    The lock is the operating system's: it is gone with the process that held it, however that
    ended. The empty file `.lock` stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is writing into {folder}.\n"
                "    Fix: wait for it (`atelier watch` shows a run), or give another --out."
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """`folder_lock` of a run of several processes: the first of them holds it for all."""
    if not is_main_process():
        yield
        return
    with folder_lock(folder):
        yield
