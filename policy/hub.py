"""A policy folder on the Hugging Face hub, or on any server that speaks its protocol."""

import shutil
from pathlib import Path

from common.atomic import atomic_dir
from common.errors import PolicyError

CONTENT = (
    "README.md", "policy.json", "ar/*", "tokenizer/*", "image_tokenizer/*", "connector/*",
    "reference_connector/*", "diffusion/*", "vae/*", "scheduler/*", "upstream/*",
)  # fmt: skip
"""What is sent: the parts of a policy and its card, whatever else lies in the folder."""


def push(
    folder: Path,
    repository: str,
    *,
    public: bool = False,
    endpoint: str | None = None,
    message: str = "Policy and card",
) -> str:
    """Send the folder to `repository` ("owner/name"), made if need be, and return its address.

    A new repository is private unless `public`. `endpoint` is the address of the server (default:
    the hub's), or an existing folder in which owner/name is made, or replaced if it holds another
    policy and nothing else. The token is that of `hf auth login`, or HF_TOKEN. Raises PolicyError
    saying what was refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,  # a refusal, and no connection at all
        LocalTokenNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    hub = HfApi(endpoint=endpoint)
    try:
        validate_repo_id(repository)
        if endpoint is not None and "://" not in endpoint:
            return str(_copied(folder, Path(endpoint).expanduser(), repository))
        place = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            allow_patterns=list(CONTENT),
            commit_message=message,
        )
    except (HTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        told = str(error).strip().splitlines()
        raise PolicyError(
            f"{repository} was not written: {told[0] if told else type(error).__name__}\n"
            "    Fix: check name, address and token (`hf auth login`, or HF_TOKEN)."
        ) from error
    return str(place)


def _copied(folder: Path, hub: Path, repository: str) -> Path:
    target = hub / repository
    if not hub.is_dir():
        raise PolicyError(
            f"{hub} is not a folder.\n    Fix: make it first, or give the https:// of a server."
        )
    if target.resolve() == folder.resolve():
        raise PolicyError(f"{target} is what is to be pushed.\n    Fix: give another OWNER/NAME.")
    if target.exists():
        ours = {file for pattern in CONTENT for file in target.glob(pattern)}
        others = {file for file in target.rglob("*") if not file.is_dir()} - ours
        if others or not (target / "policy.json").is_file():
            what = min(others, default="no policy.json")
            raise PolicyError(
                f"{target} holds something else ({what}).\n    Fix: give another OWNER/NAME."
            )
    with atomic_dir(target, replace=True) as staged:
        for file in (file for pattern in CONTENT for file in folder.glob(pattern)):
            (staged / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staged / file.relative_to(folder))
    return target
