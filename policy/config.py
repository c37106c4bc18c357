"""What `policy.json` says: sizes, token ids, templates and defaults of a policy folder."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import PolicyError

FORMAT = 1

ROUTES = ("cross_attention", "noise_space")
"""Ways in which the diffusion head sees a reference picture (spec section 1.9 (a) and (b))."""

COMPATIBILITY = ("tail_slice", "squashed_tokens")
"""Faults of the published code that released weights were trained with, each off by default.

`tail_slice`: training conditions on the last 1 + N rows of the padded batch, whatever they are
(spec section 1.5), instead of `<S0>` and the image tokens. Inference never did.
`squashed_tokens`: image tokens describe the whole picture squashed into a square, while latents
describe its centre (spec section 1.3), instead of both describing the centre.
"""


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
    edit_template: str | None = None
    """Chat text around `{prompt}` and `{references}` of an edit; `{images}` becomes "this image"
    or, with several references, "these images". None: the policy takes no references."""
    routes: tuple[str, ...] = ()
    """Default of `render` for pictures with a reference: a subset of `ROUTES`."""
    compatibility: tuple[str, ...] = ()
    """Faults to repeat: a subset of `COMPATIBILITY`."""
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
            inside = folder / "policy"
            found = f"{inside}." if inside.is_dir() else "what `atelier convert` or a run wrote."
            raise PolicyError(
                f"{folder} is not a policy folder: policy.json is missing.\n    Fix: give {found}"
            )
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            for key, known in (("routes", ROUTES), ("compatibility", COMPATIBILITY)):
                facts[key] = tuple(facts.get(key, ()))
                if unknown := sorted(set(facts[key]) - set(known)):
                    raise PolicyError(
                        f"{path}: {key} holds {unknown[0]!r}, which is none of {', '.join(known)}."
                    )
            return cls(**facts)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise PolicyError(
                f"{path} cannot be read as a policy description ({error}). "
                "Restore the file from the policy's source."
            ) from error
