"""Files and folders that appear whole or not at all, also when the power goes."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL_BELOW = 2**20
"""Free bytes under which a failed write is taken for a full disk."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step; parent folders are made."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace `path` by `data` in one step; after a crash it holds the old bytes or the new ones.

    Raises OSError (such as a full disk) with the old file untouched and no temporary file left.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextmanager
def atomic_dir(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an error.

    Everything in it is flushed to the disk before the rename. On an error the temporary folder is
    removed and `path` is as it was. With `replace`, an existing `path` is swapped for the new
    folder: a crash between the two renames leaves the old one beside it as `.NAME.old`, and the
    next call puts it back. Raises FileExistsError when `path` exists and `replace` is false, and
    the OSError of a full disk whatever the library that wrote into the folder made of it. One
    writer at a time: what a killed one left is removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.parent / f".{target.name}.old"
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists already")
    for left in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(left)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        with full_disk_named(target.parent):
            yield temporary
        _sync_tree(temporary)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise OSError (ENOSPC) for any error inside while the disk of `folder` is full.

    Libraries that write tensors report a full disk as errors of their own kind.
    """
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(folder).free >= _FULL_BELOW:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.tmp-{os.getpid()}"


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names: without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
