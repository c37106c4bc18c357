"""Preference rewards: published file formats, small random weights, independent computations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_preference import HEADS, save_aesthetic_head, save_image_reward, save_pick_score

from common.errors import RewardError
from rewards import load_reward
from rewards.preference import aesthetic, clip_score, hps_v2, image_reward, pick_score

RNG = np.random.default_rng(5)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
PROMPTS = ["a red dog", "two cups on a bench", "a sign"]


@pytest.fixture(scope="module")
def clip_features(tiny_clip):
    """Unit features by open_clip alone: pictures [3, 32] and prompts [3, 32]."""
    import open_clip

    network, _, prepare = open_clip.create_model_and_transforms(
        tiny_clip["model"], pretrained=tiny_clip["weights"]
    )
    network.eval()
    with torch.inference_mode():
        seen = network.encode_image(torch.stack([prepare(picture) for picture in PICTURES]))
        read = network.encode_text(open_clip.get_tokenizer(tiny_clip["model"])(PROMPTS))
    return [features / features.norm(dim=1, keepdim=True) for features in (seen, read)]


@pytest.mark.parametrize("function", [clip_score, hps_v2])
def test_clip_rewards_are_the_cosine(function, tiny_clip, clip_features):
    seen, read = clip_features
    expected = [float(a @ b) for a, b in zip(seen, read, strict=True)]
    got = function(PICTURES, PROMPTS, **tiny_clip)
    assert got == pytest.approx(expected, abs=1e-6)
    assert len(set(got)) == 3


def test_hps_sees_the_whole_picture_and_clip_score_its_middle(tiny_clip):
    """HPSv2's code scales the longer side and pads with black; CLIP's cuts to the middle."""
    strip = Image.fromarray(RNG.integers(0, 256, (40, 160, 3), dtype=np.uint8))
    square = Image.new("RGB", (160, 160))
    square.paste(strip, (0, 60))
    middle = strip.crop((60, 0, 100, 40))
    for function, same, other in ((hps_v2, square, middle), (clip_score, middle, square)):
        whole, alike, unlike = (
            function([picture], PROMPTS[:1], **tiny_clip)[0] for picture in (strip, same, other)
        )
        assert whole == pytest.approx(alike, abs=2e-3)
        assert abs(whole - unlike) > 1e-2


def test_hps_reads_the_published_file_format(tiny_clip, tmp_path):
    """HPS_v2.1_compressed.pt holds its tensors under "state_dict"."""
    state = torch.load(tiny_clip["weights"], weights_only=True)
    torch.save({"epoch": 0, "state_dict": state}, tmp_path / "hps.pt")
    args = {"model": tiny_clip["model"], "weights": str(tmp_path / "hps.pt")}
    assert hps_v2(PICTURES, PROMPTS, **args) == hps_v2(PICTURES, PROMPTS, **tiny_clip)


def test_safetensors_are_read_too(tiny_clip, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(tiny_clip["weights"], weights_only=True)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "clip.safetensors")
    args = {"model": tiny_clip["model"], "weights": str(tmp_path / "clip.safetensors")}
    assert clip_score(PICTURES, PROMPTS, **args) == clip_score(PICTURES, PROMPTS, **tiny_clip)


def test_pick_score(tmp_path):
    network, processor = save_pick_score(tmp_path)
    expected = []
    for picture, prompt in zip(PICTURES, PROMPTS, strict=True):
        with torch.inference_mode():
            seen = network.get_image_features(
                **processor.image_processor(picture, return_tensors="pt")
            )
            read = network.get_text_features(**processor.tokenizer(prompt, return_tensors="pt"))
        seen, read = (getattr(x, "pooler_output", x)[0] for x in (seen, read))
        expected.append(100 * float(seen @ read / seen.norm() / read.norm()) / 26)
    got = pick_score(
        PICTURES, PROMPTS, weights=str(tmp_path / "weights"), processor=str(tmp_path / "processor")
    )
    assert got == pytest.approx(expected, abs=1e-4)
    assert len(set(got)) == 3


def test_aesthetic_is_five_linear_layers_on_the_clip_feature(tiny_clip, clip_features, tmp_path):
    """sac+logos+ava1-l14-linearMSE.pth: layers.0, 2, 4, 6, 7, dropouts between the first four."""
    layers = save_aesthetic_head(tmp_path / "head.pth")
    value = clip_features[0]
    for number in [0, 2, 4, 6, 7]:
        value = value @ layers[f"layers.{number}.weight"].T + layers[f"layers.{number}.bias"]
    got = aesthetic(PICTURES, head=str(tmp_path / "head.pth"), **tiny_clip)
    assert got == pytest.approx(value[:, 0].tolist(), rel=1e-4)
    assert got == aesthetic(PICTURES, head=str(tmp_path / "head.pth"), **tiny_clip)  # no dropout


# --- ImageReward ----------------------------------------------------------------------------------


def bert_forward(state, layers, ids, mask, seen):
    """BERT written out: [T] ids, [T] mask and the picture's [S, W] -> the first token."""
    from torch.nn.functional import gelu, layer_norm, linear

    def dense(name, x):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        name = f"{name}.LayerNorm"
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def attend(name, x, other, allowed):
        def heads(y):
            return y.reshape(len(y), HEADS, 64).transpose(0, 1)

        q = heads(dense(f"{name}.self.query", x))
        k = heads(dense(f"{name}.self.key", other))
        v = heads(dense(f"{name}.self.value", other))
        scores = (q @ k.transpose(1, 2) / 8).masked_fill(~allowed, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
        return norm(f"{name}.output", dense(f"{name}.output.dense", mixed) + x)

    embedded = state["embeddings.word_embeddings.weight"][ids]
    x = norm("embeddings", embedded + state["embeddings.position_embeddings.weight"][: len(ids)])
    everything = torch.ones(len(seen), dtype=bool)
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        x = attend(f"{layer}.attention", x, x, mask.bool())
        x = attend(f"{layer}.crossattention", x, seen, everything)
        inner = gelu(dense(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output", dense(f"{layer}.output.dense", inner) + x)
    return x[0]


@pytest.fixture(scope="module")
def image_reward_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    return folder, *save_image_reward(folder)


def test_image_reward_computes_what_its_parts_written_out_do(image_reward_files):
    from torchvision.transforms import v2
    from transformers import AutoTokenizer

    folder, vit, text, head = image_reward_files
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = []
    for picture, prompt in zip(PICTURES, PROMPTS, strict=True):
        small = picture.resize((32, 32), Image.Resampling.BICUBIC)
        pixels = v2.functional.normalize(
            v2.functional.to_dtype(v2.functional.to_image(small), torch.float32, scale=True),
            list(clip_mean),
            list(clip_std),
        )
        words = tokenizer(prompt, padding="max_length", max_length=35, return_tensors="pt")
        with torch.inference_mode():
            seen = vit.forward_features(pixels[None])[0]
            ids, mask = words["input_ids"][0], words["attention_mask"][0]
            value = bert_forward(text, 2, ids, mask, seen)
        for number in [0, 2, 4, 6, 7]:
            value = head[f"{number}.weight"] @ value + head[f"{number}.bias"]
        expected.append((float(value) - 0.16717362830052426) / 1.0333394966054072)
    got = image_reward(
        PICTURES,
        PROMPTS,
        weights=str(folder / "ImageReward.pt"),
        tokenizer=str(folder / "tokenizer"),
    )
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert max(got) - min(got) > 0.1


def test_image_reward_names_a_tensor_that_is_not_its_own(image_reward_files, tmp_path):
    folder = image_reward_files[0]
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    tokenizer = str(folder / "tokenizer")

    def refused(changed, words):
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(RewardError, match=words):
            image_reward(PICTURES, PROMPTS, weights=str(tmp_path / "x.pt"), tokenizer=tokenizer)

    refused(state | {"unet.weight": torch.zeros(1)}, "`unet.weight`")
    refused({k: v for k, v in state.items() if k != "mlp.layers.6.bias"}, "`6.bias` is missing")
    refused({k: v for k, v in state.items() if "word_embeddings" not in k}, "word_embeddings")


# --- weights that are not there -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("clip_score", {}),
        ("hps_v2", {}),
        ("pick_score", {}),
        ("image_reward", {}),
        ("aesthetic", {"head": "/nowhere/head.pth"}),
    ],
)
def test_missing_weights_are_named(name, args):
    function = load_reward(name, weights="/nowhere/weights.pt", **args)
    with pytest.raises(RewardError, match=r"/nowhere/.*Fix: "):
        function(PICTURES, PROMPTS)


def test_damaged_weights_are_refused(tiny_clip, tmp_path):
    whole = Path(tiny_clip["weights"]).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RewardError, match=r"cut\.pt cannot be loaded"):
        clip_score(PICTURES, PROMPTS, weights=str(tmp_path / "cut.pt"), model=tiny_clip["model"])
    with pytest.raises(RewardError, match="no model `ViT-Z`"):
        clip_score(PICTURES, PROMPTS, weights=tiny_clip["weights"], model="ViT-Z")


def test_a_transformers_model_that_lacks_tensors_is_refused_not_filled_at_random(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Dinov2Config, Dinov2Model

    from rewards.networks.weights import from_pretrained

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"`layernorm\.weight`"):
        from_pretrained(Dinov2Model, str(tmp_path), None, "dino")
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 16
