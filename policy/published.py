"""The published architectures, by their own configurations, without any weights.

Each configuration names the file that it was read from. `published_anatomy` builds the real
transformers and diffusers classes from them on PyTorch's meta device, where a tensor has a shape
and no memory, so that sizes are those of the classes that would be loaded.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from policy.anatomy import Anatomy, Part, make_anatomy
from policy.config import PolicyConfig

if TYPE_CHECKING:
    from torch import nn

BLIP3O_NEXT = "blip3o-next-3b"
"""Name of a folder that holds the converted BLIP3o-NEXT-3B weights."""

# inference.py:35-43 and spec section 1.2.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PROMPT_TEMPLATE = (
    SYSTEM + "<|im_start|>user\nPlease generate image based on the following caption: {prompt}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_TEMPLATE = (
    SYSTEM + "<|im_start|>user\nPlease edit {images} according to the following instruction: "
    "{prompt}.\n<|vision_start|>{references}<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
)
_VISION_TAGS = ("<|vision_start|>", "<|vision_end|>")

STEPS, GUIDANCE = 30, 2.0
"""Published decoding (spec section 1.7)."""

# Qwen/Qwen3-1.7B, config.json. BLIP3o-NEXT resizes the vocabulary to 217,210 rows: 151,669 of the
# Qwen3 tokenizer, <im_start> <im_end>, <S0>..<S2>, <I0>..<I65535> (blip3o_arch.py:356-407). That
# the released weights start from the 1.7B model is read off the name of their training run.
QWEN3 = {
    "vocab_size": 217_210,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}

# Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers, transformer/config.json; the same values
# stand in diffusers, scripts/convert_sana_to_diffusers.py (SanaMS1.5_1600M_P1_D20).
SANA = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "qk_norm": "rms_norm_across_heads",
}

# mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers, config.json; the same values stand in diffusers,
# scripts/convert_dcae_to_diffusers.py (1.1 differs from 1.0 in its weights).
DC_AE = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}

# The encoder: google/siglip2-so400m-patch14-384, vision_config. The rest: csuhan/TA-Tok, the
# arguments stored in ta_tok.pth (the decoder to SigLIP features is not needed and not counted).
TA_TOK = {
    "encoder": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "select_layer": -2,
    "bottleneck_dim": 1536,
    "codebook_size": 65_536,
}

# blip3o_arch.py:31-41.
CONNECTOR = {"hidden_size": 2048, "width": 2304}

DESCRIPTION = PolicyConfig(
    image_size=1024,
    tokenizer_image_size=384,
    grid=27,
    latent_channels=32,
    latent_size=32,
    im_start_id=151_669,
    im_end_id=151_670,
    scale_start_id=151_671,
    num_scale_tokens=3,
    image_start_id=151_674,
    num_image_tokens=65_536,
    pad_id=151_643,
    eos_id=151_645,
    prompt_template=PROMPT_TEMPLATE,
    steps=STEPS,
    guidance=GUIDANCE,
)


def edit_template(vocabulary: Collection[str]) -> str:
    """Return the edit template, without the vision tags that a tokenizer does not know."""
    template = EDIT_TEMPLATE
    for tag in _VISION_TAGS:
        if tag not in vocabulary:
            template = template.replace(tag, "")
    return template


def published_anatomy() -> Anatomy:
    """Return the anatomy of BLIP3o-NEXT-3B; imports torch, transformers and diffusers."""
    from policy.quiet import quiet_libraries

    with quiet_libraries():
        modules = published_modules()
    configs: dict[str, dict[str, Any]] = {
        "ar": QWEN3,
        "image_tokenizer": TA_TOK,
        "connector": CONNECTOR,
        "diffusion": SANA,
        "vae": DC_AE,
    }
    parts = {
        name: Part(
            {key: tuple(value.shape) for key, value in module.named_parameters()}, configs[name]
        )
        for name, module in modules.items()
    }
    return make_anatomy(DESCRIPTION, parts, "the published configurations of BLIP3o-NEXT-3B")


def published_modules() -> dict[str, "nn.Module"]:
    """Return the parts of BLIP3o-NEXT-3B on the meta device, where they take no memory."""
    import torch
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from policy.connector import Connector
    from policy.image_tokenizer import ImageTokenizer

    builders: dict[str, Callable[[], nn.Module]] = {
        "ar": lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN3)),
        "image_tokenizer": lambda: ImageTokenizer(TA_TOK),
        "connector": lambda: Connector(**CONNECTOR),
        "diffusion": lambda: SanaTransformer2DModel(**SANA),
        "vae": lambda: AutoencoderDC(**DC_AE),
    }
    with torch.device("meta"):
        return {name: build() for name, build in builders.items()}
