"""Folders of pictures with captions, and shards made of them without our own writer."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from data.scene_edits import sample_edit
from data.scenes import TASKS, caption, render_scene, sample_scene


def write_scenes(folder: Path, count: int) -> Path:
    """Write scenes as PNG with captions beside them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        scene = sample_scene(rng, dict.fromkeys(TASKS, 1.0), "train")
        render_scene(scene).save(folder / f"scene{number:03d}.png")
        (folder / f"scene{number:03d}.txt").write_text(caption(scene))
    return folder


def write_edits(folder: Path, count: int) -> Path:
    """Write edit triples as PNG; every sixth instruction is longer than any context."""
    folder.mkdir(parents=True)
    for number in range(count):
        edit = sample_edit(np.random.default_rng(number), "train")
        render_scene(edit.after).save(folder / f"edit{number:03d}.png")
        render_scene(edit.before).save(folder / f"edit{number:03d}.reference.png")
        words = edit.instruction if number % 6 else "word " * 900
        (folder / f"edit{number:03d}.txt").write_text(words)
    return folder


def png(color: tuple[int, int, int] = (200, 30, 40), size: tuple[int, int] = (48, 48)) -> bytes:
    """A picture of one colour."""
    return encoded(Image.new("RGB", size, color))


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    """Return a picture's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` samples: the red of sample n is n, its caption `picture n`."""
    return [
        member
        for n in range(start, start + count)
        for member in ((f"k{n:04d}.png", png((n, 0, 0))), (f"k{n:04d}.txt", b"picture %d" % n))
    ]
