"""A policy folder on the Hugging Face hub, or on any server that speaks its protocol."""

from pathlib import Path

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
    the hub's). The token is the one that `hf auth login` stored or HF_TOKEN holds. Raises
    PolicyError saying what the server refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = HfApi(endpoint=endpoint)
    try:
        place = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            allow_patterns=list(CONTENT),
            commit_message=message,
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        told = str(error).strip().splitlines()
        raise PolicyError(
            f"{repository} was not written: {told[0] if told else type(error).__name__}\n"
            "    Fix: check name, address and token (`hf auth login`, or HF_TOKEN)."
        ) from error
    return str(place)
