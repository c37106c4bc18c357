"""Find policy folders and read their sizes from safetensors headers; nothing here imports torch."""

import importlib.util
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import PolicyError, UsageError

_LARGEST_HEADER = 100_000_000
_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a policy, such as `ar`."""

    shapes: dict[str, tuple[int, ...]]
    """Tensor name -> shape."""
    stored_bytes: int

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def find_policy(text: str) -> Path:
    """Return the policy folder that `text` means: `base`, a policy folder or a run folder."""
    if text == "base":
        spec = importlib.util.find_spec("policy")
        places = list(spec.submodule_search_locations or ()) if spec else []
        folder = Path(places[0]) / "base" if places else Path("base")
        if not (folder / "policy.json").is_file():
            raise PolicyError(
                f"the base policy is missing: there is no {folder}/policy.json.\n"
                "    Fix: build it with `make base`, or install the package again."
            )
        return folder
    folder = Path(text).expanduser()
    for place in (folder, folder / "policy"):
        if (place / "policy.json").is_file():
            return place
    what = "holds no policy.json" if folder.is_dir() else "is not a folder"
    raise UsageError(
        f"no policy at {text}: it {what}.\n"
        "    Fix: give `base`, a policy folder, or a run folder that is finished."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of a policy folder; raise PolicyError if it is not there or broken."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolicyError(f"{file} is missing.\n    Fix: copy the policy folder again.") from None
    except ValueError as error:
        message = f"{file} is not JSON ({error}).\n    Fix: copy the policy folder again."
        raise PolicyError(message) from None
    if not isinstance(value, dict):
        raise PolicyError(f"{file} is not a JSON object.\n    Fix: copy the policy folder again.")
    return value


def read_parts(folder: Path) -> dict[str, Part]:
    """Return the parts of a policy that have weights, read from their safetensors headers.

    `upstream` is none of them: it keeps what only the published code looks at.
    """
    parts = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if place.name == "upstream":
            continue
        files = sorted(place.glob("*.safetensors"))
        if files:
            shapes: dict[str, tuple[int, ...]] = {}
            stored = 0
            for file in files:
                for name, entry in _header(file).items():
                    shapes[name] = tuple(entry["shape"])
                    stored += math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 4)
            parts[place.name] = Part(shapes, stored)
    return parts


def _header(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = stream.read(size) if 0 < size <= _LARGEST_HEADER else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        if all(len(entry["shape"]) >= 0 and entry["dtype"] for entry in header.values()):
            return dict(header)
    except (ValueError, AttributeError, TypeError, KeyError):
        pass  # whatever was broken, the message is the same
    raise PolicyError(f"{file} is damaged: its header cannot be read.\n    Fix: copy it again.")
