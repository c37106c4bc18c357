"""Scores that are kept: the same picture, prompt and reward are not judged twice."""

import hashlib
import json
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import RewardError
from rewards.contract import RewardFunction, Score
from rewards.source import file_hash, source_code

_LOG = logging.getLogger("atelier.rewards")
MAX_ROWS = 200_000
"""Oldest scores are dropped beyond this many: about 200 MB."""


class ScoreCache:
    """Scores by key, in a file or, without one, in memory. Safe to use from several threads.

    Raises RewardError if the file is something else. A file that fails later (locked, full) costs
    a warning and the scores it would have held or spared.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._warned = False
        try:
            self._data = _opened(file)
        except (OSError, sqlite3.DatabaseError) as error:
            raise RewardError(
                f"{file} is not a score cache ({error}). Fix: name another file."
            ) from error

    def get(self, keys: Iterable[str]) -> dict[str, Score]:
        """Return the scores that are known, by key."""
        found: dict[str, Score] = {}
        with self._lock:
            try:
                for key in set(keys):
                    row = self._data.execute(
                        "SELECT value, reason, details FROM scores WHERE key = ?", (key,)
                    ).fetchone()
                    if row is not None:
                        found[key] = Score(row[0], row[1], json.loads(row[2]))
            except (sqlite3.Error, ValueError, TypeError) as error:
                self._warn(error)
        return found

    def put(self, scores: Mapping[str, Score]) -> None:
        """Keep the scores that have a value; a failure is worth another try."""
        rows = [
            (key, score.value, score.reason, json.dumps(score.details))
            for key, score in scores.items()
            if score.value is not None
        ]
        with self._lock:
            try:
                self._insert(rows)
            except sqlite3.Error as error:
                self._warn(error)

    def close(self) -> None:
        """Close the file."""
        self._data.close()

    def _insert(self, rows: list[tuple[Any, ...]]) -> None:
        with self._data:
            self._data.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)
            self._data.execute(
                "DELETE FROM scores WHERE rowid <= (SELECT max(rowid) FROM scores) - ?", (MAX_ROWS,)
            )

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _LOG.warning("the score cache failed (%s); what it lacks is scored anew", error)
        self._warned = True


def _opened(file: Path | None) -> sqlite3.Connection:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    data = sqlite3.connect(file or ":memory:", check_same_thread=False)
    try:
        data.execute(
            "CREATE TABLE IF NOT EXISTS scores (key TEXT UNIQUE, value REAL, reason TEXT, "
            "details TEXT)"
        )
    except sqlite3.DatabaseError:
        data.close()
        raise
    return data


def reward_identity(function: RewardFunction) -> str:
    """Return a hash of a reward's name, arguments and code, so that an edit is noticed.

    Files that the arguments name count with what they hold. Empty for a function that is in no file
    (a notebook's): nothing tells when it is defined anew.
    """
    code = function.function
    source = source_code(code)
    args = _text(_told(function.args))
    return _hash(function.name, code.__qualname__, args, source) if source else ""


def image_digest(image: Image.Image) -> str:
    """Return a hash of a picture's size, mode and pixels, as colours: a palette counts."""
    pixels = image.convert("RGBA") if image.mode in ("P", "PA") else image
    return _hash(image.mode, str(image.size), pixels.tobytes())


def score_key(
    identity: str,
    digest: str,
    prompt: str,
    columns: Mapping[str, Any],
    paths: Collection[str] = (),
) -> str:
    """Return the key of one score; `columns` are the values that the reward gets to see.

    In the columns named in `paths`, files count with what they hold, not with their names.
    """
    told = {name: _told(x) if name in paths else x for name, x in columns.items()}
    return _hash(identity, digest, prompt, _text(told))


def _told(value: Any) -> Any:
    """Return a value with the hash of its content in place of each file that it names.

    A file that cannot be read is new every time.
    """
    if isinstance(value, Mapping):
        return {key: _told(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    if not isinstance(value, str) or not os.path.isfile(value):
        return value
    try:
        return f"sha256:{file_hash(Path(value))}"
    except OSError:
        return uuid.uuid4().hex


def _text(values: Mapping[str, Any]) -> str:
    """Return the same text for the same values; a new one each time if they have no such text."""
    try:
        return json.dumps(values, sort_keys=True, default=_content)
    except (TypeError, ValueError, RecursionError):  # keys that cannot be sorted; a loop
        return uuid.uuid4().hex


def _content(value: Any) -> str:
    """Return a hash of what an array, a picture or another object holds, not of how it is shown.

    What cannot be told by its content is new every time, so that its score is never reused.
    """
    if isinstance(value, Image.Image):
        return image_digest(value)
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):
        return _hash(str(value.dtype), str(value.shape), value.tobytes())
    return value.hex() if isinstance(value, bytes) else uuid.uuid4().hex


def _hash(*parts: str | bytes) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)  # so that no two splits are alike
    return total.hexdigest()
