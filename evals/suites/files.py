"""Reading benchmark files that the user has on this machine: nothing is ever downloaded."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.prompts import training_records
from evals.suites.suite import Record

NO_CHECKSUM = "no published checksum is known, so the file is taken as it is"
_PROMPT = ("prompt", "prompts", "text")


def digest(files: Sequence[Path]) -> str:
    """Return the first 16 hex digits of the sha256 over the files, to be recorded with results."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(_bytes(file))
    return whole.hexdigest()[:16]


def read_json(file: Path) -> Any:
    """Return what a JSON file holds. Raises DataError naming a file that is missing or damaged."""
    try:
        return json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, f"it is not JSON ({error})") from error


def read_table(file: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV (or, by its ending, TSV) file by column.

    Raises DataError naming the file and a column of `needed` that it lacks.
    """
    separator = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(2**30)  # some benchmarks keep whole pictures in a cell
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=separator)
    for column in needed:
        if column not in (reader.fieldnames or ()):
            found = ", ".join(reader.fieldnames or ()) or "none"
            raise _unreadable(file, f"it has no column `{column}` (it has {found})")
    return list(reader)


def read_parquet(files: Sequence[Path], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of parquet files; pictures are {"bytes": ..., "path": ...}.

    Raises DataError naming the file that is damaged or lacks one of the columns.
    """
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += parquet.read_table(file, columns=list(columns)).to_pylist()
        except (pyarrow.ArrowException, KeyError) as error:
            raise _unreadable(file, str(error).splitlines()[0]) from error
        if rows and (missing := [name for name in columns if name not in rows[-1]]):
            raise _unreadable(file, f"it has no column `{missing[0]}`")
    return rows


def read_prompts(file: Path) -> tuple[Record, ...]:
    """Return prompt records of a list of prompts, all of one task named after the file.

    Understood: .jsonl as everywhere; .json with texts, or with objects that have `prompt`, perhaps
    `id`, and further columns, which are kept (`tag` or `metadata.tag` names another task); .csv and
    .tsv with a column Prompt, Prompts or text (DrawBench, PartiPrompts); any other file as one
    prompt a line. Raises DataError naming the file.
    """
    return tuple(
        {
            **more,
            "prompt": text,
            "prompt_id": f"{file.stem}-{number:05d}" if name is None else name,
            "cluster": text,  # the same prompt twice is one fact
            "metadata": {"tag": file.stem, **_metadata(more)},
        }
        for number, (name, text, more) in enumerate(_prompts(file, file.suffix))
    )


def _prompts(file: Path, ending: str) -> list[tuple[str | None, str, dict[str, Any]]]:
    """Return id, prompt and further columns of each entry, read as a file with this ending."""
    found: list[tuple[str | None, str, dict[str, Any]]]
    if ending == ".jsonl":
        found = [(r["prompt_id"], r["prompt"], {}) for r in training_records(str(file), "all")]
    elif ending == ".json":
        found = [_from_json(file, number, row) for number, row in enumerate(_list(file), start=1)]
    elif ending in (".csv", ".tsv"):
        found = [(None, _cell(file, row), {}) for row in read_table(file, ())]
    else:
        text = _text(file).strip()
        found = [(None, line, {}) for line in text.splitlines()]
        if _is_json(text) or _is_json(text.partition("\n")[0]):
            raise DataError(
                f"{file} holds JSON, not one prompt a line.\n    Fix: {_as_json_file(file)}."
            )
    prompts = [(name, text.strip(), more) for name, text, more in found if text.strip()]
    if not prompts:
        raise _unreadable(file, "it has no prompts")
    return prompts


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or list, or begins so many that Python does not read it."""
    try:
        return isinstance(json.loads(text), dict | list)
    except RecursionError:
        return True
    except ValueError:
        return False


def _as_json_file(file: Path) -> str:
    """Say under which name a file is read, or what it would have to hold."""
    for ending in (".json", ".jsonl"):
        try:
            _prompts(file, ending)
        except DataError:
            continue
        return f"call it {file.stem}{ending}"
    return (
        "write one prompt a line, or objects with `prompt`: one a line (.jsonl) or a list (.json)"
    )


def _from_json(file: Path, number: int, row: Any) -> tuple[str | None, str, dict[str, Any]]:
    """Return id, prompt and further columns of an entry."""
    entry = {"prompt": row} if isinstance(row, str) else row
    text = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{file}: entry {number} has no prompt.\n    Fix: add it, or drop the entry."
        )
    known = ("id", "prompt_id", "prompt", "text")
    more = {key: value for key, value in entry.items() if key not in known}
    name = entry.get("id", entry.get("prompt_id"))
    return None if name is None else str(name), text, more


def _metadata(more: Mapping[str, Any]) -> Mapping[str, Any]:
    given = more.get("metadata")
    return given if isinstance(given, dict) else more


def _list(file: Path) -> list[Any]:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise _unreadable(file, "it is not a list of prompts")
    return rows


def _cell(file: Path, row: dict[str, str]) -> str:
    for column, value in row.items():
        if column.lower() in _PROMPT:
            return value or ""
    raise _unreadable(file, f"none of its columns is one of {', '.join(_PROMPT)}")


def _text(file: Path) -> str:
    try:
        return _bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(file, "it is not UTF-8 text") from error


def _bytes(file: Path) -> bytes:
    if not file.is_file():
        raise DataError(f"{file}: no such file.\n    Fix: give the path of the benchmark's file.")
    return file.read_bytes()


def _unreadable(file: Path, why: str) -> DataError:
    return DataError(f"{file} cannot be read: {why}.\n    Fix: get the benchmark's own file again.")
