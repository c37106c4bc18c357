"""Rough memory of a GRPO run, from the shapes in a policy folder; nothing here imports torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.policy_folder import Part, read_json, read_parts
from common.errors import PolicyError, RecipeError
from common.registry import nearest

if TYPE_CHECKING:
    from recipes.schema_grpo import GrpoRecipe

_PROMPT_TOKENS = 32
"""Assumed length of a prompt with its chat template, in tokens."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs. Counts are numbers of values, everything else is bytes."""

    num_tokens: int
    """Image tokens per picture."""
    parameters: dict[str, int]
    """Part of the policy -> number of parameters."""
    trainable: int
    memory: dict[str, int]
    """What it is for -> bytes."""
    checkpoint: int
    """Size of one checkpoint: trained weights and two moments of AdamW."""


def estimate_grpo(recipe: "GrpoRecipe", folder: Path) -> Estimate:
    """Estimate a run from the headers in `folder`.

    Activations follow the usual count for a gated decoder layer without recomputation (about 14
    times the hidden and 3 times the intermediate size per token) plus attention scores; it is the
    order of magnitude that counts. Raises PolicyError for a damaged folder and RecipeError if
    `policy.lora.targets` names a layer that the policy does not have.
    """
    facts = read_json(folder / "policy.json")
    model = read_json(folder / "ar" / "config.json")
    parts = read_parts(folder)
    if "ar" not in parts:
        raise PolicyError(f"{folder}/ar has no weights.\n    Fix: copy the policy folder again.")
    try:
        tokens = int(facts["grid"]) ** 2
        codes = int(facts["num_image_tokens"])
        layers, hidden = int(model["num_hidden_layers"]), int(model["hidden_size"])
        inner, heads = int(model["intermediate_size"]), int(model["num_attention_heads"])
        kv_heads, head = int(model["num_key_value_heads"]), int(model["head_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(
            f"{folder}: policy.json or ar/config.json lacks a number ({error}).\n"
            "    Fix: copy the policy folder again."
        ) from None
    width = 2 if recipe.policy.dtype == "bfloat16" else 4
    counts = {name: part.parameters for name, part in parts.items()}
    trainable = _trainable(recipe, parts["ar"])
    # PEFT keeps adapters in float32; a full run keeps its weights in the recipe's format.
    own_width = 4 if recipe.policy.lora else width
    images = recipe.rollout.group_size * recipe.rollout.prompts_per_step
    micro = recipe.train.micro_batch or images
    length = tokens + _PROMPT_TOKENS
    per_token = layers * (14 * hidden + 3 * inner)
    memory = {
        "weights": sum(counts.values()) * width,
        "gradients, AdamW": trainable * (own_width + 8),
        "activations": micro * length * (per_token + layers * heads * length) * width,
        "logits": micro * tokens * codes * 4 * 2,
        "rollout cache": images * length * layers * 2 * kv_heads * head * width,
    }
    if recipe.rollout.engine == "vllm":
        memory["vLLM's weights"] = counts["ar"] * width
    return Estimate(tokens, counts, trainable, memory, trainable * (own_width + 8))


def _trainable(recipe: "GrpoRecipe", ar: Part) -> int:
    lora = recipe.policy.lora
    if lora is None:
        return ar.parameters
    layers: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in ar.shapes.items():
        if name.endswith(".weight") and len(shape) == 2:
            layers.setdefault(name.split(".")[-2], []).append(shape)
    for target in lora.targets:
        if target not in layers:
            close = nearest(target, layers)
            known: Any = f"did you mean `{close}`?" if close else f"known: {', '.join(layers)}."
            raise RecipeError(
                f"policy.lora.targets: the policy has no layer `{target}`.\n    Fix: {known}"
            )
    return sum(
        math.prod((lora.rank, sum(shape))) for target in lora.targets for shape in layers[target]
    )
