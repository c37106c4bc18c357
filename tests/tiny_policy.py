"""The smallest policy of the true architecture, and recipes that train it in a second a step."""

import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.seeds import counter_seed
from data.scenes import TASKS, caption, sample_scene
from policy import Policy
from policy.connector import Connector
from policy.image_tokenizer import ImageTokenizer
from policy.text import build_tokenizer
from policy.tiny import tiny_config
from rl.start_policy import SCHEDULER

CODES, SIDE, WIDTH, HIDDEN = 64, 6, 32, 64


def new_policy() -> Policy:
    """Random weights, far from uniform: a wrong slice, mask or temperature then shows."""
    rng = np.random.default_rng(0)
    tasks = dict.fromkeys(TASKS, 1.0)
    captions = [caption(sample_scene(rng, tasks, "train")) for _ in range(300)]
    tokenizer = build_tokenizer(captions, 300, CODES)
    config = replace(tiny_config(tokenizer), num_image_tokens=CODES)
    torch.manual_seed(counter_seed(0, "tiny test policy"))
    language_model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,  # the smallest that vLLM's CPU attention knows
            max_position_embeddings=512,
            tie_word_embeddings=False,
            initializer_range=0.15,
            pad_token_id=config.pad_id,
            eos_token_id=config.eos_id,
            bos_token_id=None,
        )
    )
    head = SanaTransformer2DModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        mlp_ratio=2.0,
        sample_size=SIDE,
        patch_size=1,
        interpolation_scale=1,
    )
    image_tokenizer = ImageTokenizer(
        {
            "encoder": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": config.image_size,
                "patch_size": config.image_size // SIDE,
            },
            "select_layer": -2,
            "bottleneck_dim": 8,
            "codebook_size": CODES,
            "pixel_decoder_width": 32,
        }
    )
    channels = (8, 8, 16, 16)
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=config.latent_channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.7,
    )
    connector = Connector(HIDDEN, WIDTH, positions=1 + config.num_tokens)
    torch.nn.init.normal_(connector.position)
    return Policy(
        config,
        tokenizer,
        language_model,
        image_tokenizer,
        connector,
        head,
        autoencoder,
        dict(SCHEDULER),
    ).eval()


REDNESS = '''
import numpy as np

def redness(images, prompts):
    """Differs between any two pictures of random weights."""
    return [10 * float(np.asarray(image, dtype=float)[..., 0].mean()) for image in images]
'''

RECIPE = """
extends: geneval-scenes
name: tiny
policy: {{path: {path}, device: cpu}}
rollout: {{group_size: 4, prompts_per_step: 4}}
decode:
  train: {{steps: 2, guidance: 1.0}}
  eval: {{steps: 2, guidance: 1.0}}
rewards: {{functions: [{{use: "{reward}"}}]}}
train: {{steps: 6, learning_rate: 1e-2}}
evals: {{every: 0}}
save: {{every: 2, keep_last: 2}}
"""


def write_recipe(
    folder: Path, policy: Path, reward: str = "redness.py:redness", code: str = REDNESS
) -> Path:
    """Write a recipe of six steps, 4 prompts x 4 samples, with its reward file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "redness.py").write_text(textwrap.dedent(code))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(path=policy, reward=reward))
    return path
