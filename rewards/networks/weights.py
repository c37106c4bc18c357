"""Finding published weights, on this machine or on the Hugging Face hub, and reading them safely.

Everywhere a reward takes `weights`, it is a path on this machine, or a name on the hub, with
`revision` (a commit, tag or branch) beside it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.errors import RewardError


def find_file(weights: str, revision: str | None, what: str) -> Path:
    """Return a local file for `weights`: a path, or "owner/repository/file" on the hub.

    `what` names the network in the error: RewardError if there is no such file.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    owner, _, rest = weights.partition("/")
    repository, _, file = rest.partition("/")
    if path.is_absolute() or not file or path.is_dir():
        raise RewardError(
            f"{what}: no file {weights}. Fix: give the path of its weights, or "
            "`owner/repository/file` for the Hugging Face hub."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision))
    except (OSError, ValueError) as error:
        raise _not_found(what, weights, error) from error


def from_pretrained(loader: Any, weights: str, revision: str | None, what: str) -> Any:
    """Return `loader.from_pretrained(...)` for a folder or a hub repository of transformers' form.

    Models are float32. Raises RewardError, naming the network, if it cannot be found or read, or
    if tensors are missing: transformers itself would go on with random ones.
    """
    path = Path(weights).expanduser()
    place = str(path) if path.exists() else weights
    is_model = hasattr(loader, "base_model_prefix") or hasattr(loader, "_model_mapping")
    try:
        if not is_model:
            return loader.from_pretrained(place, revision=revision)
        # Not the format of the file: transformers would make it torch's default while it loads,
        # under the feet of the rewards that compute at that moment.
        model, info = loader.from_pretrained(
            place, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _not_found(what, weights, error) from error
    lacking = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if lacking:
        raise RewardError(
            f"{what}: {weights} has no usable tensor `{lacking[0]}` ({len(lacking)} in all). Fix: "
            "give weights of this architecture."
        )
    return model.eval()


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors, .pt, .pth or .bin file; nothing in it is executed.

    Raises RewardError if the file is damaged or holds more than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors each have errors of their own
        raise RewardError(
            f"{what}: {path} cannot be read as weights: {_short(error)}. Fix: download it again, "
            "or save its tensors as .safetensors."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise RewardError(f"{what}: {path} holds no table of tensors. Fix: give its weights file.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def fill(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path | str, what: str
) -> None:
    """Load every tensor of `state` into `module`; RewardError names one that does not fit."""
    own = module.state_dict()
    wrong = (
        [f"`{name}` is missing" for name in own if name not in state]
        + [f"`{name}` is not known" for name in state if name not in own]
        + [
            f"`{name}` has the shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and own[name].shape != value.shape
        ]
    )
    if wrong:
        raise RewardError(
            f"{what}: {path} does not fit: {wrong[0]} ({len(wrong)} such tensors). Fix: give the "
            "weights of this architecture."
        )
    module.load_state_dict(state)
    module.eval()


def does_not_fit(what: str, path: Path | str, error: Exception) -> RewardError:
    """Return the error for weights that a library could not load into a network."""
    return RewardError(
        f"{what}: {path} cannot be loaded: {_short(error)}. Fix: give the weights of this "
        "architecture, downloaded in full."
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_found(what: str, weights: str, error: Exception) -> RewardError:
    return RewardError(
        f"{what}: its weights are not at {weights}: {_short(error)}. Fix: give a path on this "
        "machine, or a name and `revision` on the Hugging Face hub while it can be reached."
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
