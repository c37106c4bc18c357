"""Bytes that a GRPO step needs on one GPU, and on each worker's, from shapes alone.

Nothing here imports torch. Exact are weights, gradients, optimizer states and the cache: numbers of
values times their width. Activations, logits and decoding are estimates: what PyTorch keeps for
these models' operations, counted operation by operation. `docs/planning.md` has the formulas and
what they were compared with. Left out: CUDA's own context, fragmentation, the rewards' models.
"""

import math
from dataclasses import dataclass
from typing import Any

from policy.anatomy import Anatomy, Part
from policy.tiling import pixels_per_cell, tile_sides
from recipes.schema_common import LoraSection
from recipes.schema_grpo import GrpoRecipe
from recipes.schema_rollout import DecodeEvalSection
from rl.flops import adapter_parameters

SAMPLER_ROWS = 256
"""Sequences that the transformers engine samples at the same time (`ImageTokenSampler`)."""
LOGIT_ROWS, LOGIT_COLUMNS = 4096, 16_384
"""Tokens and codes whose logits exist at the same time (TRL's tiles, `rl.image_head.TILE`)."""
FORWARD_TILE, BACKWARD_TILE = 12, 29
"""Bytes of a logit in a tile beside itself: three float32, and seven with a mask for the gradient.
Torch's operations need them; Triton's kernel, used on GPUs where it is installed, needs none."""
BUCKET = 500_000_000
"""DeepSpeed's default, in values: a bucket of communication."""
SINGLE = 4
"""Bytes of a float32."""
TRANSFER_BUFFER, TRANSFER_BUFFERS = 2**30, 2
"""vLLM's default packing of weights for NCCL: bytes of a buffer, and how many on each side."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a run is spread: GPUs, and the ZeRO stage (0: one GPU, plain PyTorch)."""

    gpus: int = 1
    stage: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU."""

    resident: dict[str, int]
    """What is there all the time: what it is -> bytes."""
    phases: dict[str, int]
    """What each phase of a step needs besides: phase -> bytes; only one runs at a time."""

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.resident.values()) + max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        """The phase that decides the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def width_of(recipe: GrpoRecipe) -> int:
    """Return the bytes of one weight."""
    return 2 if recipe.policy.dtype == "bfloat16" else SINGLE


def trained_parameters(recipe: GrpoRecipe, anatomy: Anatomy) -> int:
    """Return how many values learn: adapters, or all of the language model."""
    ar, lora = anatomy.parts["ar"], recipe.policy.lora
    return ar.parameters if lora is None else adapter_parameters(ar, lora)


def pictures_per_gpu(recipe: GrpoRecipe, gpus: int) -> int:
    """Return a GPU's pictures of a step: whole groups, at least one."""
    return recipe.rollout.group_size * -(-recipe.rollout.prompts_per_step // gpus)


def grpo_memory(recipe: GrpoRecipe, anatomy: Anatomy, sharding: Sharding | None = None) -> Memory:
    """Return what one GPU holds in a run spread as `sharding` says (default: one GPU)."""
    sharding = sharding or Sharding()
    ar, width, lora = anatomy.parts["ar"], width_of(recipe), recipe.policy.lora
    images = pictures_per_gpu(recipe, sharding.gpus)
    micro = min(recipe.train.micro_batch or images, images)
    length = anatomy.prompt_tokens + anatomy.num_tokens
    # PEFT keeps adapters in float32 beside a bfloat16 model; DeepSpeed casts them like the rest.
    own = width if lora is None or sharding.stage else SINGLE
    tile = min(micro * anatomy.num_tokens, LOGIT_ROWS)
    tile *= min(anatomy.num_image_tokens, LOGIT_COLUMNS)
    hidden = int(ar.config["hidden_size"])
    conditions = images * (1 + anatomy.num_tokens) * hidden * width
    kept = micro * activations(ar, length, width, lora, own)
    phases = {
        "sampling": _sampling_here(recipe, anatomy, images),
        "scoring": tile * (width + FORWARD_TILE),
        # Decode workers are sent the conditions.
        "decoding": conditions
        + (0 if recipe.decode.workers else _decoding(recipe, anatomy, micro)),
        "update": kept
        + tile * (width + BACKWARD_TILE)
        # The head's gradient is added up in float32.
        + (SINGLE * anatomy.num_image_tokens * hidden if lora is None else 0)
        + _communication(recipe, anatomy, sharding),
    }
    if recipe.rollout.transfer == "nccl":
        phases["sending"] = transfer_buffers(recipe, anatomy)
    return Memory(_resident(recipe, anatomy, sharding, own), phases)


def worker_memory(recipe: GrpoRecipe, anatomy: Anatomy) -> dict[str, Memory]:
    """Return what each worker of a section holds; workers on the trainer's GPU are counted there.

    Rollout workers have whole groups, decode workers an equal share of a wave's pictures.
    """
    width, counts, rollout = width_of(recipe), anatomy.parameters, recipe.rollout
    prompts = -(-rollout.prompts_per_step // rollout.waves)
    workers: dict[str, Memory] = {}
    if rollout.workers and rollout.transfer != "ipc":
        resident = {"weights": counts["ar"] * width}
        if rollout.engine == "vllm":
            resident["cache"] = int(rollout.vllm.cache_gib * 2**30)
        groups = -(-prompts // rollout.workers)
        phases = {"sampling": _sampling(recipe, anatomy, groups * rollout.group_size, engines=1)}
        if rollout.transfer:
            phases["receiving"] = transfer_buffers(recipe, anatomy)
        workers["rollout"] = Memory(resident, phases)
    if recipe.decode.workers:
        share = -(-prompts * rollout.group_size // recipe.decode.workers)
        micro = min(recipe.train.micro_batch or share, share)
        conditions = (
            micro * (1 + anatomy.num_tokens) * int(anatomy.parts["ar"].config["hidden_size"])
        )
        weights = sum(counts.values()) - counts["ar"] - counts["image_tokenizer"]
        workers["decode"] = Memory(
            {"weights": weights * width},
            {"decoding": conditions * width + _decoding(recipe, anatomy, micro)},
        )
    return workers


def transfer_buffers(recipe: GrpoRecipe, anatomy: Anatomy) -> int:
    """Return the bytes of vLLM's buffers on one side of an NCCL transfer, at the most.

    A buffer is full with the tensor that takes it beyond its size.
    """
    ar, width = anatomy.parts["ar"], width_of(recipe)
    largest = max(math.prod(shape) for shape in ar.shapes.values())
    buffers = TRANSFER_BUFFERS * (TRANSFER_BUFFER + largest * width)
    return min(buffers, ar.parameters * width)


def _resident(recipe: GrpoRecipe, anatomy: Anatomy, sharding: Sharding, own: int) -> dict[str, int]:
    width, count = width_of(recipe), trained_parameters(recipe, anatomy)
    lora, counts = recipe.policy.lora, anatomy.parameters
    of_model = counts["ar"] * width + (count * own if lora else 0)
    # ZeRO: float32 weights and two moments beside the model's own (Rajbhandari et al. 2020).
    states = 3 * SINGLE * count if sharding.stage else 2 * own * count
    gradients = own * count
    resident = {
        "weights of ar": of_model,
        "weights of the rest": (sum(counts.values()) - counts["ar"]) * width,
        "gradients": _share(gradients, sharding, stage=2),
        "optimizer states": _share(states, sharding, stage=1),
    }
    if recipe.algorithm.beta and lora is None:
        resident["KL reference"] = counts["ar"] * width
    if lora and recipe.rollout.transfer:
        resident["merged weights, sent"] = counts["ar"] * width  # kept for who comes later
    return resident if recipe.rollout.vllm.sleep else resident | _vllm(recipe, anatomy)


def _vllm(recipe: GrpoRecipe, anatomy: Anatomy) -> dict[str, int]:
    """Return what vLLM holds on the trainer's GPU while it is awake."""
    rollout, beside = recipe.rollout, _engines(recipe)
    if rollout.engine != "vllm" or not beside:
        return {}
    return {
        "vLLM's weights": beside * anatomy.parameters["ar"] * width_of(recipe),
        "vLLM's cache": beside * int(rollout.vllm.cache_gib * 2**30),
    }


def _engines(recipe: GrpoRecipe) -> int:
    """Return how many engines sample on the trainer's device."""
    rollout = recipe.rollout
    return rollout.workers if rollout.transfer == "ipc" else int(not rollout.workers)


def _share(count: int, sharding: Sharding, stage: int) -> int:
    return -(-count // sharding.gpus) if sharding.stage >= stage else count


def _communication(recipe: GrpoRecipe, anatomy: Anatomy, sharding: Sharding) -> int:
    """Return DeepSpeed's buffers: a bucket to reduce and one to gather."""
    if not sharding.stage:
        return 0
    return 2 * min(BUCKET, trained_parameters(recipe, anatomy)) * width_of(recipe)


# --- sampling ------------------------------------------------------------------------------------


def cache_per_token(ar: Part, width: int) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config = ar.config
    heads, size = int(config["num_key_value_heads"]), int(config["head_dim"])
    return 2 * int(config["num_hidden_layers"]) * heads * size * width


def sampler_cache(anatomy: Anatomy, rows: int, group: int, width: int) -> int:
    """Return the bytes of `GroupCache`: each prompt once, and N - 1 tokens of each of its samples.

    `rows` sequences in whole groups of `group`, or a part of one group.
    """
    prompts = max(1, rows // group)
    tokens = prompts * anatomy.prompt_tokens + rows * (anatomy.num_tokens - 1)
    return tokens * cache_per_token(anatomy.parts["ar"], width)


def vllm_pictures(recipe: GrpoRecipe, anatomy: Anatomy) -> int:
    """Return how many pictures vLLM's cache holds at the same time."""
    length = anatomy.prompt_tokens + anatomy.num_tokens
    cache = int(recipe.rollout.vllm.cache_gib * 2**30)
    width = 1 if recipe.rollout.rounds_cache else width_of(recipe)
    return cache // (length * cache_per_token(anatomy.parts["ar"], width))


def sampler_rows(recipe: GrpoRecipe, images: int) -> int:
    """Return the sequences that the transformers engine samples together: whole groups."""
    group = recipe.rollout.group_size
    whole = SAMPLER_ROWS // group * group
    return min(images, whole or SAMPLER_ROWS)


def _sampling_here(recipe: GrpoRecipe, anatomy: Anatomy, images: int) -> int:
    engines = _engines(recipe)
    if not engines:
        return 0  # they sample on GPUs of their own
    # vLLM's weights and cache are resident unless it sleeps.
    woken = sum(_vllm(recipe, anatomy).values()) if recipe.rollout.vllm.sleep else 0
    return woken + _sampling(recipe, anatomy, images, engines)


def _sampling(recipe: GrpoRecipe, anatomy: Anatomy, images: int, engines: int) -> int:
    """Return what so many engines on one device need beside weights and vLLM's cache."""
    width, ar = width_of(recipe), anatomy.parts["ar"]
    if recipe.rollout.engine == "vllm":
        # Its logits are of the whole vocabulary.
        rows = min(images, engines * vllm_pictures(recipe, anatomy))
        return 3 * SINGLE * rows * int(ar.config["vocab_size"])
    rows = sampler_rows(recipe, images)
    # A token's log-probs in float32 and, to draw from them, twice in float64.
    drawing = rows * anatomy.num_image_tokens * (SINGLE + 2 * 8)
    return sampler_cache(anatomy, rows, recipe.rollout.group_size, width) + drawing


# --- update --------------------------------------------------------------------------------------


def activations(ar: Part, length: int, width: int, lora: LoraSection | None, own: int) -> int:
    """Return the bytes that the layers keep of one sequence for the backward pass.

    Without recomputation, with masked scaled-dot-product attention. `own` is the width of the
    trained values: an adapter wider than the model keeps a copy of its layer's input.
    """
    config: dict[str, Any] = ar.config
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, size = int(config["num_attention_heads"]), int(config["head_dim"])
    queries, keys = heads * size, int(config["num_key_value_heads"]) * size
    # RMS norms work in float32; of a trained one, what its weight is multiplied with is kept.
    norm = SINGLE + (width if lora is None else 0)
    norms = norm * (2 * hidden + queries + keys)
    # Queries, keys and values repeated for every head, the result, its log-sum-exp, the mask.
    attention = 4 * width * queries + SINGLE * heads + width * length
    gate = 3 * width * inner
    inputs = {"q_proj": hidden, "o_proj": queries, "gate_proj": hidden, "down_proj": inner}
    if lora is None:
        # Attention's result is already counted.
        linear = width * (sum(inputs.values()) - queries)
    else:
        linear = _adapter_inputs(set(lora.targets), inputs, width, own) + own * lora.rank * len(
            lora.targets
        )
    per_token = norms + attention + gate + linear
    final_norm = norm * hidden
    return length * (int(config["num_hidden_layers"]) * per_token + final_norm)


def _adapter_inputs(targets: set[str], inputs: dict[str, int], width: int, own: int) -> int:
    """Return the bytes per token of the inputs that adapters keep."""
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    sources = [shared.get(target, target) for target in targets]
    if own == width:
        # Layers that read the same tensor keep it once; attention's result is already counted.
        return width * sum(inputs[source] for source in set(sources) - {"o_proj"})
    return own * sum(inputs[source] for source in sources)


# --- decoding ------------------------------------------------------------------------------------


def decodings(recipe: GrpoRecipe) -> list[DecodeEvalSection]:
    """Return the ways in which a run decodes: evaluation's too, if it evaluates or checks."""
    section = recipe.decode
    both = recipe.evals.every or section.check.every
    return [section.train, section.eval] if both else [section.train]


def _decoding(recipe: GrpoRecipe, anatomy: Anatomy, pictures: int) -> int:
    width = width_of(recipe)
    return max(decoding(anatomy, section, pictures, width) for section in decodings(recipe))


def decoding(anatomy: Anatomy, section: DecodeEvalSection, pictures: int, width: int) -> int:
    """Return the bytes of what renders `pictures` of them at a time, head or autoencoder."""
    branches = 1 if section.guidance == 1 else 2
    return max(
        head_buffers(anatomy, pictures, branches, width),
        autoencoder_buffers(anatomy, pictures, width, "decoder", section.tile),
    )


def head_buffers(anatomy: Anatomy, pictures: int, branches: int, width: int) -> int:
    """Return the bytes of the denoiser, at the most; `branches` is 2 with guidance.

    Keys and values of all blocks for every picture, and once for the null branch. Inside a block
    the gated convolution: its widened input and result, beside the states of the block.
    """
    config = anatomy.parts["diffusion"].config
    channels = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    cross = int(config["num_cross_attention_heads"]) * int(config["cross_attention_head_dim"])
    cells = (anatomy.latent_size // int(config["patch_size"])) ** 2
    widened = 4 * float(config["mlp_ratio"]) + 5
    kept = int(config["num_layers"]) * 2 * (1 + anatomy.num_tokens) * cross
    inside = pictures * branches * channels * widened * cells
    return math.ceil(width * (inside + kept * (pictures + branches - 1)))


def autoencoder_buffers(
    anatomy: Anatomy, pictures: int, width: int, side: str, tile: int | None = None
) -> int:
    """Return the bytes inside the autoencoder's `side`, encoder or decoder, at the most.

    A residual block at its norm, beside what came into the stage: the block's input and result
    with a float32 copy and its square, or with the normed and the scaled result. In tiles: those of
    one, beside the pixels of all.
    """
    config = anatomy.parts["vae"].config
    size, blended = anatomy.latent_size, 0
    if tile is not None:
        ratio = pixels_per_cell(config)
        blended = 3 * width * (ratio * sum(tile_sides(size, tile, ratio))) ** 2
        size = tile // ratio
    channels, layers = config[f"{side}_block_out_channels"], config[f"{side}_layers_per_block"]
    stages = len(channels)
    most = 0
    for stage, blocks in enumerate(layers):
        if not blocks:
            continue
        cells = (size << (stages - 1 - stage)) ** 2
        here = channels[stage] * cells * (2 * width + max(2 * width, 2 * SINGLE))
        came_in = 0
        if side == "encoder":
            came_in = width * channels[stage] * cells if blocks > 1 else 0
        elif stage + 1 < stages:
            came_in = width * channels[stage + 1] * cells // 4
        most = max(most, here + came_in)
    return pictures * (most + blended)
