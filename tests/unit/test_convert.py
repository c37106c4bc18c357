"""A published checkpoint becomes a policy folder and a published checkpoint again."""

import json
import os
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
