"""The hash that says which policy made a picture."""

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policy import Policy


def policy_hash(policy: "Policy") -> str:
    """Return 32 hex digits over the policy's settings and weights (name, type, shape and bytes).

    Two policies with the same hash paint the same pictures from the same seeds and settings.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(policy.settings(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()
