"""What pretraining and fine-tuning need, from shapes alone; nothing here imports torch.

Operations are those that `torch.utils.flop_counter` counts. Exact are weights, gradients and
optimizer states; activations and buffers are estimates (docs/planning.md).
"""

import math
from collections.abc import Mapping

from common.errors import RecipeError
from policy.anatomy import Anatomy, with_routes
from recipes.schema_pretrain import ENCODED_AT_ONCE, FINE_PARTS, PretrainRecipe
from rl.flops import (
    adapter_parameters,
    connector_flops,
    encoder_flops,
    head_cells,
    head_products_flops,
    head_weights_flops,
    layers_flops,
    logits_flops,
    tokenizer_flops,
)
from rl.memory import BUCKET, SINGLE, Memory, Sharding, activations, autoencoder_buffers
from rl.sizing import fits

_LIVE = 1_000_000_000
"""DeepSpeed's default, in values: weights that ZeRO-3 holds whole at the same time."""
_BLOCK = 47
"""Values that a block of the head keeps for the backward pass, per position and channel, at SANA's
proportions: counted on the published block by saved-tensor hooks."""


def as_trained(recipe: PretrainRecipe, anatomy: Anatomy) -> Anatomy:
    """Return the sizes of the policy in training, with what the recipe adds for references."""
    if not recipe.data.references:
        return anatomy
    routes = anatomy.routes if recipe.policy.routes is None else recipe.policy.routes
    return with_routes(anatomy, tuple(routes))


def trained_values(recipe: PretrainRecipe, anatomy: Anatomy) -> dict[str, int]:
    """Return trained part -> number of values that learn; each counts once, in the first part."""
    counts: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    for name in recipe.trainable:
        module = name.partition(".")[0]
        part = anatomy.parts.get(module)
        if part is None:
            raise RecipeError(
                f"trainable: the policy has no {name}.\n"
                "    Fix: remove it, or add cross_attention to policy.routes."
            )
        begins = FINE_PARTS.get(name, ("",))
        keys = {(module, key) for key in part.shapes if key.startswith(begins)} - seen
        seen |= keys
        counts[name] = sum(math.prod(part.shapes[key]) for _, key in keys)
        if name == "ar" and recipe.policy.lora:
            counts[name] = adapter_parameters(part, recipe.policy.lora)
    return counts


def pretrain_flops(recipe: PretrainRecipe, anatomy: Anatomy) -> Mapping[str, int]:
    """Return the operations of one picture: stage -> forward and backward pass together.

    A product has two more in the backward pass, one for each factor; that of a frozen weight has
    one. Before the head's first cross-attention nothing needs a gradient if its way in is frozen;
    it is counted with the others.
    """
    pictures = 1 + recipe.data.references
    encoded = pictures * tokenizer_flops(anatomy, pictures_per_pass(recipe, 1) * pictures)
    work = {"encode tokens": encoded, "language model": _language_model(recipe, anatomy)}
    if recipe.loss.flow_matching:
        latents = 2 if recipe.data.references and anatomy.routes else 1
        work["encode latents"] = latents * encoder_flops(anatomy.parts["vae"], anatomy.latent_size)
        work["diffusion head"] = _head(recipe, anatomy)
    return work


def _language_model(recipe: PretrainRecipe, anatomy: Anatomy) -> int:
    ar, lora, tokens = anatomy.parts["ar"], recipe.policy.lora, anatomy.num_tokens
    length = _length(recipe, anatomy)
    weights, products = layers_flops(ar, length, 0), layers_flops(ar, 0, length * length)
    logits = logits_flops(ar, tokens, anatomy.num_image_tokens)
    if not recipe.loss.cross_entropy:
        logits = 0
    forward = weights + products + logits
    if "ar" not in recipe.trainable:
        return forward
    again = weights + products if recipe.train.gradient_checkpointing else 0
    if lora is None:
        return 3 * forward + again
    adapters = 2 * length * adapter_parameters(ar, lora)
    once_more = adapters if recipe.train.gradient_checkpointing else 0
    return 2 * (weights + logits) + 3 * (products + adapters) + again + once_more


def _head(recipe: PretrainRecipe, anatomy: Anatomy) -> int:
    head, trainable = anatomy.parts["diffusion"], recipe.trainable
    rows, cells = 1 + anatomy.num_tokens, head_cells(anatomy)
    connectors = connector_flops(anatomy)
    work = connectors * (3 if "connector" in trainable else 2)
    if recipe.data.references:
        if "cross_attention" in anatomy.routes:
            places = anatomy.latent_size**2
            shapes = anatomy.parts["reference_connector"].shapes
            matrices = sum(math.prod(shapes[name]) for name in ("0.weight", "2.weight"))
            work += 2 * places * matrices * (3 if "reference_connector" in trainable else 1)
            rows += places
        if "noise_space" in anatomy.routes:
            cells *= 2
    weights = head_weights_flops(head, rows, cells)
    products = head_products_flops(head, rows, cells)
    learns = {prefix for part in trainable for prefix in FINE_PARTS.get(part, ())}
    learns |= {""} if "diffusion" in trainable else set()
    trained = head_weights_flops(head, rows, cells, tuple(learns))
    blocks = head_weights_flops(head, rows, cells, ("transformer_blocks.",)) + products
    again = blocks if recipe.train.gradient_checkpointing else 0
    return work + 2 * weights + trained + 3 * products + again


def _length(recipe: PretrainRecipe, anatomy: Anatomy) -> int:
    """Tokens of a typical sequence, a reference's image tokens included."""
    return anatomy.prompt_tokens + (1 + recipe.data.references) * anatomy.num_tokens


def pictures_per_pass(recipe: PretrainRecipe, gpus: int) -> int:
    """Return the pictures of a forward pass on one GPU: `train.micro_batch`, or the most below it
    that divides a GPU's share of `batch_that_divides`."""
    share = batch_that_divides(recipe, gpus) // gpus
    most = min(recipe.train.micro_batch or share, share)
    return next(size for size in range(most, 0, -1) if share % size == 0)


def batch_that_divides(recipe: PretrainRecipe, gpus: int) -> int:
    """Return `train.batch_size`, or the next larger one that so many GPUs can share."""
    return -(-recipe.train.batch_size // gpus) * gpus


# --- memory --------------------------------------------------------------------------------------


def pretrain_memory(recipe: PretrainRecipe, anatomy: Anatomy, sharding: Sharding) -> Memory:
    """Return what one GPU holds in a run spread as `sharding` says (stage 0: whole copies)."""
    stage, train = sharding.stage, recipe.train
    trained = sum(trained_values(recipe, anatomy).values())
    width = 2 if stage and train.bf16 else SINGLE  # of weights and gradients
    narrow = 2 if train.bf16 else SINGLE  # of products
    counts = anatomy.parameters
    codecs = counts["image_tokenizer"] + counts["vae"]
    joint = sum(counts.values()) - codecs
    if recipe.policy.lora:
        joint += adapter_parameters(anatomy.parts["ar"], recipe.policy.lora)

    def share(size: int, divided_from: int) -> int:
        return -(-size // sharding.gpus) if stage >= divided_from else size

    resident = {
        "weights": share(joint * width, 3),
        "weights of the codecs": codecs * SINGLE,
        "gradients": share(trained * width, 2),
        # AdamW's two moments; with ZeRO float32 weights, too (Rajbhandari et al. 2020).
        "optimizer states": share(trained * SINGLE * (3 if stage else 2), 1),
    }
    if train.ema:
        resident["moving average"] = trained * SINGLE
    pictures = pictures_per_pass(recipe, sharding.gpus)
    update = pictures * _kept(recipe, anatomy, width, narrow)
    if stage:
        update += 2 * min(BUCKET, trained) * width
        update += min(_LIVE, joint) * width if stage == 3 else 0
    elif train.bf16:
        update += 2 * joint  # autocast's copies
    phases = {"update": update}
    if recipe.loss.flow_matching:
        at_once = min(pictures, ENCODED_AT_ONCE)
        phases = {"encoding": autoencoder_buffers(anatomy, at_once, SINGLE, "encoder")} | phases
    return Memory(resident, phases)


def _kept(recipe: PretrainRecipe, anatomy: Anatomy, width: int, narrow: int) -> int:
    """Return the bytes that one picture takes between forward and backward pass.

    With recomputation, the input of each layer is kept. Besides, for a moment, there are a layer
    that is computed again, or the logits. The residual stream has the width of the weights, what
    enters products that of the products.
    """
    checkpointing = recipe.train.gradient_checkpointing
    ar, lora = anatomy.parts["ar"], recipe.policy.lora
    length, kept, for_a_moment = _length(recipe, anatomy), 0, [0]
    if "ar" in recipe.trainable:
        layers, hidden = int(ar.config["num_hidden_layers"]), int(ar.config["hidden_size"])
        all_layers = activations(ar, length, narrow, lora, width if lora is None else SINGLE)
        kept += layers * length * hidden * width if checkpointing else all_layers
        for_a_moment.append(all_layers // layers)
    if recipe.loss.cross_entropy:
        # Logits as computed and in float32, their softmax, and the gradients of both.
        for_a_moment.append(
            anatomy.num_tokens * anatomy.num_image_tokens * (2 * narrow + 2 * SINGLE)
        )
    if recipe.loss.flow_matching:
        config = anatomy.parts["diffusion"].config
        channels = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        noise_space = recipe.data.references and "noise_space" in anatomy.routes
        states = head_cells(anatomy) * (2 if noise_space else 1) * channels
        block = _BLOCK * states * narrow
        kept += int(config["num_layers"]) * (states * width if checkpointing else block)
        for_a_moment.append(block)
    return kept + max(for_a_moment)


def change_that_fits(
    recipe: PretrainRecipe, anatomy: Anatomy, sharding: Sharding, capacity: int
) -> tuple[str, Memory] | None:
    """Return the first change of one value with which a device is enough, and what it needs."""
    passes, batch = pictures_per_pass(recipe, sharding.gpus), recipe.train.batch_size
    smaller = [size for size in range(passes - 1, 0, -1) if batch % size == 0]
    changes: list[tuple[str, object]] = [("micro_batch", size) for size in smaller]
    changes += [("gradient_checkpointing", True), ("bf16", True)]
    for key, value in changes:
        train = recipe.train.model_copy(update={key: value})
        memory = pretrain_memory(recipe.model_copy(update={"train": train}), anatomy, sharding)
        if fits(memory, capacity):
            return f"train.{key}={str(value).lower()}", memory
    return None


def checkpoint_bytes(recipe: PretrainRecipe, anatomy: Anatomy, stage: int) -> int:
    """Return the bytes of a checkpoint: trained weights, optimizer states, moving average.

    DeepSpeed writes all weights but the codecs' beside them; with ZeRO-3, the frozen of them.
    """
    resident = pretrain_memory(recipe, anatomy, Sharding(1, stage)).resident
    # Gradients are as wide as the weights that are written.
    keys = ["gradients", "optimizer states", "moving average", *(["weights"] if stage else [])]
    again = resident["gradients"] if stage == 3 else 0
    return sum(resident.get(key, 0) for key in keys) - again
