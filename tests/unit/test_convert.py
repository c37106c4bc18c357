"""A published checkpoint becomes a policy folder and a published checkpoint again."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from published_checkpoint import VISION, edit_policy, published_tensors, write_published
from safetensors.torch import load_file, save_file

from common.errors import PolicyError
from policy import Policy
from policy.convert import convert, to_upstream


@pytest.fixture(scope="module")
def made() -> Policy:
    return edit_policy()


@pytest.fixture
def published(made, tmp_path) -> tuple[Path, Path, Path]:
    return write_published(made, tmp_path / "published")


def run(published, out: Path):
    checkpoint, diffusion, tokenizer = published
    return convert(checkpoint, str(diffusion), tokenizer, out)


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def rewrite(published, change) -> None:
    file = published[0] / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def describe(published, **facts) -> None:
    file = published[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_converted_policy_is_the_published_one(made, published, tmp_path):
    config = run(published, tmp_path / "policy")
    policy = Policy.from_pretrained(tmp_path / "policy")
    assert policy.config == config
    for key in ("image_size", "tokenizer_image_size", "grid", "latent_channels", "latent_size"):
        assert getattr(config, key) == getattr(made.config, key), key
    assert (config.steps, config.guidance) == (30, 2.0)
    assert config.routes == ("cross_attention", "noise_space")
    # The published code reads a DPM-solver config as Euler flow matching, without its flow_shift.
    assert policy.scheduler_config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert policy.scheduler_config["shift"] == 1.0
    expected = {name: tensor.bfloat16().float() for name, tensor in made.state_dict().items()}
    assert_same(dict(policy.state_dict()), expected)
    assert policy.prompt_ids(["a red circle"]) == made.prompt_ids(["a red circle"])


def test_the_way_back_is_equal_tensor_by_tensor(made, published, tmp_path):
    run(published, tmp_path / "policy")
    assert to_upstream(tmp_path / "policy", tmp_path / "back") == len(published_tensors(made))
    assert_same(stored(tmp_path / "back"), stored(published[0]))
    for name in ("config.json", "tokenizer.json"):
        found, expected = (
            (place / name).read_text() for place in (tmp_path / "back", published[0])
        )
        assert json.loads(found) == json.loads(expected)
    # What was converted back converts again.
    run((tmp_path / "back", *published[1:]), tmp_path / "again")


def test_a_policy_saved_after_training_goes_back_with_its_new_weights(published, tmp_path):
    run(published, tmp_path / "policy")
    policy = Policy.from_pretrained(tmp_path / "policy", dtype=torch.bfloat16)
    with torch.no_grad():
        policy.ar.model.norm.weight += 1
    policy.save_pretrained(tmp_path / "trained")
    to_upstream(tmp_path / "trained", tmp_path / "back")
    expected = stored(published[0])
    expected["model.norm.weight"] = expected["model.norm.weight"] + 1
    assert_same(stored(tmp_path / "back"), expected)


def test_a_policy_that_was_not_converted_has_no_way_back(policy_folder, tmp_path):
    with pytest.raises(PolicyError, match="was not converted"):
        to_upstream(policy_folder, tmp_path / "back")


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.sana.proj_out.weight", "model.sana_vae.decoder.conv_in.bias",
     "model.diffusion_connector.3.weight", "model.und_image_vae_connector.0.bias",
     f"{VISION}encoder.embeddings.position_embedding.weight"],
)  # fmt: skip
def test_a_missing_or_misshapen_tensor_is_named(name, published, tmp_path):
    rewrite(published, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(PolicyError, match=rf"{name} has the shape"):
        run(published, tmp_path / "policy")
    rewrite(published, lambda tensors: tensors.pop(name))
    with pytest.raises(PolicyError, match=rf"no tensor {name}"):
        run(published, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("name", ["model.mystery", "model.sana.mystery", "model.layers.9.x", "x"])
def test_an_unknown_tensor_is_named(name, published, tmp_path):
    rewrite(published, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(PolicyError, match=rf"tensor {name} \[2\] is unknown"):
        run(published, tmp_path / "policy")


def test_what_pictures_do_not_depend_on_may_be_missing_or_there(published, tmp_path):
    def change(tensors):
        for name in [n for n in tensors if "decode" in n and n.startswith(VISION)]:
            tensors.pop(name)
        tensors[f"{VISION}bottleneck.regularizer.stochastic_temperature_inv"] = torch.tensor(30.0)

    rewrite(published, change)
    run(published, tmp_path / "policy")
    to_upstream(tmp_path / "policy", tmp_path / "back")
    assert_same(stored(tmp_path / "back"), stored(published[0]))


def test_an_image_tokenizer_that_only_its_file_holds_is_taken_from_there(published, tmp_path):
    expected = load_file(published[0] / "model.safetensors")

    def change(tensors):
        for name in [n for n in tensors if n.startswith(VISION)]:
            tensors.pop(name)

    rewrite(published, change)
    run(published, tmp_path / "policy")
    policy = Policy.from_pretrained(tmp_path / "policy")
    weight = policy.image_tokenizer.quantizer.embedding.weight
    assert torch.equal(weight, expected[f"{VISION}bottleneck.regularizer.embedding.weight"].float())
    policy.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    for name in ("policy", "saved"):
        to_upstream(tmp_path / name, tmp_path / f"{name}-back")
        assert_same(stored(tmp_path / f"{name}-back"), stored(published[0]))
    names = {path.name for path in (tmp_path / "policy-back").glob("*.json")}
    assert names == {p.name for p in published[0].glob("*.json")} | {"model.safetensors.index.json"}


@pytest.mark.parametrize("declared", [True, False])
def test_a_head_that_is_absent_is_the_embedding(declared, published, tmp_path):
    describe(published, tie_word_embeddings=declared)
    rewrite(published, lambda tensors: tensors.pop("lm_head.weight"))
    run(published, tmp_path / "policy")
    policy = Policy.from_pretrained(tmp_path / "policy")
    assert policy.ar.lm_head.weight is policy.ar.model.embed_tokens.weight
    to_upstream(tmp_path / "policy", tmp_path / "back")
    assert_same(stored(tmp_path / "back"), stored(published[0]))


def test_a_tied_head_may_be_stored_and_must_be_the_embedding(published, tmp_path):
    describe(published, tie_word_embeddings=True)
    with pytest.raises(PolicyError, match=r"lm_head\.weight .* differ"):
        run(published, tmp_path / "policy")
    rewrite(
        published,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    run(published, tmp_path / "policy")
    to_upstream(tmp_path / "policy", tmp_path / "back")
    assert_same(stored(tmp_path / "back"), stored(published[0]))


def test_a_tokenizer_with_an_image_token_beyond_the_embedding_is_taken(made, published, tmp_path):
    tokenizer = edit_policy().tokenizer
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(published[0])
    run(published, tmp_path / "policy")
    policy = Policy.from_pretrained(tmp_path / "policy")
    rows = policy.ar.model.embed_tokens.num_embeddings
    assert len(policy.tokenizer) == rows + 1
    [ids] = policy.prompt_ids(["an <image> of <I12>"])
    assert max(ids) < rows
    codes = torch.zeros(1, 1, policy.config.num_tokens, dtype=torch.int64)
    [ids] = policy.prompt_ids(["an <image> of <I12>"], codes)
    assert max(ids) < rows
    assert ids.count(policy.config.image_start_id) == policy.config.num_tokens


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"image_start_token_id": 7}, r"image_start_token_id is 7, and the tokenizer"),
        ({"num_image_tokens": 32}, r"image_end_token_id"),
        ({"use_tar_siglip_features": True}, r"use_tar_siglip_features is on"),
        ({"use_sliding_window": True}, r"use_sliding_window"),
        ({"hidden_size": 32}, r"has the shape"),
        ({"vocab_size": "409"}, r"config\.json: vocab_size is '409'"),
        ({"num_attention_heads": 0}, r"config\.json: num_attention_heads is 0"),
        ({"image_start_tag_id": None}, r"config\.json: image_start_tag_id is None"),
    ],
)
def test_a_config_that_does_not_fit_is_named(facts, words, published, tmp_path):
    describe(published, **facts)
    with pytest.raises(PolicyError, match=words):
        run(published, tmp_path / "policy")


def test_a_checkpoint_of_another_model_is_refused(published, tmp_path):
    (published[0] / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(PolicyError, match=r"config\.json has no image_start_tag_id"):
        run(published, tmp_path / "policy")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_size_that_config_json_lacks_is_named(key, published, tmp_path):
    file = published[0] / "config.json"
    facts = json.loads(file.read_text())
    del facts[key]
    file.write_text(json.dumps(facts))
    with pytest.raises(PolicyError, match=rf"config\.json has no {key}"):
        run(published, tmp_path / "policy")


def test_what_the_published_classes_have_defaults_for_may_be_left_out(made, published, tmp_path):
    """SanaTransformer2DModel's own: 2304 caption channels, which this checkpoint does not have."""
    file = published[1] / "transformer" / "config.json"
    facts = json.loads(file.read_text())
    del facts["caption_channels"]
    file.write_text(json.dumps(facts))
    with pytest.raises(PolicyError, match=r"diffusion_connector.* expected \[2304"):
        run(published, tmp_path / "policy")


def rewrite_tokenizer(published, change) -> None:
    stored_file = torch.load(published[2], weights_only=True)
    change(stored_file["model"]["args"])
    torch.save(stored_file, published[2])


def test_a_tokenizer_file_may_lack_what_the_published_class_has_defaults_for(published, tmp_path):
    rewrite_tokenizer(
        published,
        lambda args: [args.pop(k) for k in ("input_size", "input_type", "select_layer_id")],
    )
    assert run(published, tmp_path / "policy").tokenizer_image_size == 384
    policy = Policy.from_pretrained(tmp_path / "policy")
    assert policy.image_tokenizer.config["select_layer"] == -2


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("bottleneck", "bottleneck.args.regularizer.name"),
        ("args", "bottleneck.args.regularizer.name"),
        ("regularizer", "bottleneck.args.regularizer.name"),
        ("bottleneck_dim", "bottleneck.args.bottleneck_dim"),
        ("codebook_size", "bottleneck.args.regularizer.args.codebook_size"),
    ],
)
def test_a_key_that_a_tokenizer_file_lacks_is_named(key, named, published, tmp_path):
    def without(mapping):
        mapping.pop(key, None)
        for value in mapping.values():
            if isinstance(value, dict):
                without(value)

    rewrite_tokenizer(published, without)
    with pytest.raises(PolicyError, match=rf"ta_tok\.pth: model\.args has no {named}\."):
        run(published, tmp_path / "policy")


def test_a_tokenizer_file_of_easydict_is_read(published, tmp_path, monkeypatch):
    """The published file is pickled with the package easydict, which need not be installed."""
    module = types.ModuleType("easydict")

    class EasyDict(dict):
        def __init__(self, facts):
            for key, value in facts.items():
                kept = EasyDict(value) if isinstance(value, dict) else value
                self[key] = kept
                self.__dict__[key] = kept

    EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"
    module.EasyDict = EasyDict
    monkeypatch.setitem(sys.modules, "easydict", module)
    stored_file = torch.load(published[2], weights_only=True)
    stored_file["model"]["args"] = EasyDict(stored_file["model"]["args"])
    torch.save(stored_file, published[2])
    monkeypatch.delitem(sys.modules, "easydict")
    expected = run(published, tmp_path / "policy")
    assert expected.grid == 6


def test_scaled_rotary_positions_are_kept(published, tmp_path):
    """In the words of transformers 4, as the published config.json has them."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    describe(published, rope_scaling=scaling)
    run(published, tmp_path / "policy")
    policy = Policy.from_pretrained(tmp_path / "policy")
    found = policy.ar.config.rope_parameters
    assert {key: found[key] for key in scaling} == scaling
    assert (
        found["rope_theta"] == json.loads((published[0] / "config.json").read_text())["rope_theta"]
    )
    assert policy.ar.model.rotary_emb.attention_scaling > 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_tokenizer_file_runs_no_code(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"args": Evil(), "sd": {}}}, published[2])
    with pytest.raises(PolicyError, match=r"ta_tok\.pth is not an image tokenizer"):
        run(published, tmp_path / "policy")
    assert not Path("owned").exists()


def test_a_missing_or_truncated_shard_is_named(published, tmp_path):
    file = published[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PolicyError, match=r"model\.safetensors cannot be read"):
        run(published, tmp_path / "policy")
    index = published[0] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001.safetensors"}}))
    with pytest.raises(PolicyError, match=r"model-00001\.safetensors is missing"):
        run(published, tmp_path / "policy")


def test_a_tensor_that_two_files_hold_is_named_with_both(published, tmp_path):
    save_file({"model.norm.weight": torch.ones(2)}, published[0] / "old.safetensors")
    words = r"model\.norm\.weight is in .*model\.safetensors and in .*old\.safetensors"
    with pytest.raises(PolicyError, match=words):
        run(published, tmp_path / "policy")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.sana.proj_out.weight"])
def test_a_tensor_that_is_not_finite_is_named(name, value, published, tmp_path):
    rewrite(published, lambda tensors: tensors[name].view(-1)[1:2].fill_(value))
    with pytest.raises(PolicyError, match=rf"{name} holds numbers that are not finite"):
        run(published, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty"])
def test_a_tokenizer_that_cannot_be_read_is_named(kind, published, tmp_path):
    file = published[0] / "tokenizer.json"
    text = file.read_text()
    file.unlink()
    if kind != "missing":
        file.write_text(text[: len(text) // 2] if kind == "truncated" else "")
    with pytest.raises(PolicyError, match=r"tokenizer\.json"):
        run(published, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_a_tokenizer_without_a_pad_token_is_refused(published, tmp_path):
    file = published[0] / "tokenizer_config.json"
    facts = json.loads(file.read_text())
    del facts["pad_token"]
    file.write_text(json.dumps(facts))
    with pytest.raises(PolicyError, match=r"tokenizer_config\.json has no pad_token"):
        run(published, tmp_path / "policy")


def test_the_command_converts_and_says_what_is_missing(published, tmp_path, capsys):
    from cli.main import main

    checkpoint, diffusion, tokenizer = map(str, published)
    out, back = str(tmp_path / "policy"), str(tmp_path / "back")
    assert main(["convert", checkpoint, "--diffusion", diffusion, "--out", out]) == 2
    assert "--image-tokenizer is missing" in capsys.readouterr().err
    arguments = ["convert", checkpoint, "--diffusion", diffusion, "--image-tokenizer", tokenizer]
    assert main([*arguments, "--out", out]) == 0
    assert "cross_attention, noise_space" in capsys.readouterr().out
    assert main([*arguments, "--out", out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", out, "--to-upstream", "--out", back]) == 0
    assert_same(stored(Path(back)), stored(published[0]))
    absent = str(tmp_path / "absent")
    assert (
        main(["convert", checkpoint, "--diffusion", absent, *arguments[4:], "--out", absent]) == 1
    )
    assert "neither a folder here nor a repository" in capsys.readouterr().err
