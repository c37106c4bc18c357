"""Floating-point operations of one picture, from shapes alone; nothing here imports torch.

A multiplication and an addition are two operations. Counted are matrix products, convolutions and
the products inside attention (in full, not the causal half), which is what
`torch.utils.flop_counter` counts and what the tests compare with; norms and activations are left
out. A weight costs two operations for each value and each position it is applied to.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from policy.anatomy import Anatomy, Part
from policy.tiling import pixels_per_cell, tile_sides
from recipes.schema_common import LoraSection
from recipes.schema_grpo import GrpoRecipe


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations per picture of a GRPO step."""

    sampling: int
    """Drawing the N image tokens one after the other; the group shares its prompt."""
    scoring: int
    """The teacher-forced pass that gives log-probs and conditions."""
    diffusion: int
    """All passes of the connector and the diffusion head."""
    autoencoder: int
    """From latents to pixels."""
    update: int
    """Forward and backward pass, and the KL term's reference pass if there is one."""

    @property
    def total(self) -> int:
        """All of a training step."""
        return self.sampling + self.scoring + self.diffusion + self.autoencoder + self.update


def grpo_flops(recipe: GrpoRecipe, anatomy: Anatomy) -> Flops:
    """Return the operations that one picture of a training step takes."""
    ar, decode = anatomy.parts["ar"], recipe.decode.train
    tokens, prompt = anatomy.num_tokens, anatomy.prompt_tokens
    codes = anatomy.num_image_tokens
    vocabulary = codes if recipe.rollout.engine == "transformers" else int(ar.config["vocab_size"])
    calls = decode.steps * (1 if decode.guidance == 1 else 2)
    scoring = forward_flops(ar, prompt + tokens, tokens, codes)
    reference = scoring if recipe.algorithm.beta else 0
    return Flops(
        sampling=sampling_flops(ar, prompt, tokens, vocabulary, recipe.rollout.group_size),
        scoring=scoring,
        # What the head makes of the conditions does not change between its calls.
        diffusion=connector_flops(anatomy)
        + condition_flops(anatomy)
        + calls * (head_flops(anatomy) - condition_flops(anatomy)),
        autoencoder=autoencoder_flops(anatomy, decode.tile),
        update=reference + update_flops(ar, prompt + tokens, tokens, codes, recipe.policy.lora),
    )


# --- language model ------------------------------------------------------------------------------


def sampling_flops(ar: Part, prompt: int, tokens: int, vocabulary: int, group: int) -> int:
    """Sample `tokens` after a prompt that `group` samples share."""
    # The last token is never fed back; the token before it is the last query.
    attended = sum(prompt + fed + 1 for fed in range(tokens - 1))
    shared = layers_flops(ar, prompt, prompt * prompt) // group
    return shared + layers_flops(ar, tokens - 1, attended) + logits_flops(ar, tokens, vocabulary)


def forward_flops(ar: Part, length: int, tokens: int, codes: int) -> int:
    """One pass over `length` positions, logits of `codes` rows at `tokens` of them."""
    return layers_flops(ar, length, length * length) + logits_flops(ar, tokens, codes)


def update_flops(ar: Part, length: int, tokens: int, codes: int, lora: LoraSection | None) -> int:
    """Forward and backward pass.

    Every product has two in the backward pass, one for each factor; that of a frozen weight has
    one. The first layer's frozen projections, which need none, are counted with the others. Logits
    are not kept, so that the head is computed again for the gradient.
    """
    products = layers_flops(ar, 0, length * length)
    weights = forward_flops(ar, length, tokens, codes) - products
    again = logits_flops(ar, tokens, codes)
    if lora is None:
        return 3 * (weights + products) + again
    adapters = 3 * 2 * length * adapter_parameters(ar, lora)
    return 2 * weights + 3 * products + adapters + again


def adapter_parameters(ar: Part, lora: LoraSection) -> int:
    """Return the number of trained values: rank x (in + out) for every adapted layer."""
    return sum(lora.rank * sum(shape) for target in lora.targets for shape in ar.linear(target))


def layers_flops(ar: Part, positions: int, attended: int) -> int:
    """All decoder layers: their weights at `positions`, `attended` pairs of query and key."""
    config = ar.config
    weights = sum(
        math.prod(shape)
        for name, shape in ar.shapes.items()
        if ".layers." in name and len(shape) == 2
    )
    width = int(config["num_attention_heads"]) * int(config["head_dim"])
    return 2 * weights * positions + 4 * int(config["num_hidden_layers"]) * width * attended


def logits_flops(ar: Part, positions: int, rows: int) -> int:
    """Logits of `rows` tokens of the vocabulary at `positions`."""
    return 2 * int(ar.config["hidden_size"]) * rows * positions


# --- diffusion head ------------------------------------------------------------------------------


def connector_flops(anatomy: Anatomy) -> int:
    """The connector over the 1 + N conditioning rows, once a picture."""
    rows = 1 + anatomy.num_tokens
    return _weights_flops(
        anatomy.parts["connector"], lambda name: 0 if name == "position" else rows
    )


def condition_flops(anatomy: Anatomy) -> int:
    """Caption projection, keys and values of the head's cross-attentions, once a picture."""
    rows = 1 + anatomy.num_tokens
    return _weights_flops(
        anatomy.parts["diffusion"], lambda name: rows if _of_condition(name) else 0
    )


def _of_condition(name: str) -> bool:
    places = ("caption_projection.", ".attn2.to_k.", ".attn2.to_v.")
    return any(place in f".{name}" for place in places)


def head_flops(anatomy: Anatomy) -> int:
    """One call of the diffusion head for one picture (SANA: linear self-, full cross-attention)."""
    rows, cells = 1 + anatomy.num_tokens, head_cells(anatomy)
    head = anatomy.parts["diffusion"]
    return head_weights_flops(head, rows, cells) + head_products_flops(head, rows, cells)


def head_cells(anatomy: Anatomy) -> int:
    """Positions of the latents inside the head."""
    patch = int(anatomy.parts["diffusion"].config["patch_size"])
    return (anatomy.latent_size // patch) ** 2


def head_weights_flops(head: Part, rows: int, cells: int, only: tuple[str, ...] = ("",)) -> int:
    """Products with weights whose name begins as one of `only`, under `rows` conditions."""

    def positions(name: str) -> int:
        if name.endswith("scale_shift_table") or not name.startswith(only):
            return 0
        if name.startswith("time_embed."):
            return 1
        return rows if _of_condition(name) else cells

    return _weights_flops(head, positions)


def head_products_flops(head: Part, rows: int, cells: int) -> int:
    """The products inside attention, of all blocks."""
    config = head.config
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    cross = int(config["num_cross_attention_heads"]) * int(config["cross_attention_head_dim"])
    # Linear attention carries one more row, the sum of the keys.
    attention = 4 * cells * (width * (int(config["attention_head_dim"]) + 1) + rows * cross)
    return int(config["num_layers"]) * attention


# --- image codecs --------------------------------------------------------------------------------


def autoencoder_flops(anatomy: Anatomy, tile: int | None) -> int:
    """Decode one picture, whole or in tiles: what they share is decoded more than once."""
    vae, size = anatomy.parts["vae"], anatomy.latent_size
    whole = decoder_flops(vae, size)
    if tile is None:
        return whole
    covered = sum(tile_sides(size, tile, pixels_per_cell(vae.config)))
    return whole * covered**2 // size**2


def decoder_flops(vae: Part, latent_size: int) -> int:
    """Decode one picture (DC-AE): every stage doubles the side."""
    config = vae.config
    stages = len(config["decoder_block_out_channels"])
    cells = [(latent_size << (stages - 1 - stage)) ** 2 for stage in range(stages)]
    interpolate = config["upsample_block_type"] == "interpolate"

    def positions(name: str) -> int:
        if name.startswith("decoder.conv_in."):
            return cells[-1]
        if name.startswith("decoder.conv_out."):
            shuffled = name == "decoder.conv_out.conv.weight" and not interpolate
            return cells[0] // 4 if shuffled else cells[0]
        if not name.startswith("decoder.up_blocks."):
            return 0
        here = cells[int(name.split(".")[2])]
        # The convolution that opens a stage: before the pixels are laid out, or after.
        return here // 4 if name.endswith(".0.conv.weight") and not interpolate else here

    return _weights_flops(vae, positions) + _autoencoder_attention(config, "decoder", cells)


def encoder_flops(vae: Part, latent_size: int) -> int:
    """Encode one picture (DC-AE): every stage halves the side."""
    config = vae.config
    stages = len(config["encoder_block_out_channels"])
    cells = [(latent_size << (stages - 1 - stage)) ** 2 for stage in range(stages)]
    strided = config["downsample_block_type"] == "conv"

    def positions(name: str) -> int:
        if name.startswith("encoder.conv_in."):
            return cells[1] if strided and name == "encoder.conv_in.conv.weight" else cells[0]
        if name.startswith("encoder.conv_out."):
            return cells[-1]
        if not name.startswith("encoder.down_blocks."):
            return 0
        stage = int(name.split(".")[2])
        closes = re.fullmatch(r"encoder\.down_blocks\.\d+\.\d+\.conv\.weight", name)
        return cells[stage + 1] if closes and strided else cells[stage]

    return _weights_flops(vae, positions) + _autoencoder_attention(config, "encoder", cells)


def _autoencoder_attention(config: dict[str, Any], side: str, cells: list[int]) -> int:
    channels, layers = config[f"{side}_block_out_channels"], config[f"{side}_layers_per_block"]
    kinds = config[f"{side}_block_types"]
    kinds = [kinds] * len(cells) if isinstance(kinds, str) else kinds
    head = int(config["attention_head_dim"])
    attention = 0
    for stage, kind in enumerate(kinds):
        if kind == "EfficientViTBlock":
            scales = 1 + len(config[f"{side}_qkv_multiscales"][stage])
            here = cells[stage]
            inner = head + 1 if here > head else here
            attention += layers[stage] * 4 * here * inner * channels[stage] * scales
    return attention


def tokenizer_flops(anatomy: Anatomy, pictures: int) -> int:
    """Image codes of one picture; the codebook is made once for `pictures` of them."""
    part, cells = anatomy.parts["image_tokenizer"], anatomy.num_tokens
    encoder = part.config["encoder"]
    layers = int(encoder["num_hidden_layers"]) + 1 + int(part.config["select_layer"])
    codes, dim = part.shapes["quantizer.embedding.weight"]
    run = [f"encoder.encoder.layers.{layer}." for layer in range(layers)]
    run += ["encoder.embeddings.patch_embedding.", "encode_task_layer.", "in_linear."]
    weights = _weights_flops(part, lambda name: cells if name.startswith(tuple(run)) else 0)
    attention = layers * 4 * cells * cells * int(encoder["hidden_size"])
    return weights + attention + 2 * cells * codes * dim + 2 * codes * dim * dim // pictures


def _weights_flops(part: Part, positions: Callable[[str], int]) -> int:
    return sum(
        2 * math.prod(shape) * positions(name)
        for name, shape in part.shapes.items()
        if len(shape) >= 2
    )
