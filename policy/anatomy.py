"""Sizes of a policy without its weights: shapes, configurations and numbers of tokens.

They come from a folder's safetensors headers (here) or from the published configurations
(`policy.published`). Nothing in this file imports torch.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import PolicyError
from policy.config import PolicyConfig

_TYPICAL_CAPTION = 16
_CHARACTERS_PER_TOKEN = 4

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a policy, such as `ar`."""

    shapes: Shapes
    """Tensor name -> shape; a head tied to the embedding is not listed."""
    config: dict[str, Any]
    """What the part's config.json says; {} if it has none."""

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def linear(self, name: str) -> list[tuple[int, ...]]:
        """Return the [out, in] shapes of all linear layers called `name`, such as `q_proj`."""
        return [
            shape
            for key, shape in self.shapes.items()
            if len(shape) == 2 and key.endswith(f".{name}.weight")
        ]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What the sizes of a run follow from."""

    parts: dict[str, Part]
    num_tokens: int
    """Image tokens per picture, N."""
    num_image_tokens: int
    """Rows of the vocabulary that are image tokens."""
    latent_size: int
    """Side of the diffusion latents, in cells."""
    prompt_tokens: int
    """Tokens of a typical prompt in its chat template: an assumption, not a count."""
    source: str
    """Where the sizes come from, in words."""
    routes: tuple[str, ...] = ()
    """Ways in which the head sees a reference picture."""

    @property
    def parameters(self) -> dict[str, int]:
        """Part -> number of parameters."""
        return {name: part.parameters for name, part in self.parts.items()}


def read_anatomy(folder: Path) -> Anatomy:
    """Return the anatomy of a policy folder; PolicyError names what is missing or damaged."""
    config = PolicyConfig.load(folder)
    parts = read_parts(folder)
    for name in ("ar", "diffusion", "vae"):
        if name not in parts or not parts[name].config:
            what = "config.json" if name in parts else "weights"
            message = f"{folder}/{name} has no {what}.\n    Fix: copy the policy folder again."
            raise PolicyError(message)
    return make_anatomy(config, parts, str(folder))


def make_anatomy(config: PolicyConfig, parts: dict[str, Part], source: str) -> Anatomy:
    """Return the anatomy of a policy with this description and these parts."""
    template = len(config.prompt_template.replace("{prompt}", "")) // _CHARACTERS_PER_TOKEN
    return Anatomy(
        parts,
        config.num_tokens,
        config.num_image_tokens,
        config.latent_size,
        template + _TYPICAL_CAPTION,
        source,
        config.routes,
    )


def with_routes(anatomy: Anatomy, routes: tuple[str, ...]) -> Anatomy:
    """Return the anatomy of a policy that was taught these routes: it may get a connector more."""
    parts = dict(anatomy.parts)
    if "cross_attention" in routes and "reference_connector" not in parts:
        like = parts["connector"].shapes
        width, latent = like["2.weight"][0], int(parts["vae"].config["latent_channels"])
        shapes = like | {"0.weight": (width, latent)}
        if "position" in like:
            shapes["position"] = (anatomy.latent_size**2, width)
        parts["reference_connector"] = Part(shapes, {})
    return replace(anatomy, parts=parts, routes=routes)


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
            shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
            config = _config(place / "config.json")
            if config.get("tie_word_embeddings"):
                shapes.pop("lm_head.weight", None)  # stored twice, it is still one in memory
            parts[place.name] = Part(shapes, config)
    return parts


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{file} is not JSON ({error}).\n    Fix: copy the policy folder again."
        raise PolicyError(message) from None
    if not isinstance(value, dict):
        raise PolicyError(f"{file} is not a JSON object.\n    Fix: copy the policy folder again.")
    return value


def _shapes(file: Path) -> Shapes:
    """Tensor name -> shape, from the header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            names = opened.keys()
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise PolicyError(
            f"{file} is damaged: its header cannot be read ({error}).\n    Fix: copy it again."
        ) from error
