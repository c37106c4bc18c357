"""What the policy is: language model, image tokenizer, connector, diffusion head, autoencoder."""

from common.heavy import prepare_torchvision

prepare_torchvision()

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy.policy import Policy

__all__ = ["Policy", "base_path", "policy_path"]


def base_path() -> Path:
    """Return the folder of the tiny policy that ships with the package."""
    return Path(__file__).parent / "base"


def policy_path(text: str) -> Path:
    """Return the folder that a recipe's `policy.path` means: `base`, or a folder."""
    return base_path() if text == "base" else Path(text).expanduser()


def __getattr__(name: str) -> Any:
    # Importing the package must not import torch: `atelier plan` only asks for `base_path`.
    if name == "Policy":
        from policy.policy import Policy

        return Policy
    raise AttributeError(f"module 'policy' has no attribute {name!r}")
