"""Published file formats of preference networks, with small random weights."""

import math
from itertools import pairwise
from pathlib import Path

import torch
from tiny_networks import byte_level_clip_tokenizer


def save_pick_score(folder: Path):
    """Write `weights` and `processor` folders; return the network and the processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = byte_level_clip_tokenizer(folder)
    tokenizer.model_max_length = 32
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "max_position_embeddings": 32,
                             "bos_token_id": len(tokenizer) - 2,
                             "eos_token_id": len(tokenizer) - 1},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    network = CLIPModel(config).eval()
    with torch.no_grad():
        network.logit_scale.fill_(math.log(100))  # as in the published weights
    network.save_pretrained(folder / "weights")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(images, tokenizer)
    processor.save_pretrained(folder / "processor")
    return network, processor


def save_aesthetic_head(file: Path) -> dict[str, torch.Tensor]:
    """Write a head for `save_tiny_clip`'s features; return its tensors."""
    torch.manual_seed(1)
    widths = [32, 24, 16, 8, 4, 1]
    layers = {}
    for number, (inputs, outputs) in zip([0, 2, 4, 6, 7], pairwise(widths), strict=True):
        layers[f"layers.{number}.weight"] = torch.randn(outputs, inputs)
        layers[f"layers.{number}.bias"] = torch.randn(outputs)
    torch.save(layers, file)
    return layers


HEADS = 2  # of 64 each


def bert_state(words, layers, seen, seed):
    """A BERT with cross-attention under its first names, hidden 128."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = 64 * HEADS, 96

    def random(*shape):
        return 0.1 * torch.randn(*shape, generator=generator)

    state = {
        "embeddings.word_embeddings.weight": random(words, width),
        "embeddings.position_embeddings.weight": random(40, width),
        "embeddings.position_ids": torch.arange(40)[None],
        "embeddings.LayerNorm.weight": 1 + random(width),
        "embeddings.LayerNorm.bias": random(width),
    }

    def linear(name, inputs, outputs):
        state[f"{name}.weight"], state[f"{name}.bias"] = random(outputs, inputs), random(outputs)

    for i in range(layers):
        for kind, keys in (("attention", width), ("crossattention", seen)):
            linear(f"encoder.layer.{i}.{kind}.self.query", width, width)
            linear(f"encoder.layer.{i}.{kind}.self.key", keys, width)
            linear(f"encoder.layer.{i}.{kind}.self.value", keys, width)
            linear(f"encoder.layer.{i}.{kind}.output.dense", width, width)
        linear(f"encoder.layer.{i}.intermediate.dense", width, inner)
        linear(f"encoder.layer.{i}.output.dense", inner, width)
        for part in ("attention", "crossattention"):
            state[f"encoder.layer.{i}.{part}.output.LayerNorm.weight"] = 1 + random(width)
            state[f"encoder.layer.{i}.{part}.output.LayerNorm.bias"] = random(width)
        state[f"encoder.layer.{i}.output.LayerNorm.weight"] = 1 + random(width)
        state[f"encoder.layer.{i}.output.LayerNorm.bias"] = random(width)
    return state


def save_image_reward(folder: Path):
    """Write ImageReward.pt and a tokenizer; return its picture encoder, text tensors and head.

    Names as published: BLIP's ViT is timm's, its BERT as written above.
    """
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "dog", "two", "cups", "on", "bench"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    torch.manual_seed(3)
    vit = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=0
    ).eval()
    text = bert_state(len(words) + 2, 2, 128, seed=4)
    head = {}
    widths = [128, 20, 12, 8, 4, 1]
    for number, (inputs, outputs) in zip([0, 2, 4, 6, 7], pairwise(widths), strict=True):
        head[f"{number}.weight"] = torch.randn(outputs, inputs)
        head[f"{number}.bias"] = torch.randn(outputs)
    state = {f"blip.visual_encoder.{k}": v for k, v in vit.state_dict().items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in text.items()}
    state |= {f"mlp.layers.{k}": v for k, v in head.items()}
    state |= {"blip.vision_proj.weight": torch.zeros(4, 128), "blip.text_proj.bias": torch.ones(4)}
    torch.save(state, folder / "ImageReward.pt")
    return vit, text, head
