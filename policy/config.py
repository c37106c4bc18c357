"""What `policy.json` says: sizes, token ids, templates and defaults of a policy folder."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import PolicyError

FORMAT = 1


@dataclass(frozen=True)
class PolicyConfig:
    """Facts every part of a policy needs; ids come from here, never from assumptions."""

    image_size: int
    """Side of the rendered picture, in pixels."""
    tokenizer_image_size: int
    """Side of the picture the image tokenizer sees, in pixels."""
    grid: int
    """Image tokens per side; a picture is `grid * grid` tokens in raster order."""
    latent_channels: int
    latent_size: int
    """Shape of the diffusion latents: [latent_channels, latent_size, latent_size]."""
    im_start_id: int
    im_end_id: int
    scale_start_id: int
    num_scale_tokens: int
    image_start_id: int
    num_image_tokens: int
    pad_id: int
    eos_id: int
    prompt_template: str
    """Chat text around `{prompt}`, up to the assistant's turn; `<im_start><S0>` is appended."""
    steps: int
    """Default number of Euler steps of `render`."""
    guidance: float
    """Default classifier-free guidance scale of `render`; 1 leaves the null branch out."""
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def num_tokens(self) -> int:
        """Image tokens per picture, N."""
        return self.grid * self.grid

    def save(self, folder: Path) -> None:
        """Write `policy.json` into the folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / "policy.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "PolicyConfig":
        """Read `policy.json`; raise `PolicyError` if it is missing or not understood."""
        path = folder / "policy.json"
        if not path.is_file():
            raise PolicyError(
                f"{folder} is not a policy folder: policy.json is missing. "
                "Give the folder that `atelier train` or `atelier convert` wrote."
            )
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise PolicyError(
                f"{path} cannot be read as a policy description ({error}). "
                "Restore the file from the policy's source."
            ) from error
