"""Whatever is wrong with a published checkpoint: an error that names the file and the key."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_checkpoint import edit_policy, write_published
from safetensors.torch import load_file, save_file

from common.errors import PolicyError
from policy.convert import convert
from policy.quiet import refused_as

CONFIG = "checkpoint/config.json"
SANA = "diffusion/transformer/config.json"
DC_AE = "diffusion/vae/config.json"
SCHEDULER = "diffusion/scheduler/scheduler_config.json"
TEACHER = "teacher/config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "published"
    write_published(edit_policy(), folder)
    return folder


@pytest.fixture
def published(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "published"))


def refusal(published: Path) -> str:
    """Return what convert says; nothing may be written."""
    out = published.parent / "policy"
    with pytest.raises(PolicyError) as caught:
        convert(
            published / "checkpoint", str(published / "diffusion"), published / "ta_tok.pth", out
        )
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (CONFIG, "head_dim", "32"),
        (CONFIG, "head_dim", None),
        (CONFIG, "head_dim", -32),
        (CONFIG, "rope_theta", "1e6"),
        (CONFIG, "rms_norm_eps", "1e-6"),
        (CONFIG, "rms_norm_eps", float("nan")),
        (CONFIG, "attention_bias", "no"),
        (CONFIG, "eos_token_id", "end"),
        (CONFIG, "rope_scaling", {"rope_type": "nothing"}),
        (SANA, "sample_size", None),
        (SANA, "caption_channels", "64"),
        (SANA, "mlp_ratio", True),
        (SANA, "timestep_scale", None),
        (SANA, "_class_name", "FluxTransformer2DModel"),
        (DC_AE, "scaling_factor", "0.4"),
        (DC_AE, "latent_channels", 0),
        (DC_AE, "decoder_block_types", 7),
        (SCHEDULER, "num_train_timesteps", -5),
        (SCHEDULER, "shift", [3]),
        (TEACHER, "vision_config", [1]),
        (TEACHER, "vision_config", {"hidden_size": "64"}),
    ],
)
def test_an_odd_value_is_named_with_its_file(name, key, value, published):
    file = published / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    told = refusal(published)
    assert str(file) in told
    words = [str(word) for pair in value.items() for word in pair] if type(value) is dict else [key]
    assert any(word in told for word in words)


@pytest.mark.parametrize("name", [CONFIG, SANA, DC_AE, SCHEDULER, TEACHER])
@pytest.mark.parametrize("text", ["[1]", '{"hidden_size": ', None])
def test_a_config_that_is_no_object_is_named(name, text, published, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = published / name
    file.unlink()
    if text is not None:
        file.write_text(text)
    told = refusal(published)
    if name == TEACHER and text is None:  # then it is looked for on the hub, which is not here
        assert f"config.json of it and put it into {file.parent}" in told
    else:
        assert str(file) in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bottleneck_token_num", 35),
        ("bottleneck_token_num", "36"),
        ("bottleneck_token_num", 25),
        ("select_layer_id", 3),
        ("select_layer_id", "last"),
        ("input_size", None),
        ("bottleneck.args.bottleneck_dim", -8),
        ("bottleneck.args.regularizer.args.codebook_size", "64"),
    ],
)
def test_an_odd_argument_of_the_image_tokenizer_is_named(key, value, published):
    file = published / "ta_tok.pth"
    stored = torch.load(file, weights_only=True)
    place = stored["model"]["args"]
    *path, last = key.split(".")
    for name in path:
        place = place[name]
    place[last] = value
    torch.save(stored, file)
    told = refusal(published)
    assert str(file) in told
    assert key in told


def test_weights_of_an_image_tokenizer_that_are_no_tensors_are_refused(published):
    file = published / "ta_tok.pth"
    stored = torch.load(file, weights_only=True)
    stored["model"]["sd"]["encoder.x"] = "text"
    torch.save(stored, file)
    assert "model.sd" in refusal(published)


@pytest.mark.parametrize("change", ["missing", "wrongly shaped", "unknown"])
def test_a_damaged_tensor_of_an_image_tokenizer_that_only_its_file_holds_is_named(
    change, published
):
    weights = published / "checkpoint" / "model.safetensors"
    kept = {n: t for n, t in load_file(weights).items() if "vision_tower" not in n}
    save_file(kept, weights, {"format": "pt"})
    file = published / "ta_tok.pth"
    stored = torch.load(file, weights_only=True)
    name = "bottleneck.in_linear.bias"
    tensor = stored["model"]["sd"].pop(name)
    if change == "wrongly shaped":
        stored["model"]["sd"][name] = tensor[:-1]
    elif change == "unknown":
        stored["model"]["sd"] |= {name: tensor, (name := "encoder.x"): tensor.clone()}
    torch.save(stored, file)
    told = refusal(published)
    assert str(file) in told
    assert name in told


@pytest.mark.parametrize("kind", [torch.int64, torch.float8_e4m3fn])
def test_a_tensor_of_another_type_is_named(kind, published):
    file = published / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(kind)
    save_file(tensors, file, {"format": "pt"})
    assert f"model.norm.weight holds {kind}" in refusal(published)


@pytest.mark.parametrize("where", [[1], {"model.norm.weight": 7}, None])
def test_an_index_that_maps_to_no_files_is_named(where, published):
    file = published / "checkpoint" / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": where}))
    assert f"{file}: weight_map" in refusal(published)


@pytest.mark.parametrize("kind", ["list", "unigram", "another vocabulary"])
def test_a_tokenizer_of_another_kind_is_refused(kind, published):
    file = published / "checkpoint" / "tokenizer.json"
    facts = json.loads(file.read_text())
    if kind == "list":
        file.write_text("[]")
    elif kind == "unigram":
        model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
        file.write_text(json.dumps(facts | {"model": model}))
    else:
        facts["added_tokens"] = [t for t in facts["added_tokens"] if t["content"] != "<im_start>"]
        file.write_text(json.dumps(facts))
    told = refusal(published)
    assert str(published / "checkpoint") in told
    assert "tokenizer" in told


def test_a_mistyped_checkpoint_is_no_folder(published):
    (published / "checkpoint").rename(published / "another")
    assert f"{published / 'checkpoint'} is not a folder" in refusal(published)


@pytest.mark.parametrize("kind", [MemoryError, ImportError])
def test_what_the_file_is_not_to_blame_for_passes(kind):
    with pytest.raises(kind), refused_as("the file cannot be read", "download it again."):
        raise kind


def test_the_scheduler_has_only_what_it_was_given(published):
    out = published.parent / "policy"
    convert(published / "checkpoint", str(published / "diffusion"), published / "ta_tok.pth", out)
    stored = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert [key for key in stored if key.startswith("_")] == ["_class_name"]
