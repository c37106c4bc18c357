"""Between a published checkpoint and a policy folder, tensor by tensor, one part in memory."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common.atomic import atomic_dir
from common.errors import PolicyError
from policy import published, published_format
from policy.config import PolicyConfig
from policy.connector import Connector
from policy.image_tokenizer import ImageTokenizer
from policy.published_format import PublishedTokenizer, Tensors, config_file, read_json
from policy.quiet import quiet_libraries, refused_as

UPSTREAM = "upstream"
"""Folder of a policy for what the published checkpoint holds and no picture depends on."""

LACKING = "lacking.json"
"""In that folder: parts that came from another file, so the way back leaves them out."""

WEIGHTS = {
    "diffusion": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_AGAIN = "download it again."


def convert(checkpoint: Path, diffusion: str, image_tokenizer: Path, out: Path) -> PolicyConfig:
    """Write the policy folder `out` of a published checkpoint (text to image, or editing).

    `diffusion` is a folder or hub repository with the configs `transformer`, `vae` and `scheduler`,
    `image_tokenizer` the published ta_tok.pth. Weights keep their stored type. Raises `PolicyError`
    that names the file, key or tensor, and then leaves nothing; `out` must not exist.
    """
    if not checkpoint.is_dir():
        raise PolicyError(f"{checkpoint} is not a folder.\n    Fix: give that of the checkpoint.")
    facts = read_json(checkpoint / "config.json")
    for key in (*_IDS, "image_end_token_id", "num_image_tokens", "num_scale_tokens", *_SIZES):
        if key not in facts:
            raise PolicyError(
                f"{checkpoint}/config.json has no {key}.\n    Fix: give a BLIP3o-NEXT checkpoint."
            )
        if type(facts[key]) is not int or facts[key] < (key in _SIZES):
            raise PolicyError(
                f"{checkpoint}/config.json: {key} is {facts[key]!r}, which is no such number.\n"
                "    Fix: download config.json again."
            )
    if facts.get("use_tar_siglip_features"):
        raise PolicyError(
            f"{checkpoint}/config.json: use_tar_siglip_features is on. References as SigLIP "
            "features in the prompt are not supported; as image tokens they are."
        )
    tokenizer_file = PublishedTokenizer.load(image_tokenizer)
    tensors = Tensors(checkpoint)
    with quiet_libraries(), torch.device("meta"):
        parts = _empty_parts(checkpoint / "config.json", facts, diffusion, tokenizer_file, tensors)
    places = _places(tensors, parts, tokenizer_file)
    _check_tied_head(facts, tensors, checkpoint)
    with atomic_dir(out) as folder:
        for name in published_format.TOKENIZER_FILES:
            for target in (folder / "tokenizer", folder / UPSTREAM):
                target.mkdir(exist_ok=True)
                if (checkpoint / name).is_file():
                    shutil.copyfile(checkpoint / name, target / name)
        config = _describe(checkpoint, facts, parts, tokenizer_file, folder / "tokenizer")
        config.save(folder)
        for part, module in parts.items():
            _save_config(module, folder / part)
        _save_scheduler(diffusion, folder / "scheduler")
        for name in ("config.json", "generation_config.json"):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / UPSTREAM / name)
        for part in (*parts, UPSTREAM):
            inside = {name: local for name, (at, local) in places.items() if at == part}
            weights = {inside[name]: tensor for name, tensor in tensors.read([*inside])}
            if part == "image_tokenizer" and not weights:
                weights = _file_weights(tokenizer_file)
                (folder / UPSTREAM / LACKING).write_text(json.dumps([part]) + "\n")
            if part != UPSTREAM:
                _check_finite(part, weights)
            if weights:
                file = folder / part / WEIGHTS.get(part, "model.safetensors")
                save_file(weights, file, metadata={"format": "pt"})
    return config


def to_upstream(policy: Path, out: Path) -> int:
    """Write a converted policy as a published checkpoint again; return the number of tensors.

    Names, types and values are those of the policy's parts; tensors that it does not use and the
    tokenizer are as they were. `out` must not exist.
    """
    config = PolicyConfig.load(policy)
    kept = policy / UPSTREAM
    if not (kept / "config.json").is_file():
        raise PolicyError(
            f"{policy} was not converted from a published checkpoint: {kept}/config.json is "
            "missing.\n    Fix: give a policy that `atelier convert` wrote, or one trained from it."
        )
    facts = read_json(kept / "config.json")
    if config.routes != published_format.routes_of(facts):
        facts |= published_format.flags_of(config.routes)
    lacking = json.loads((kept / LACKING).read_text()) if (kept / LACKING).is_file() else []
    folders = [
        place
        for place in sorted(policy.iterdir())
        if any(place.glob("*.safetensors")) and place.name not in lacking
    ]
    with atomic_dir(out) as folder:
        where: dict[str, str] = {}
        for number, place in enumerate(folders, 1):
            file = f"model-{number:05}-of-{len(folders):05}.safetensors"
            tensors = Tensors(place)
            weights = {
                published_format.published_name(place.name, name): tensor
                for name, tensor in tensors.read([*tensors.shapes])
            }
            save_file(weights, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(weights, file)
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for file_path in kept.glob("*.*"):
            if file_path.suffix != ".safetensors" and file_path.name != LACKING:
                shutil.copyfile(file_path, folder / file_path.name)
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return len(where)


# --- what the parts must look like ---------------------------------------------------------------


def _empty_parts(
    file: Path,
    facts: dict[str, Any],
    diffusion: str,
    tokenizer_file: PublishedTokenizer,
    tensors: Tensors,
) -> dict[str, Any]:
    """Return the parts without memory behind their weights: folder -> module.

    `facts` are those of the checkpoint's config.json, `file`.
    """
    if facts.get("use_sliding_window"):
        raise PolicyError(f"{file}: use_sliding_window is on; only full attention is known.")
    usual = Qwen3Config().to_dict() | {"rope_theta": 1e6}
    kept = {key: facts[key] for key in published_format.LANGUAGE_MODEL_KEYS if key in facts}
    published_format.check_values(file, kept, {key: usual.get(key) for key in kept})
    kept["tie_word_embeddings"] = _is_tied(facts, tensors)
    with refused_as(f"{file}: no language model can be made of it", _AGAIN):
        language_model = Qwen3ForCausalLM(Qwen3Config(**kept))
    tokenizer_config = tokenizer_file.config()
    with refused_as(f"{tokenizer_file.file}: no image tokenizer can be made of it", _AGAIN):
        image_tokenizer = ImageTokenizer(tokenizer_config)
    head = _of_diffusers(SanaTransformer2DModel, config_file(diffusion, "transformer/config.json"))
    vae = _of_diffusers(AutoencoderDC, config_file(diffusion, "vae/config.json"))
    width = int(head.config.caption_channels)
    parts: dict[str, Any] = {
        "ar": language_model,
        "image_tokenizer": image_tokenizer,
        "connector": Connector(int(facts["hidden_size"]), width),
        "diffusion": head,
        "vae": vae,
    }
    stored = any(name.startswith("model.und_image_vae_connector.") for name in tensors.shapes)
    if stored or "cross_attention" in published_format.routes_of(facts):
        parts["reference_connector"] = Connector(int(vae.config.latent_channels), width)
    return parts


def _of_diffusers(kind: Any, file: Path) -> Any:
    """Return a module of one of diffusers' classes, which take any value without a check."""
    facts = read_json(file)
    if facts.get("_class_name", kind.__name__) != kind.__name__:
        raise PolicyError(
            f"{file}: _class_name is {facts['_class_name']!r}, and not {kind.__name__}.\n"
            "    Fix: give the --diffusion that the checkpoint was trained with."
        )
    usual = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    published_format.check_values(file, facts, usual)
    with refused_as(f"{file}: no {kind.__name__} can be made of it", _AGAIN):
        return kind.from_config(facts)


def _is_tied(facts: dict[str, Any], tensors: Tensors) -> bool:
    return bool(facts.get("tie_word_embeddings")) or _HEAD not in tensors.shapes


def _check_tied_head(facts: dict[str, Any], tensors: Tensors, checkpoint: Path) -> None:
    if not facts.get("tie_word_embeddings") or _HEAD not in tensors.shapes:
        return
    both = dict(tensors.read([_HEAD, _EMBEDDING]))
    if not torch.equal(both[_HEAD], both[_EMBEDDING]):
        raise PolicyError(
            f"{checkpoint}: config.json ties {_HEAD} to {_EMBEDDING}, and the two differ.\n"
            "    Fix: write tie_word_embeddings: false if the head was trained apart."
        )


def _places(
    tensors: Tensors, parts: dict[str, Any], tokenizer_file: PublishedTokenizer
) -> dict[str, tuple[str, str]]:
    """Return published name -> (folder, name inside it), all names and shapes checked."""
    expected = {
        published_format.published_name(part, name): tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    optional = {_HEAD} if parts["ar"].config.tie_word_embeddings else set()
    own = {n: tuple(t.shape) for n, t in tokenizer_file.weights.items()}
    if not any(name.startswith(published_format.VISION) for name in tensors.shapes):
        optional |= {name for name in expected if name.startswith(published_format.VISION)}
        _check_file_weights(tokenizer_file, {name: expected[name] for name in optional - {_HEAD}})
    places: dict[str, tuple[str, str]] = {}
    for name, shape in tensors.shapes.items():
        place = published_format.place(name)
        unused = place is not None and place[0] == UPSTREAM
        if place is None or not (unused or name in expected):
            raise PolicyError(
                f"the checkpoint's tensor {name} {list(shape)} is unknown.\n"
                "    Fix: check that --diffusion and --image-tokenizer belong to this checkpoint."
            )
        wanted = own.get(name, shape) if unused else expected[name]
        if shape != wanted:
            raise PolicyError(
                f"the checkpoint's tensor {name} has the shape {list(shape)}, expected "
                f"{list(wanted)}.\n"
                "    Fix: check that --diffusion and --image-tokenizer belong to this checkpoint."
            )
        places[name] = place
    if missing := sorted(expected.keys() - places.keys() - optional):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PolicyError(
            f"the checkpoint has no tensor {missing[0]}{more}.\n"
            "    Fix: download the whole checkpoint; check --diffusion and --image-tokenizer."
        )
    return places


def _check_file_weights(
    tokenizer_file: PublishedTokenizer, expected: dict[str, tuple[int, ...]]
) -> None:
    """Check that the file has exactly these tensors, published name -> shape, and unused ones."""
    found = {name: tuple(tensor.shape) for name, tensor in tokenizer_file.weights.items()}
    for name in sorted(found.keys() | expected.keys()):
        place = published_format.place(name)
        if found.get(name) != expected.get(name) and (place is None or place[0] != UPSTREAM):
            raise PolicyError(
                f"{tokenizer_file.file}: the tensor {name.removeprefix(published_format.VISION)} "
                f"has the shape {found.get(name, 'missing')}, expected "
                f"{expected.get(name, 'no such tensor')}.\n    Fix: {_AGAIN}"
            )


def _check_finite(part: str, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        what = None
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            what = f"{tensor.dtype} instead of float32, bfloat16 or float16"
        elif not tensor.isfinite().all():
            what = "numbers that are not finite"
        if what:
            raise PolicyError(
                f"the tensor {published_format.published_name(part, name)} holds {what}.\n"
                "    Fix: download the checkpoint again."
            )


def _file_weights(tokenizer_file: PublishedTokenizer) -> dict[str, Tensor]:
    """Weights of an image tokenizer that only its own file holds."""
    places = {name: published_format.place(name) for name in tokenizer_file.weights}
    return {
        place[1]: tokenizer_file.weights[name].contiguous()
        for name, place in places.items()
        if place is not None and place[0] == "image_tokenizer"
    }


# --- the description -----------------------------------------------------------------------------


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
"""What config.json has to say of the language model; of the rest Qwen3 has defaults."""
_IDS = {
    "image_start_tag_id": "<im_start>",
    "image_end_tag_id": "<im_end>",
    "scale_start_token_id": "<S0>",
    "image_start_token_id": "<I0>",
}


def _describe(
    checkpoint: Path,
    facts: dict[str, Any],
    parts: dict[str, Any],
    tokenizer_file: PublishedTokenizer,
    tokenizer_folder: Path,
) -> PolicyConfig:
    """Return the policy's description; ids are those of config.json, checked by the tokenizer."""
    where = f"{checkpoint}/config.json"
    tokenizer = _tokenizer(checkpoint, tokenizer_folder)
    _check_ids(where, facts, tokenizer)
    vae, head = parts["vae"].config, parts["diffusion"].config
    grid = tokenizer_file.grid()
    codes = int(facts["num_image_tokens"])
    if codes != tokenizer_file.config()["codebook_size"]:
        raise PolicyError(
            f"{where}: num_image_tokens is {codes}, and {tokenizer_file.file} has "
            f"{tokenizer_file.config()['codebook_size']} codes.\n"
            "    Fix: give the image tokenizer of this checkpoint."
        )
    scale = 2 ** (len(vae.encoder_block_out_channels) - 1)
    routes = published_format.routes_of(facts)
    edits = routes or "reference_connector" in parts
    return PolicyConfig(
        image_size=head.sample_size * scale,
        tokenizer_image_size=tokenizer_file.image_size(),
        grid=grid,
        latent_channels=vae.latent_channels,
        latent_size=head.sample_size,
        im_start_id=int(facts["image_start_tag_id"]),
        im_end_id=int(facts["image_end_tag_id"]),
        scale_start_id=int(facts["scale_start_token_id"]),
        num_scale_tokens=int(facts["num_scale_tokens"]),
        image_start_id=int(facts["image_start_token_id"]),
        num_image_tokens=codes,
        pad_id=int(tokenizer.pad_token_id),
        eos_id=int(tokenizer.eos_token_id),
        prompt_template=published.PROMPT_TEMPLATE,
        steps=published.STEPS,
        guidance=published.GUIDANCE,
        edit_template=published.edit_template(tokenizer.get_vocab()) if edits else None,
        routes=routes,
        provenance={"converted_from": checkpoint.resolve().name},
    )


def _tokenizer(checkpoint: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Read the copy in `folder` of the checkpoint's tokenizer."""
    with refused_as(f"{checkpoint}/tokenizer.json cannot be read", _AGAIN), quiet_libraries():
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise PolicyError(
                f"{checkpoint}/tokenizer_config.json has no {name}.\n    Fix: download it again."
            )
    return tokenizer


def _check_ids(where: str, facts: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Check the ids of config.json: the tokenizer must know them under the published names.

    The tokenizer may hold more tokens than the embedding has rows: training adds `<image>`.
    """
    vocabulary = tokenizer.get_vocab()
    last = f"<I{int(facts['num_image_tokens']) - 1}>"
    for key, token in {**_IDS, "image_end_token_id": last}.items():
        if vocabulary.get(token) != facts[key]:
            raise PolicyError(
                f"{where}: {key} is {facts[key]}, and the tokenizer beside it has {token} at "
                f"{vocabulary.get(token)}.\n    Fix: take both from the same checkpoint."
            )


def _save_config(module: Any, folder: Path) -> None:
    if isinstance(module, Qwen3ForCausalLM):
        module.config.architectures = ["Qwen3ForCausalLM"]
        module.config.save_pretrained(folder)
    else:
        module.save_config(folder)


def _save_scheduler(diffusion: str, folder: Path) -> None:
    """Write the scheduler as the published code reads it: as Euler flow matching.

    A DPM-solver config has `flow_shift`, which that code never looks at: its shift is 1.
    """
    file = config_file(diffusion, "scheduler/scheduler_config.json")
    found, known = read_json(file), FlowMatchEulerDiscreteScheduler().config
    published_format.check_values(file, found, dict(known))
    with refused_as(f"{file}: no scheduler can be made of it", _AGAIN):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(found)
    folder.mkdir()
    facts = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    facts |= {
        key: value for key, value in scheduler.config.items() if key in known and key[0] != "_"
    }
    (folder / "scheduler_config.json").write_text(json.dumps(facts, indent=2) + "\n")
