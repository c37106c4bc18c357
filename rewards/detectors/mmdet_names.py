"""Reading an mmdet checkpoint of Mask2Former with a Swin backbone into transformers' model.

mmdet 2.x (`mask2former_swin-*_coco`) and transformers hold the same network under other names. Two
things differ beyond names. mmdet keeps query, key and value of a Swin block in one matrix, as it
does in the decoder's self-attention. And its patch merging unfolds each 2 x 2 patch channel by
channel, row by row, where Swin's own, which transformers follows, goes pixel by pixel, column by
column.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from common.errors import RewardError

if TYPE_CHECKING:
    from transformers import Mask2FormerConfig

_SWIN = "model.pixel_level_module.encoder"
_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_POINTS = 4
_LEVELS = 3
_DECODER_HEADS = 8
_SPLIT = ("q_proj", "k_proj", "v_proj")
_NOT_WEIGHTS = re.compile(r"relative_position_index$|^panoptic_head\.loss_")

_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone.patch_embed.projection.", f"{_SWIN}.swin.embeddings.patch_embeddings.projection."),
    (r"backbone.patch_embed.norm.", f"{_SWIN}.swin.embeddings.norm."),
    (r"backbone.norm0.", f"{_SWIN}.hidden_states_norms.stage1."),
    (r"backbone.norm1.", f"{_SWIN}.hidden_states_norms.stage2."),
    (r"backbone.norm2.", f"{_SWIN}.hidden_states_norms.stage3."),
    (r"backbone.norm3.", f"{_SWIN}.hidden_states_norms.stage4."),
    (r"backbone.stages.(\d+).downsample.", rf"{_SWIN}.swin.encoder.layers.\1.downsample."),
    (r"backbone.stages.(\d+).blocks.(\d+).", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2."),
    (r"pixel_decoder.input_convs.(\d+).conv.", rf"{_PIXELS}.input_projections.\1.0."),
    (r"pixel_decoder.input_convs.(\d+).gn.", rf"{_PIXELS}.input_projections.\1.1."),
    (r"pixel_decoder.encoder.layers.(\d+).", rf"{_PIXELS}.encoder.layers.\1."),
    (r"pixel_decoder.level_encoding.weight", f"{_PIXELS}.level_embed"),
    (r"pixel_decoder.lateral_convs.0.conv.", f"{_PIXELS}.adapter_1.0."),
    (r"pixel_decoder.lateral_convs.0.gn.", f"{_PIXELS}.adapter_1.1."),
    (r"pixel_decoder.output_convs.0.conv.", f"{_PIXELS}.layer_1.0."),
    (r"pixel_decoder.output_convs.0.gn.", f"{_PIXELS}.layer_1.1."),
    (r"pixel_decoder.mask_feature.", f"{_PIXELS}.mask_projection."),
    (r"transformer_decoder.layers.(\d+).", rf"{_QUERIES}.decoder.layers.\1."),
    (r"transformer_decoder.post_norm.", f"{_QUERIES}.decoder.layernorm."),
    (r"query_embed.", f"{_QUERIES}.queries_embedder."),
    (r"query_feat.", f"{_QUERIES}.queries_features."),
    (r"level_embed.", f"{_QUERIES}.level_embed."),
    (r"cls_embed.", "class_predictor."),
    (r"mask_embed.0.", f"{_QUERIES}.decoder.mask_predictor.mask_embedder.0.0."),
    (r"mask_embed.2.", f"{_QUERIES}.decoder.mask_predictor.mask_embedder.1.0."),
    (r"mask_embed.4.", f"{_QUERIES}.decoder.mask_predictor.mask_embedder.2.0."),
)
"""Where a part of the network lies (in mmdet, "panoptic_head." stands before all but the backbone;
a dot in the pattern is a dot). The first rule that matches the start of a name is applied."""

_INSIDE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        f"{_SWIN}.swin.encoder",
        (
            ("norm1.", "layernorm_before."),
            ("norm2.", "layernorm_after."),
            ("attn.w_msa.relative_position_bias_table",
             "attention.relative_position_bias.relative_position_bias_table"),
            ("attn.w_msa.qkv.", "attention.{qkv}."),
            ("attn.w_msa.proj.", "attention.o_proj."),
            ("ffn.layers.0.0.", "mlp.fc1."),
            ("ffn.layers.1.", "mlp.fc2."),
        ),
    ),
    (
        f"{_PIXELS}.encoder",
        (
            ("attentions.0.", "self_attn."),
            ("ffns.0.layers.0.0.", "fc1."),
            ("ffns.0.layers.1.", "fc2."),
            ("norms.0.", "self_attn_layer_norm."),
            ("norms.1.", "final_layer_norm."),
        ),
    ),
    (
        f"{_QUERIES}.decoder.layers",
        (
            ("attentions.0.attn.", "cross_attn."),
            ("attentions.1.attn.in_proj_", "self_attn.{qkv}."),
            ("attentions.1.attn.out_proj.", "self_attn.out_proj."),
            ("ffns.0.layers.0.0.", "fc1."),
            ("ffns.0.layers.1.", "fc2."),
            ("norms.0.", "cross_attn_layer_norm."),
            ("norms.1.", "self_attn_layer_norm."),
            ("norms.2.", "final_layer_norm."),
        ),
    ),
)  # fmt: skip
"""How the layers of each part name their tensors; {qkv} is split into three."""


def is_mmdet(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether these tensors have mmdet's names."""
    return "panoptic_head.cls_embed.weight" in state


def from_mmdet(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names of `Mask2FormerForUniversalSegmentation`.

    Raises RewardError naming a tensor that is not one of such a checkpoint.
    """
    return {
        new_name: new
        for name, value in state.items()
        if not _NOT_WEIGHTS.search(name)
        for new_name, new in _converted(name, value)
    }


def config_of(state: Mapping[str, torch.Tensor]) -> "Mask2FormerConfig":
    """Return the configuration of an mmdet checkpoint, read from the shapes of its tensors."""
    from transformers import Mask2FormerConfig, SwinConfig

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise RewardError(
                f"mmdet checkpoint: no tensor `{name}`. Fix: give one of Mask2Former with a Swin "
                "backbone, as mmdet 2.x publishes them."
            )
        return state[name].shape

    def count(pattern: str) -> int:
        return 1 + max(int(m[1]) for name in state if (m := re.match(pattern, name)))

    table = "attn.w_msa.relative_position_bias_table"
    heads = [shape(f"backbone.stages.{i}.blocks.0.{table}")[1] for i in range(4)]
    window = (round(shape(f"backbone.stages.0.blocks.0.{table}")[0] ** 0.5) + 1) // 2
    encoder, decoder = "panoptic_head.pixel_decoder.encoder", "panoptic_head.transformer_decoder"
    offsets = shape(f"{encoder}.layers.0.attentions.0.sampling_offsets.weight")[0]
    encoder_heads = offsets // (2 * _POINTS * _LEVELS)
    if encoder_heads != _DECODER_HEADS:
        raise RewardError(
            f"mmdet checkpoint: {encoder_heads} heads in the pixel decoder; {_DECODER_HEADS} are "
            "expected. Fix: give a checkpoint of mmdet's own configurations."
        )
    backbone = SwinConfig(
        embed_dim=shape("backbone.patch_embed.projection.weight")[0],
        depths=[count(rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(4)],
        num_heads=heads,
        window_size=window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    classes, hidden = shape("panoptic_head.cls_embed.weight")
    config: Any = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=shape("panoptic_head.pixel_decoder.lateral_convs.0.conv.weight")[0],
        mask_feature_size=shape("panoptic_head.pixel_decoder.mask_feature.weight")[0],
        hidden_dim=hidden,
        encoder_feedforward_dim=shape(f"{encoder}.layers.0.ffns.0.layers.0.0.weight")[0],
        encoder_layers=count(rf"{re.escape(encoder)}\.layers\.(\d+)\."),
        # transformers counts the prediction before the first layer too.
        decoder_layers=1 + count(rf"{re.escape(decoder)}\.layers\.(\d+)\."),
        dim_feedforward=shape(f"{decoder}.layers.0.ffns.0.layers.0.0.weight")[0],
        num_attention_heads=_DECODER_HEADS,
        num_queries=shape("panoptic_head.query_feat.weight")[0],
        num_labels=classes - 1,
    )
    return config


def _converted(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    new = _renamed(name)
    if ".downsample." in new:
        value = _pixel_by_pixel(value)
    if "{qkv}" not in new:
        yield new, value
        return
    for part, third in zip(_SPLIT, value.chunk(3), strict=True):
        yield new.replace("{qkv}", part), third.clone()


def _renamed(name: str) -> str:
    for pattern, start in _RULES:
        if match := re.match(pattern.replace(".", r"\."), name.removeprefix("panoptic_head.")):
            new, rest = match.expand(start), match.string[match.end() :]
            for part, inside in _INSIDE:
                if new.startswith(part):
                    old, replacement = next(
                        ((o, r) for o, r in inside if rest.startswith(o)), ("", "")
                    )
                    rest = replacement + rest[len(old) :]
            return new + rest
    raise RewardError(
        f"mmdet checkpoint: the tensor `{name}` is not one of Mask2Former with a Swin backbone. "
        "Fix: give that checkpoint."
    )


def _pixel_by_pixel(value: torch.Tensor) -> torch.Tensor:
    """Reorder the last axis from channel * 4 + (row * 2 + column) to (column * 2 + row) * C + c."""
    *rest, width = value.shape
    patches = value.reshape(*rest, width // 4, 2, 2)  # [..., channel, row, column]
    axes = range(len(rest))
    return patches.permute(*axes, -1, -2, -3).reshape(*rest, width).clone()
