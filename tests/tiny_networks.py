"""Small networks with random weights of fixed seeds, saved in the formats of the published ones."""

import json
from pathlib import Path

import torch


def save_tiny_clip(folder: Path, name: str = "tiny-clip") -> dict[str, str]:
    """Register a small CLIP architecture with open_clip, save weights, return {model, weights}."""
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    weights = folder / f"{name}.pt"
    torch.save(open_clip.create_model(name).state_dict(), weights)
    return {"model": name, "weights": str(weights)}


def tiny_qwen3(**changes):
    """Return a small `Qwen3ForCausalLM` that vLLM's CPU attention takes (heads of 32), seed 0."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform: a wrong logit then shows
    }
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**config | changes)).eval()


def byte_level_clip_tokenizer(folder: Path):
    """A CLIP tokenizer whose words are single bytes."""
    from transformers import CLIPTokenizer

    table = "".join(map(chr, range(33, 127)))
    vocabulary = {c: i for i, c in enumerate([*table, *(f"{c}</w>" for c in table)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>"
    )


def tiny_mask2former():
    """Return a small `Mask2FormerForUniversalSegmentation` for 80 classes, seed 0."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=8,
        dim_feedforward=64,
        num_queries=12,
        num_labels=80,
    )
    torch.manual_seed(0)
    network = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # the usual start is so small that every output looks alike
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def as_mmdet(network) -> dict[str, torch.Tensor]:
    """Return the tensors of a small Mask2Former as mmdet 2.x saves them.

    Written part by part from mmdet's module tree, not by turning round the code under test.
    """
    own = dict(network.state_dict())
    saved: dict[str, torch.Tensor] = {}

    def take(mmdet: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in own:
                saved[f"{mmdet}.{kind}"] = own[f"{ours}.{kind}"]

    def stack(ours: str, kind: str) -> torch.Tensor:
        return torch.cat([own[f"{ours}.{part}_proj.{kind}"] for part in "qkv"])

    swin = "model.pixel_level_module.encoder"
    take("backbone.patch_embed.projection", f"{swin}.swin.embeddings.patch_embeddings.projection")
    take("backbone.patch_embed.norm", f"{swin}.swin.embeddings.norm")
    for stage, depth in enumerate(network.config.backbone_config.depths):
        take(f"backbone.norm{stage}", f"{swin}.hidden_states_norms.stage{stage + 1}")
        layers = f"{swin}.swin.encoder.layers.{stage}"
        for block in range(depth):
            to, of = f"backbone.stages.{stage}.blocks.{block}", f"{layers}.blocks.{block}"
            take(f"{to}.norm1", f"{of}.layernorm_before")
            take(f"{to}.norm2", f"{of}.layernorm_after")
            take(f"{to}.attn.w_msa.proj", f"{of}.attention.o_proj")
            take(f"{to}.ffn.layers.0.0", f"{of}.mlp.fc1")
            take(f"{to}.ffn.layers.1", f"{of}.mlp.fc2")
            table = "relative_position_bias_table"
            bias = own[f"{of}.attention.relative_position_bias.{table}"]
            saved[f"{to}.attn.w_msa.{table}"] = bias
            saved[f"{to}.attn.w_msa.relative_position_index"] = torch.zeros(16, 16)
            for kind in ("weight", "bias"):
                saved[f"{to}.attn.w_msa.qkv.{kind}"] = stack(f"{of}.attention", kind)
        if stage < 3:
            for name in ("reduction.weight", "norm.weight", "norm.bias"):
                value = own[f"{layers}.downsample.{name}"]
                saved[f"backbone.stages.{stage}.downsample.{name}"] = as_unfolded(value)
    head, pixels = "panoptic_head.pixel_decoder", "model.pixel_level_module.decoder"
    for level in range(3):
        take(f"{head}.input_convs.{level}.conv", f"{pixels}.input_projections.{level}.0")
        take(f"{head}.input_convs.{level}.gn", f"{pixels}.input_projections.{level}.1")
    take(f"{head}.lateral_convs.0.conv", f"{pixels}.adapter_1.0")
    take(f"{head}.lateral_convs.0.gn", f"{pixels}.adapter_1.1")
    take(f"{head}.output_convs.0.conv", f"{pixels}.layer_1.0")
    take(f"{head}.output_convs.0.gn", f"{pixels}.layer_1.1")
    take(f"{head}.mask_feature", f"{pixels}.mask_projection")
    saved[f"{head}.level_encoding.weight"] = own[f"{pixels}.level_embed"]
    for layer in range(network.config.encoder_layers):
        to, of = f"{head}.encoder.layers.{layer}", f"{pixels}.encoder.layers.{layer}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            take(f"{to}.attentions.0.{part}", f"{of}.self_attn.{part}")
        take(f"{to}.ffns.0.layers.0.0", f"{of}.fc1")
        take(f"{to}.ffns.0.layers.1", f"{of}.fc2")
        take(f"{to}.norms.0", f"{of}.self_attn_layer_norm")
        take(f"{to}.norms.1", f"{of}.final_layer_norm")
    queries = "model.transformer_module"
    for layer in range(network.config.decoder_layers - 1):
        to = f"panoptic_head.transformer_decoder.layers.{layer}"
        of = f"{queries}.decoder.layers.{layer}"
        for kind in ("weight", "bias"):
            cross = own[f"{of}.cross_attn.in_proj_{kind}"]
            saved[f"{to}.attentions.0.attn.in_proj_{kind}"] = cross
            saved[f"{to}.attentions.1.attn.in_proj_{kind}"] = stack(f"{of}.self_attn", kind)
        take(f"{to}.attentions.0.attn.out_proj", f"{of}.cross_attn.out_proj")
        take(f"{to}.attentions.1.attn.out_proj", f"{of}.self_attn.out_proj")
        take(f"{to}.ffns.0.layers.0.0", f"{of}.fc1")
        take(f"{to}.ffns.0.layers.1", f"{of}.fc2")
        take(f"{to}.norms.0", f"{of}.cross_attn_layer_norm")
        take(f"{to}.norms.1", f"{of}.self_attn_layer_norm")
        take(f"{to}.norms.2", f"{of}.final_layer_norm")
    take("panoptic_head.transformer_decoder.post_norm", f"{queries}.decoder.layernorm")
    take("panoptic_head.query_embed", f"{queries}.queries_embedder")
    take("panoptic_head.query_feat", f"{queries}.queries_features")
    take("panoptic_head.level_embed", f"{queries}.level_embed")
    take("panoptic_head.cls_embed", "class_predictor")
    for index in range(3):
        of = f"{queries}.decoder.mask_predictor.mask_embedder.{index}.0"
        take(f"panoptic_head.mask_embed.{2 * index}", of)
    return saved


def as_unfolded(value: torch.Tensor) -> torch.Tensor:
    """Reorder the last axis as mmdet does when it reads Swin's own weights.

    Swin: four pixels (top left, bottom left, top right, bottom right), each with all channels.
    mmdet: each channel with its pixels in the order of `nn.Unfold`, row by row.
    """
    channels = value.shape[-1] // 4
    pixels = value.reshape(*value.shape[:-1], 4, channels)[..., [0, 2, 1, 3], :]
    return pixels.transpose(-1, -2).reshape(value.shape)
