"""Webdataset shards: tar files of samples, indexed once and then read by offset.

A sample is a run of tar members with one key, the name up to the first dot: `KEY.jpg` (or jpeg,
png, webp), `KEY.txt` and, for edits, `KEY.reference.jpg`. Sample p of a run is a function of the
run's seed and p alone. Processes and loader workers only divide the positions among them, and a
resumed run goes on at the next position, in the middle of an epoch too.
"""

import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.pictures import UnreadablePicture, decode_picture
from common.seeds import counter_seed
from data.pictures import Sample, centre_square, squashed

PICTURES = ("jpg", "jpeg", "png", "webp")
BLOCK_SHARDS = 16
"""Shards whose samples are mixed with one another: shuffled enough, and read from few files."""
TRIES = 100
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_SHARD, _IMAGE, _CAPTION, _REFERENCE, _COLUMNS = 0, 1, 3, 5, 7
_END_OF_TAR = 1024  # two blocks of zeros


@dataclass(frozen=True)
class Index:
    """Where the samples of some shards are."""

    paths: tuple[Path, ...]
    rows: np.ndarray
    """int64 [samples, 7]: shard, then offset and size of image, caption and reference."""
    faults: tuple[str, ...] = ()
    """What the shards lack: `shard: key: reason`."""


# --- finding and indexing -----------------------------------------------------------------------


def find_shards(pattern: str) -> list[Path]:
    """Return the shards that a pattern means, sorted; DataError names one that is missing.

    A pattern is a file, a folder (all `*.tar` in it), a glob, or has one range such as
    `{000..063}`, of which every file has to be there.
    """
    numbered = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if numbered:
        head, first, last, tail = numbered.groups()
        width = len(first)
        names = [f"{head}{n:0{width}}{tail}" for n in range(int(first), int(last) + 1)]
        paths = [Path(name).expanduser() for name in names]
    elif Path(pattern).expanduser().is_dir():
        paths = sorted(Path(pattern).expanduser().glob("*.tar"))
    elif any(letter in pattern for letter in "*?["):
        path = Path(pattern).expanduser()
        anchor = Path(path.anchor)
        paths = sorted(anchor.glob(str(path.relative_to(anchor))))
    else:
        paths = [Path(pattern).expanduser()]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} are missing).\n"
            "    Fix: correct data.source in the recipe, or bring the file back."
        )
    if not paths:
        raise DataError(
            f"{pattern}: no shard matches.\n    Fix: correct data.source; `atelier pack` makes one."
        )
    return [path.resolve() for path in paths]


def build_index(
    paths: Sequence[Path], references: bool = False, done: Callable[[], None] = lambda: None
) -> Index:
    """Read the tar headers of all shards; `done` is called after each.

    With `references`, a sample needs a reference picture too; without, none is read. Faults are
    collected, not raised; DataError is raised if there is not a single sample.
    """
    tables, faults = [], []
    for number, path in enumerate(paths):
        rows, wrong = _scan(path, references)
        if rows:
            tables.append(np.column_stack([np.full(len(rows), number), rows]).astype(np.int64))
        faults += [f"{path.name}: {text}" for text in wrong]
        done()
    if not tables:
        told = "".join(f"\n    {fault}" for fault in faults[:5])
        needs = "KEY.jpg, KEY.txt" + (" and KEY.reference.jpg" if references else "")
        raise DataError(
            f"{paths[0].parent}: no shard has a whole sample.{told}\n"
            f"    Fix: a sample is the members {needs}; `atelier pack` writes them so."
        )
    return Index(tuple(paths), np.concatenate(tables), tuple(faults))


def _scan(path: Path, references: bool) -> tuple[list[list[int]], list[str]]:
    """Return a shard's rows (without shard number) and faults."""
    rows: list[list[int]] = []
    faults: list[str] = []
    size, end, key = path.stat().st_size, 0, None
    members: dict[str, tuple[int, int]] = {}

    def close() -> None:
        lacking = [name for name in ("picture", "caption") if name not in members]
        lacking += ["reference"] if references and "reference" not in members else []
        if key is not None and lacking:
            faults.append(f"{key}: no {' and no '.join(lacking)}")
        elif key is not None:
            places = (members["picture"], members["caption"], members.get("reference", (0, 0)))
            rows.append([number for place in places for number in place])
        members.clear()

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                start, end = member.offset_data, member.offset_data + -(-member.size // 512) * 512
                name = _NAME.fullmatch(member.name)
                if not member.isfile() or name is None:
                    continue
                if start + member.size > size:
                    break
                if name[1] != key:
                    close()
                    key = name[1]
                role = _role(name[2].lower())
                if role and (references or role != "reference"):
                    members[role] = (start, member.size)
    except tarfile.ReadError as error:
        faults.append(f"{key or 'from the start'}: {error}")
    close()
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(_END_OF_TAR) != bytes(_END_OF_TAR):
            faults.append(f"{key or 'from the start'}: the shard ends early or is damaged here")
    return rows, faults


def _role(extension: str) -> str | None:
    if extension == "txt":
        return "caption"
    if extension in PICTURES:
        return "picture"
    middle, _, last = extension.rpartition(".")
    return "reference" if middle == "reference" and last in PICTURES else None


# --- order and reading --------------------------------------------------------------------------


class Shards:
    """An endless sequence of samples: epoch after epoch, each in its own order.

    In an epoch the shards are shuffled, and so are the samples of each `BLOCK_SHARDS` of them.
    Pictures are cut to their centre square; with `squashed_side`, samples have each of them
    squashed into a square of that side as well.
    """

    def __init__(
        self, index: Index, side: int, seed: int, squashed_side: int | None = None
    ) -> None:
        self.index = index
        self.side = side
        self.seed = seed
        self.squashed_side = squashed_side
        counts = np.bincount(index.rows[:, _SHARD], minlength=len(index.paths))
        self._counts = counts
        self._starts = np.concatenate([[0], counts.cumsum()])
        self._block = lru_cache(maxsize=2)(self._block_rows)
        self._ends = lru_cache(maxsize=2)(self._block_ends)

    def __reduce__(self) -> tuple[type["Shards"], tuple[object, ...]]:
        """Travel to a spawned process without the caches, which cannot."""
        return Shards, (self.index, self.side, self.seed, self.squashed_side)

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at a position; an unreadable one is replaced by the next.

        Raises DataError when a hundred in a row cannot be read.
        """
        skipped: list[str] = []
        for offset in range(TRIES):
            row = self.row(position + offset)
            try:
                sample = self._read(row)
            except UnreadablePicture as error:
                skipped.append(f"{self._name(row)}: {error}")
                continue
            return replace(sample, skipped=tuple(skipped))
        raise DataError(
            f"{TRIES} samples in a row cannot be read, such as {skipped[0]}.\n"
            "    Fix: check the shards with `tar -tvf`, or pack them again."
        )

    def row(self, position: int) -> int:
        """Return which row of the index stands at a position of the run."""
        epoch, place = divmod(position, len(self.index.rows))
        ends = self._ends(epoch)
        block = int(np.searchsorted(ends, place, side="right"))
        start = 0 if block == 0 else int(ends[block - 1])
        return int(self._block(epoch, block)[place - start])

    def _shard_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(counter_seed(self.seed, "shards", epoch))
        return rng.permutation(len(self.index.paths))

    def _block_ends(self, epoch: int) -> np.ndarray:
        """One past the last place of each block."""
        sizes = self._counts[self._shard_order(epoch)].cumsum()
        return np.append(sizes[BLOCK_SHARDS - 1 : -1 : BLOCK_SHARDS], sizes[-1])

    def _block_rows(self, epoch: int, block: int) -> np.ndarray:
        shards = self._shard_order(epoch)[block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS]
        rows = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        rng = np.random.default_rng(counter_seed(self.seed, "samples", epoch, block))
        return rng.permutation(rows)

    def _read(self, row: int) -> Sample:
        place = self.index.rows[row]
        try:
            caption = self._bytes(place, _CAPTION).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UnreadablePicture("the caption is not UTF-8") from error
        if not caption:
            raise UnreadablePicture("the caption is empty")
        image, whole = self._squares(place, _IMAGE)
        if not place[_REFERENCE + 1]:
            return Sample(image, caption, squashed=whole)
        reference, whole_reference = self._squares(place, _REFERENCE)
        return Sample(image, caption, reference, (), whole, whole_reference)

    def _squares(self, place: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray | None]:
        picture = decode_picture(self._bytes(place, column))
        whole = squashed(picture, self.squashed_side) if self.squashed_side else None
        return centre_square(picture, self.side), whole

    def _bytes(self, place: np.ndarray, column: int) -> bytes:
        offset, size = place[column], place[column + 1]
        return _mapped(self.index.paths[place[_SHARD]])[offset : offset + size].tobytes()

    def _name(self, row: int) -> str:
        """`shard: key`, read from the tar header before the picture."""
        path = self.index.paths[self.index.rows[row][_SHARD]]
        header = self.index.rows[row][_IMAGE] - 512
        name = _mapped(path)[header : header + 100].tobytes().rstrip(b"\0")
        return f"{path.name}: {name.decode('utf-8', 'replace').partition('.')[0]}"


@lru_cache(maxsize=4 * BLOCK_SHARDS)
def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint8, mode="r")
