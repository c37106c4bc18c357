"""The tiny policy: the published architecture, from the same classes, at scene-world size."""

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from policy.config import PolicyConfig
from policy.connector import Connector
from policy.image_tokenizer import ImageTokenizer

CODES = 512
GRID = 6
PATCH = 8
LATENT_CHANNELS = 16
WIDTH = 128
TEMPLATE = "<|im_start|>{prompt}<|im_end|>"


def tiny_image_tokenizer() -> ImageTokenizer:
    """48 px, 6 x 6 tokens, 512 codes."""
    return ImageTokenizer(
        {
            "encoder": {
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "image_size": GRID * PATCH,
                "patch_size": PATCH,
            },
            "select_layer": -2,
            "bottleneck_dim": 16,
            "codebook_size": CODES,
            "pixel_decoder_width": 256,
        }
    )


def tiny_autoencoder() -> AutoencoderDC:
    """8 x 8 pixels to one latent cell of 16 channels, 1.2 M parameters."""
    channels = (16, 32, 64, 128)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        scaling_factor=1.0,
    )


def tiny_language_model(vocabulary: int, pad_id: int, eos_id: int) -> Qwen3ForCausalLM:
    """Qwen3 with 6 layers of width 128."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=pad_id,
            eos_token_id=eos_id,
            bos_token_id=None,
        )
    )


def tiny_head(hidden_size: int) -> tuple[Connector, SanaTransformer2DModel]:
    """SANA with 3 layers of width 128 and its connector, started so that cells find their rows.

    A randomly started head of this size learns a picture of the prompt and ignores the tokens.
    Four choices make row 1 + i of the condition speak of cell i from the first step: the
    positions added by the connector are the head's own sine-cosine ones, stretched over the small
    grid; the caption projection starts as the identity; every cross-attention's keys start equal
    to its queries.
    """
    head = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=WIDTH // 4,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        mlp_ratio=2.0,
        sample_size=GRID,
        patch_size=1,
        interpolation_scale=1,
    )
    connector = Connector(hidden_size, WIDTH, positions=1 + GRID * GRID)
    with torch.no_grad():
        connector.position[1:] = 2 * head.patch_embed.pos_embed[0]  # type: ignore[index]
        _start_as_identity(head.caption_projection.linear_1, head.caption_projection.linear_2)
        for block in head.transformer_blocks:
            block.attn2.to_k.weight.copy_(block.attn2.to_q.weight)
            block.attn2.to_k.bias.copy_(block.attn2.to_q.bias)
    return connector, head


def _start_as_identity(first: torch.nn.Linear, second: torch.nn.Linear, shift: float = 4.0) -> None:
    """Make second(gelu(first(x))) = x for |x| below the shift, where GELU is linear."""
    for linear, bias in ((first, shift), (second, -shift)):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.constant_(linear.bias, bias)


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> PolicyConfig:
    """Read the ids off the tokenizer and fill in the tiny sizes."""

    def id_of(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    return PolicyConfig(
        image_size=GRID * PATCH,
        tokenizer_image_size=GRID * PATCH,
        grid=GRID,
        latent_channels=LATENT_CHANNELS,
        latent_size=GRID,
        im_start_id=id_of("<im_start>"),
        im_end_id=id_of("<im_end>"),
        scale_start_id=id_of("<S0>"),
        num_scale_tokens=3,
        image_start_id=id_of("<I0>"),
        num_image_tokens=CODES,
        pad_id=int(tokenizer.pad_token_id),
        eos_id=int(tokenizer.eos_token_id),
        prompt_template=TEMPLATE,
        steps=6,
        guidance=1.5,
    )
