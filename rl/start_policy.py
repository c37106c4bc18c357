"""The policy a pretraining run starts from, and the one it ends with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import PolicyError, RunError
from common.seeds import counter_seed
from data.scenes import TASKS, caption, sample_scene
from evals.policy_hash import policy_hash
from policy import Policy, policy_path, published
from policy.connector import new_reference_connector
from policy.quiet import quiet_libraries
from policy.text import build_tokenizer
from policy.tiny import (
    CODES,
    tiny_autoencoder,
    tiny_config,
    tiny_head,
    tiny_image_tokenizer,
    tiny_language_model,
)
from recipes.schema_pretrain import FINE_PARTS, PretrainRecipe
from rl.devices import training_device
from rl.ema import EMA_FILE
from rl.lora import lora_config
from rl.provenance import with_stage

TEXT_VOCABULARY = 360
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
WEIGHTS_FILE = "model.safetensors"


def new_tiny_policy(seed: int) -> Policy:
    """Return a tiny policy with random weights and a tokenizer fitted to scene captions."""
    rng = np.random.default_rng(counter_seed(seed, "captions"))
    tasks = dict.fromkeys(TASKS, 1.0)
    captions = [caption(sample_scene(rng, tasks, "train")) for _ in range(3000)]
    tokenizer = build_tokenizer(captions, TEXT_VOCABULARY, CODES)
    config = tiny_config(tokenizer)
    torch.manual_seed(counter_seed(seed, "weights"))
    language_model = tiny_language_model(len(tokenizer), config.pad_id, config.eos_id)
    connector, head = tiny_head(language_model.config.hidden_size)
    return Policy(
        config,
        tokenizer,
        language_model,
        tiny_image_tokenizer(),
        connector,
        head,
        tiny_autoencoder(),
        dict(SCHEDULER),
    )


def load_start(path: str | None, seed: int, device: str = "cpu") -> Policy:
    """Return the policy at a path, the shipped one for `base`, a new tiny one for None."""
    if path is None:
        return new_tiny_policy(seed).to(device)
    return Policy.from_pretrained(policy_path(path), device=device)


def prepare_policy(
    recipe: PretrainRecipe, start: Policy | None = None
) -> tuple[Policy, PeftModel | None]:
    """Return the policy of a recipe ready to train, and its adapters if the recipe has any.

    It takes references if the recipe's data have them, and exactly the recipe's parts have
    gradients. Every call gives the same weights. `start`: the policy of `load_start`, if it is
    there already; it is changed.
    """
    device = training_device(recipe.policy.device)
    policy = start or load_start(recipe.policy.path, recipe.seed, device)
    if recipe.data.references:
        teach_editing(policy, recipe.policy.routes, recipe.seed)
    policy.requires_grad_(False)
    for name in recipe.trainable:
        for parameter in _part(policy, name):
            parameter.requires_grad_(True)
    if recipe.policy.lora is None:
        return policy, None
    policy.ar.requires_grad_(False)
    torch.manual_seed(counter_seed(recipe.seed, "adapters"))
    with quiet_libraries():
        adapters = get_peft_model(policy.ar, lora_config(recipe.policy.lora, policy))
    return policy, adapters


def teach_editing(policy: Policy, routes: tuple[str, ...] | None, seed: int) -> None:
    """Give a policy what it lacks to take a reference picture: template, routes, connector.

    The new connector starts almost silent, so that the policy draws at first as it did before.
    """
    config = policy.config
    if routes is None:
        routes = config.routes
    template = config.edit_template
    if template is None:
        template = config.prompt_template.replace("{prompt}", "{prompt}{references}")
        if config.prompt_template == published.PROMPT_TEMPLATE:
            template = published.edit_template(policy.tokenizer.get_vocab())
    policy.config = replace(config, edit_template=template, routes=tuple(routes))
    if "cross_attention" in routes and policy.reference_connector is None:
        torch.manual_seed(counter_seed(seed, "reference-connector"))
        # Where the connector knows places, a reference's rows have theirs too.
        positions = config.latent_size**2 if policy.connector.position is not None else 0
        width = policy.connector.width
        connector = new_reference_connector(config.latent_channels, width, positions)
        policy.reference_connector = connector.to(policy.device, policy.ar.dtype)


def _part(policy: Policy, name: str) -> list[nn.Parameter]:
    prefixes = FINE_PARTS.get(name)
    module = getattr(policy, name.partition(".")[0])
    if module is None:
        raise PolicyError(
            f"trainable: the policy has no {name}.\n"
            "    Fix: remove it, or add cross_attention to policy.routes."
        )
    return [
        parameter
        for key, parameter in module.named_parameters()
        if prefixes is None or key.startswith(prefixes)
    ]


def export_policy(recipe: PretrainRecipe, checkpoint: Path, folder: Path) -> None:
    """Write the policy of a checkpoint: the averaged weights if the recipe has `ema`.

    Works for a checkpoint of any kind of run, ZeRO-3 too: what was trained is stored whole beside
    the shards of DeepSpeed.
    """
    start = load_start(recipe.policy.path, recipe.seed)
    hash_of_start = policy_hash(start)
    on_cpu = recipe.policy.model_copy(update={"device": "cpu"})
    policy, adapters = prepare_policy(recipe.model_copy(update={"policy": on_cpu}), start)
    load_trained(policy, load_file(checkpoint / (EMA_FILE if recipe.train.ema else WEIGHTS_FILE)))
    if adapters is not None:
        adapters.merge_and_unload()
    policy.config = with_stage(policy.config, recipe, hash_of_start)
    policy.save_pretrained(folder)


def load_trained(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put stored weights into the parts with gradients; RunError unless they are exactly those."""
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if wanted.keys() != weights.keys():
        odd = sorted(wanted.keys() ^ weights.keys())[0]
        raise RunError(
            f"The checkpoint and the recipe train different weights, such as {odd}.\n"
            "    Fix: use the recipe.yaml of the checkpoint's own run."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(weights[name])
