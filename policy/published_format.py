"""The published checkpoint format: names of its tensors and its configs.

Source: spec sections 1.1 (ids), 1.3 (image tokenizer) and 1.8 (layout). One
checkpoint holds every part; a policy folder holds each part apart, under its library's names.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import SiglipVisionConfig

from common.errors import PolicyError
from policy.quiet import refused_as

VISION = "model.vision_tower.vision_tower."

PREFIXES = (
    # (folder of the policy, published prefix, prefix inside the folder); the first match counts.
    ("connector", "model.diffusion_connector.", ""),
    ("reference_connector", "model.und_image_vae_connector.", ""),
    ("diffusion", "model.sana.", ""),
    ("vae", "model.sana_vae.", ""),
    ("image_tokenizer", f"{VISION}encoder.", "encoder."),
    ("image_tokenizer", f"{VISION}encode_task_layer.", "encode_task_layer."),
    ("image_tokenizer", f"{VISION}bottleneck.in_linear.", "in_linear."),
    (
        "image_tokenizer",
        f"{VISION}bottleneck.regularizer.embedding.",
        "quantizer.embedding.",
    ),
    (
        "image_tokenizer",
        f"{VISION}bottleneck.regularizer.embedding_proj.",
        "quantizer.embedding_proj.",
    ),
    # What no picture depends on; it is kept for the way back.
    ("upstream", f"{VISION}decoder.", ""),
    ("upstream", f"{VISION}decode_task_layer.", ""),
    ("upstream", f"{VISION}scale_layer.", ""),
    ("upstream", f"{VISION}bottleneck.out_linear.", ""),
    ("upstream", f"{VISION}bottleneck.regularizer.stochastic_temperature_inv", ""),
    ("upstream", "model.und_image_vae_as_noise_connector.", ""),
    ("upstream", "model.tar_siglip_features_connector.", ""),
    ("ar", "model.embed_tokens.", "model.embed_tokens."),
    ("ar", "model.layers.", "model.layers."),
    ("ar", "model.norm.", "model.norm."),
    ("ar", "lm_head.", "lm_head."),
)

LANGUAGE_MODEL_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "attention_bias", "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def place(name: str) -> tuple[str, str] | None:
    """Return (folder, name inside it) of a published tensor; None for an unknown one.

    In the folder `upstream` tensors keep their published names.
    """
    for folder, prefix, inside in PREFIXES:
        if name.startswith(prefix):
            return folder, name if folder == "upstream" else inside + name[len(prefix) :]
    return None


def published_name(folder: str, name: str) -> str:
    """Return the published name of a tensor of a policy folder's part."""
    for other, prefix, inside in PREFIXES:
        if other == folder and name.startswith(inside) and name != "position":
            return name if folder == "upstream" else prefix + name[len(inside) :]
    raise PolicyError(f"{folder}: the published format has no place for the tensor {name}.")


def routes_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the reference routes that a published config.json switches on (spec section 1.9)."""
    routes = []
    if config.get("use_und_image_vae") and not config.get("only_use_und_image_vae_as_noise"):
        routes.append("cross_attention")
    if config.get("use_und_image_vae_as_noise"):
        routes.append("noise_space")
    return tuple(routes)


def flags_of(routes: tuple[str, ...]) -> dict[str, bool]:
    """Return the published flags of reference routes: `routes_of` the other way."""
    return {
        "use_und_image_vae": bool(routes),
        "use_und_image_vae_as_noise": "noise_space" in routes,
        "only_use_und_image_vae_as_noise": routes == ("noise_space",),
    }


class Tensors:
    """Tensors of a folder of safetensors files, read one by one."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dictionary
                        other = self._files.setdefault(name, file)
                        if other != file:
                            raise PolicyError(
                                f"the tensor {name} is in {other} and in {file}.\n"
                                "    Fix: take the file away that is no part of the checkpoint."
                            )
                        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise PolicyError(
                    f"{file} cannot be read ({error}).\n    Fix: download it again."
                ) from error

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as stored, file by file."""
        for file in sorted({self._files[name] for name in names}):
            with safe_open(file, "pt") as opened:
                for name in names:
                    if self._files[name] == file:
                        yield name, opened.get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise PolicyError(
                f"{index}: weight_map does not map tensors to files.\n    Fix: download it again."
            )
        files = [folder / name for name in sorted(set(where.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        what = f"{missing[0]} is missing" if missing else f"{folder} holds no .safetensors file"
        raise PolicyError(f"{what}.\n    Fix: download the whole checkpoint.")
    return files


@dataclass(frozen=True)
class PublishedTokenizer:
    """The image tokenizer file: `model.args` and `model.sd` (spec section 1.3)."""

    file: Path
    args: dict[str, Any]
    weights: dict[str, Tensor]
    """Under the names of a checkpoint."""

    @classmethod
    def load(cls, file: Path) -> "PublishedTokenizer":
        """Read a .pth file without running code from it; raise `PolicyError` if it is another."""
        if not file.is_file():
            raise PolicyError(f"{file} is not a file.\n    Fix: give the path of ta_tok.pth.")
        with refused_as(f"{file} is not an image tokenizer", "give the published ta_tok.pth."):
            # The published file keeps its arguments in dictionaries of the package easydict.
            with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
                facts = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["model"]
            args, weights = dict(facts["args"]), dict(facts["sd"])
            kept = {VISION + n: t for n, t in weights.items() if not n.startswith("teacher")}
            if not all(isinstance(tensor, Tensor) for tensor in kept.values()):
                raise TypeError("model.sd holds something else than tensors")
        return cls(file, args, kept)

    def config(self) -> dict[str, Any]:
        """Return the configuration of a policy's `ImageTokenizer`."""
        regularizer = "bottleneck.args.regularizer"
        for key, published, known in (
            ("input_type", "quant", "quant"),
            ("bottleneck.args.norm", "none", "none"),
            (f"{regularizer}.name", None, "simvq"),
            (f"{regularizer}.args.l2_normalized", False, True),
        ):
            found = self._get(key, published)
            if found != known:
                raise PolicyError(f"{self.file}: {key} is {found!r}; only {known!r} is known.")
        encoder = self._encoder()
        layer, layers = self._get("select_layer_id", -2), encoder["num_hidden_layers"]
        if type(layer) is not int or not -layers <= layer < 0:
            raise PolicyError(
                f"{self.file}: select_layer_id is {layer!r}, and not -1 to {-layers}."
            )
        tokens, side = self._count("bottleneck_token_num", 256), self.grid()
        if tokens != side * side or side != encoder["image_size"] // encoder["patch_size"]:
            raise PolicyError(
                f"{self.file}: bottleneck_token_num is {tokens}, and its encoder cuts pictures of "
                f"{encoder['image_size']} px into patches of {encoder['patch_size']}."
            )
        return {
            "encoder": encoder,
            "select_layer": layer,
            "bottleneck_dim": self._count("bottleneck.args.bottleneck_dim"),
            "codebook_size": self._count(f"{regularizer}.args.codebook_size"),
        }

    def grid(self) -> int:
        """Return image tokens per side."""
        return math.isqrt(self._count("bottleneck_token_num", 256))

    def image_size(self) -> int:
        """Return the side of the picture that it sees, in pixels."""
        return self._count("input_size", 384)

    def _count(self, key: str, published: int | None = None) -> int:
        value = self._get(key, published)
        if type(value) is not int or value < 1:
            raise PolicyError(
                f"{self.file}: {key} is {value!r}, and no number above 0.\n"
                "    Fix: give the published file."
            )
        return value

    def _get(self, key: str, published: Any = None) -> Any:
        """Return `model.args` at a dotted key, or the default that the published class has.

        Without a default PolicyError names the key.
        """
        value: Any = self.args
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                if published is not None:
                    return published
                raise PolicyError(
                    f"{self.file}: model.args has no {key}.\n    Fix: give the published file."
                )
            value = value[name]
        return value

    def _encoder(self) -> dict[str, Any]:
        """SigLIP's sizes, from the config of the teacher: a folder beside the file, or a hub id."""
        teacher = str(self._get("teacher", "google/siglip2-so400m-patch14-384"))
        beside = self.file.parent / Path(teacher).name
        path = beside / "config.json"
        if not path.is_file():
            path = config_file(teacher, "config.json", f"put it into {beside}")
        vision = read_json(path).get("vision_config", {})
        if not isinstance(vision, dict):
            raise PolicyError(f"{path}: vision_config is {vision!r}, and no JSON object.")
        keys = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "image_size", "patch_size", "hidden_act", "layer_norm_eps",
        )  # fmt: skip
        usual = SiglipVisionConfig().to_dict()
        usual = {key: usual[key] for key in keys}
        check_values(path, vision, usual)
        return usual | {key: vision[key] for key in keys if key in vision}


def config_file(source: str, name: str, fix: str = "give its folder") -> Path:
    """Return a file of a folder or of a repository on the Hugging Face hub.

    `fix` says where a person puts the file that cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source) / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise PolicyError(
            f"{source} is neither a folder here nor a repository that can be reached "
            f"({type(error).__name__}).\n    Fix: download {name} of it and {fix}."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; raise `PolicyError` naming the file."""
    fix = "download it again, or give another folder."
    with refused_as(f"{file} cannot be read as JSON", fix):
        facts = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise PolicyError(f"{file} is not a JSON object.\n    Fix: {fix}")
    return facts


def check_values(file: Path, facts: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Raise PolicyError for a value of another kind than the `usual` one of its key.

    Counts and other numbers have to be above 0, unless they are the usual ones. Libraries take
    some wrong values without a word, and fail while a picture is drawn.
    """
    for key, like in usual.items():
        value = facts.get(key, like)
        if isinstance(like, bool):
            right = isinstance(value, bool)
        elif isinstance(like, int | float):
            right = type(value) in (int, type(like)) and (value == like or 0 < value < math.inf)
        elif isinstance(like, str | list | tuple):  # one word may stand for one a stage
            right = isinstance(value, str | list | tuple)
        else:
            right = True
        if not right:
            raise PolicyError(
                f"{file}: {key} is {value!r}; usual is {like!r}.\n    Fix: download it again."
            )
