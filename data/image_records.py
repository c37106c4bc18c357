"""Pictures to be scored, with the prompts they were made from: from a folder or a JSONL file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_IMAGE_KEYS = ("image", "file_name")


def image_records(source: Path, prompt: str | None = None) -> list[dict[str, Any]]:
    """Return records with `path` (Path), `image` (its name in reports), `prompt`, `prompt_id`, and
    whatever else was said about the picture.

    `source` is one of: a .jsonl file whose lines have `image` (or `file_name`) and `prompt`, with
    paths relative to it; a folder with such a file called metadata.jsonl; GenEval's layout
    (00000/metadata.jsonl, 00000/samples/*.png); a folder of pictures with the prompt of NAME.png
    in NAME.txt. `prompt` stands in where none is given. Raises DataError naming file and line.
    Pictures are not opened.
    """
    if _is_picture(source) and source.is_file():
        raise DataError(f"{source} is a picture.\n    Fix: give the folder that it lies in.")
    if source.is_file():
        records = list(_from_jsonl(source, prompt))
    elif (source / "metadata.jsonl").is_file():
        records = list(_from_jsonl(source / "metadata.jsonl", prompt))
    elif source.is_dir():
        records = list(_from_geneval(source)) or list(_from_folder(source, prompt))
    else:
        raise DataError(f"{source}: no such file or folder.\n    Fix: check the path.")
    if not records:
        raise DataError(
            f"{source}: no pictures.\n    Fix: give a folder with {', '.join(SUFFIXES)} files, or "
            "a .jsonl file."
        )
    return records


def _from_jsonl(file: Path, prompt: str | None) -> Iterator[dict[str, Any]]:
    # Not splitlines(): a JSON text may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        row = _row(line, where)
        name = next((row[key] for key in _IMAGE_KEYS if key in row), None)
        if not isinstance(name, str) or not name:
            raise DataError(f'{where}: no picture.\n    Fix: give its path under "image".')
        asked = row.get("prompt", prompt)
        if not isinstance(asked, str):
            raise DataError(f'{where}: no prompt.\n    Fix: write it under "prompt", or --prompt.')
        yield {"prompt_id": name, **row, "path": file.parent / name, "image": name, "prompt": asked}


def _from_geneval(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        metadata = _row(_text(file).strip(), str(file))
        if not isinstance(metadata.get("prompt"), str):
            raise DataError(f'{file}: no prompt.\n    Fix: write it under "prompt".')
        for picture in sorted(p for p in (file.parent / "samples").glob("*") if _is_picture(p)):
            yield {
                "path": picture,
                "image": str(picture.relative_to(folder)),
                "prompt": metadata["prompt"],
                "prompt_id": file.parent.name,
                "metadata": metadata,
            }


def _from_folder(folder: Path, prompt: str | None) -> Iterator[dict[str, Any]]:
    for picture in sorted(p for p in folder.iterdir() if _is_picture(p)):
        file = picture.with_suffix(".txt")
        asked = _text(file).strip() if file.is_file() else prompt
        if asked is None:
            raise DataError(
                f"{picture}: no prompt.\n    Fix: write it into {file.name}, or give --prompt for "
                "all pictures."
            )
        yield {"path": picture, "image": picture.name, "prompt": asked, "prompt_id": picture.name}


def _row(text: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}).\n    Fix: one object a line.") from error
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a surrogate pair ({error}), which no file can hold.\n    Fix: write "
            "the whole character."
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object.\n    Fix: one object a line.")
    return row


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}.\n    Fix: make it a UTF-8 text file.") from error


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
