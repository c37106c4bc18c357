"""A small checkpoint in the published format with random weights, laid out as in spec 1.8."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_policy import HIDDEN, SIDE, WIDTH, new_policy

from policy import Policy
from policy.connector import Connector
from policy.image_tokenizer import ImageTokenizer
from policy.published import EDIT_TEMPLATE, PROMPT_TEMPLATE

VISION = "model.vision_tower.vision_tower."


def edit_policy() -> Policy:
    """The tiny test policy as the published model is: no positions, references by both routes."""
    policy = new_policy()
    torch.manual_seed(1)
    config = policy.image_tokenizer.config
    policy.image_tokenizer = ImageTokenizer(
        {key: value for key, value in config.items() if key != "pixel_decoder_width"}
    )
    policy.connector = Connector(HIDDEN, WIDTH)
    policy.reference_connector = Connector(policy.config.latent_channels, WIDTH)
    edit_template = EDIT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    policy.config = replace(
        policy.config,
        prompt_template=PROMPT_TEMPLATE,
        edit_template=edit_template,
        routes=("cross_attention", "noise_space"),
    )
    return policy.eval()


def published_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under their published names, in bfloat16."""
    tokenizer = policy.image_tokenizer
    parts = {
        "": policy.ar,
        "model.diffusion_connector.": policy.connector,
        "model.und_image_vae_connector.": policy.reference_connector,
        "model.sana.": policy.diffusion,
        "model.sana_vae.": policy.vae,
        f"{VISION}encoder.": tokenizer.encoder,
        f"{VISION}encode_task_layer.": tokenizer.encode_task_layer,
        f"{VISION}bottleneck.in_linear.": tokenizer.in_linear,
        f"{VISION}bottleneck.regularizer.": tokenizer.quantizer,
    }
    tensors = {
        prefix + name: tensor.bfloat16().contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    for name in ("decoder.x", "decode_task_layer.0.weight", "bottleneck.out_linear.weight"):
        tensors[VISION + name] = torch.randn(3, 4).bfloat16()
    tensors["model.und_image_vae_as_noise_connector.0.weight"] = torch.randn(4, 8, 1, 1).bfloat16()
    return tensors


def write_published(policy: Policy, folder: Path) -> tuple[Path, Path, Path]:
    """Write checkpoint, diffusion configs and image tokenizer; return their paths."""
    checkpoint, diffusion = folder / "checkpoint", folder / "diffusion"
    policy.tokenizer.save_pretrained(checkpoint)
    tensors = published_tensors(policy)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    language_model = policy.ar.config.to_dict()
    language_model["rope_theta"] = language_model.pop("rope_parameters")["rope_theta"]
    config = policy.config
    facts = language_model | {
        "model_type": "blip3o_qwen",
        "architectures": ["blip3oQwenForInferenceLM"],
        "rope_scaling": None,
        "image_start_tag_id": config.im_start_id,
        "image_end_tag_id": config.im_end_id,
        "scale_start_token_id": config.scale_start_id,
        "num_scale_tokens": config.num_scale_tokens,
        "image_start_token_id": config.image_start_id,
        "image_end_token_id": config.image_start_id + config.num_image_tokens - 1,
        "num_image_tokens": config.num_image_tokens,
        "use_und_image_vae": True,
        "use_und_image_vae_as_noise": True,
        "only_use_und_image_vae_as_noise": False,
    }
    (checkpoint / "config.json").write_text(json.dumps(facts))
    for name, part in (("transformer", policy.diffusion), ("vae", policy.vae)):
        part.save_config(diffusion / name)
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True,
        "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    }  # fmt: skip
    (diffusion / "scheduler").mkdir()
    (diffusion / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    own = policy.image_tokenizer.config
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text(json.dumps({"vision_config": own["encoder"]}))
    args = {
        "bottleneck": {
            "name": "bottleneck",
            "args": {
                "bottleneck_dim": own["bottleneck_dim"],
                "norm": "none",
                "regularizer": {
                    "name": "simvq",
                    "args": {"codebook_size": own["codebook_size"], "l2_normalized": True},
                },
            },
        },
        "bottleneck_token_num": SIDE * SIDE,
        "input_size": own["encoder"]["image_size"],
        "teacher": "somebody/teacher",
        "input_type": "quant",
        "select_layer_id": -2,
    }
    weights = {
        name.removeprefix(VISION): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(VISION)
    }
    file = folder / "ta_tok.pth"
    torch.save({"model": {"args": args, "sd": weights | {"teacher.x": torch.zeros(1)}}}, file)
    return checkpoint, diffusion, file
