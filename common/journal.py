"""A journal: one JSON object a line, appended as things happen (`metrics.jsonl`)."""

import json
import math
import os
from pathlib import Path
from typing import Any

from common.atomic import write_bytes
from common.errors import RunError


class Journal:
    """Append rows to a JSONL file. A torn last line of a killed run is cut off at the first write.

    Numbers that are not finite are written as null, because JSON has no NaN and a reader of
    another language would stop at it. Values with an `item()` method (NumPy and torch scalars)
    are written as that number.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row` and flush it to the disk."""
        text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
        with open(self.path, "ab") as file:
            file.write(text.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drop the rows whose "step" is greater than `step`.

        A resumed run writes them again; without this they would stand twice in the file.
        """
        rows = [row for row in read_journal(self.path) if row.get("step", 0) <= step]
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_bytes(self.path, "".join(lines).encode("utf-8"))


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a journal; a torn last line is left out, a missing file has no rows.

    Raises RunError naming file and line when any other line is not a JSON object.
    """
    file = Path(path)
    if not file.exists():
        return []
    *lines, _torn = file.read_bytes().split(b"\n")
    rows = []
    # A last line without its newline may be whole JSON by luck; it was not finished all the same.
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunError(
                f"{file}:{number}: this line is not a JSON object, so the journal is damaged. "
                "Fix: remove the line."
            )
        rows.append(row)
    return rows


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
