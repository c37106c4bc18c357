"""Pack a folder of pictures and captions into webdataset shards."""

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common.atomic import atomic_dir
from common.errors import DataError
from common.pictures import UnreadablePicture, decode_picture
from data.shards import PICTURES


@dataclass(frozen=True)
class Packed:
    """What was written, and what was left out with the reason: `file: reason`."""

    shards: tuple[Path, ...]
    samples: int
    left_out: tuple[str, ...]


def pack(
    folder: Path,
    out: Path,
    per_shard: int = 10_000,
    done: Callable[[], None] = lambda: None,
) -> Packed:
    """Write every captioned picture below `folder` into `out/NAME-000000.tar` and so on.

    A picture `a/b.jpg` has its caption in `a/b.txt` and, for edits, the picture before the edit in
    `a/b.reference.jpg`. Files are stored byte for byte; the same folder gives the same shards. A
    picture that cannot be read or has no caption is left out and reported. `out` must be new.
    Raises DataError if nothing can be packed or two files would have one key.
    """
    pictures = find_pictures(folder)
    if not pictures:
        raise DataError(
            f"{folder}: there are no pictures.\n    Fix: put .jpg, .png or .webp files into it."
        )
    left_out: list[str] = []
    shards: list[Path] = []
    count = 0
    keys: dict[str, Path] = {}
    files = _Files()
    with atomic_dir(out) as staged, ExitStack() as current:
        for path in pictures:
            done()
            try:
                members = list(_members(path, files))
            except UnreadablePicture as error:
                left_out.append(f"{path}: {error}")
                continue
            key = path.relative_to(folder).with_suffix("").as_posix().replace(".", "_")
            if key in keys:
                raise DataError(
                    f"{path} and {keys[key]} would have the same key {key}.\n"
                    "    Fix: rename one of them."
                )
            keys[key] = path
            if count % per_shard == 0:
                current.close()
                name = f"{folder.resolve().name}-{len(shards):06d}.tar"
                shards.append(out / name)
                tar = current.enter_context(tarfile.open(staged / name, "w"))
            for extension, data in members:
                # Without times and owners, so that packing again gives the same bytes.
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            count += 1
        if not count:
            raise DataError(
                f"{folder}: no picture can be packed, such as {left_out[0]}.\n"
                "    Fix: write each picture's caption into a .txt file beside it."
            )
    return Packed(tuple(shards), count, tuple(left_out))


def find_pictures(folder: Path) -> list[Path]:
    """Return the pictures below `folder` in order, references left out."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.\n    Fix: give the folder of the pictures.")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower().lstrip(".") in PICTURES
        and not path.stem.lower().endswith(".reference")
    )


def _members(path: Path, files: "_Files") -> Iterator[tuple[str, bytes]]:
    """Yield (extension, bytes) of a sample; raise UnreadablePicture if it is not whole."""
    try:
        data = path.read_bytes()
    except OSError as error:  # a folder with such a name, a dead link, no permission
        raise UnreadablePicture(error.strerror or str(error)) from error
    decode_picture(data)
    caption = files.beside(path, "txt")
    if caption is None:
        raise UnreadablePicture(f"there is no {path.stem}.txt beside it")
    text = caption.read_bytes()
    try:
        empty = not text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UnreadablePicture(f"{caption.name} is not UTF-8") from error
    if empty:
        raise UnreadablePicture(f"{caption.name} is empty")
    yield path.suffix.lower().lstrip("."), data
    yield "txt", text
    for extension in PICTURES:
        reference = files.beside(path, f"reference.{extension}")
        if reference is not None:
            data = reference.read_bytes()
            decode_picture(data)
            yield f"reference.{extension}", data
            return


class _Files:
    """The files of one folder after another, found by name with the ending in any case."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._names: dict[str, list[Path]] = {}

    def beside(self, picture: Path, ending: str) -> Path | None:
        """Return the file `STEM.ending` beside STEM.jpg."""
        if picture.parent != self._folder:
            self._folder, self._names = picture.parent, {}
            for file in sorted(picture.parent.iterdir()):
                self._names.setdefault(file.name.lower(), []).append(file)
        named = self._names.get(f"{picture.stem}.{ending}".lower(), [])
        own = (file for file in named if file.name.startswith(f"{picture.stem}."))
        return next((file for file in own if file.is_file()), None)
