"""Low-rank adapters of a language model, from a recipe."""

from peft import LoraConfig
from torch import nn

from common.errors import RecipeError
from policy import Policy
from recipes.schema_common import LoraSection


def lora_config(lora: LoraSection, policy: Policy) -> LoraConfig:
    """Return the recipe's adapters in PEFT's terms; RecipeError for a layer the model lacks."""
    # Of the decoder: the head is used by its weight, so an adapter on it would never be seen.
    modules = policy.ar.model.named_modules()
    known = {name.rpartition(".")[2] for name, part in modules if isinstance(part, nn.Linear)}
    unknown = sorted(set(lora.targets) - known)
    if unknown:
        raise RecipeError(
            f"policy.lora.targets: the model's layers have no linear map `{unknown[0]}`.\n"
            f"    Fix: choose from {', '.join(sorted(known))}."
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
