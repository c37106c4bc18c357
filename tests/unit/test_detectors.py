"""Detectors for photographs: the real model classes with small random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import (
    as_mmdet,
    as_unfolded,
    byte_level_clip_tokenizer,
    tiny_mask2former,
)

from common.errors import RewardError
from rewards.detector import Detection, load_detector
from rewards.detectors import mask2former as m2f
from rewards.detectors.clip_colors import cut_out
from rewards.detectors.mmdet_names import config_of, from_mmdet
from rewards.geneval import geneval
from rewards.geneval_metadata import CLASSES, COLORS

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8))


# --- Mask2Former: preparation and results, against mmdet's description ----------------------------


@pytest.mark.parametrize(
    ("size", "inside", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((640, 480), (800, 1067), (800, 1088)),  # (width, height) -> (height, width)
        ((300, 900), (1333, 444), (1344, 448)),  # the long side decides
    ],
)
def test_pictures_are_scaled_and_padded_as_mmdet_does(size, inside, padded):
    picture = Image.new("RGB", size, (123, 116, 103))
    pixels, used = m2f.prepare(picture)
    assert used == inside
    assert tuple(pixels.shape) == (1, 3, *padded)
    expected = (np.array([123, 116, 103]) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    assert pixels[0, :, 5, 5].numpy() == pytest.approx(expected, abs=1e-5)
    assert not pixels[..., used[0] :, :].any()
    assert not pixels[..., :, used[1] :].any()


def slow_reading(classes, masks):
    """mmdet's `instance_postprocess`, pair by pair."""
    pairs = []
    for query, logits in enumerate(classes):
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        pairs += [(probabilities[label], query, label) for label in range(80)]
    pairs.sort(reverse=True)
    result = []
    for probability, query, label in pairs[:100]:
        above = masks[query] > 0
        sigmoid = 1 / (1 + np.exp(-masks[query]))
        quality = sigmoid[above].sum() / (above.sum() + 1e-6)
        ys, xs = np.nonzero(above)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
        result.append((CLASSES[label], probability * quality, box, above))
    return result


def test_results_are_read_as_mmdet_does():
    rng = np.random.default_rng(3)
    classes = rng.normal(size=(7, 81)) * 3
    masks = rng.normal(size=(7, 12, 15)) - 1
    masks[2] = -1  # an empty mask
    got = m2f.read_output(torch.from_numpy(classes), torch.from_numpy(masks))
    expected = slow_reading(classes, masks)
    assert len(got) == 100
    for item, (label, score, box, mask) in zip(got, expected, strict=True):
        assert item.label == label
        assert item.score == pytest.approx(score, rel=1e-6)
        assert item.box_xyxy == box
        if score > 0.1:
            assert np.array_equal(item.mask, mask)
    assert any(item.mask is not None for item in got)
    assert len({item.label for item in got}) > 20  # a query is found as several classes


# --- Mask2Former: the mmdet checkpoint ------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network and the file in which mmdet would have saved it."""
    network = tiny_mask2former()
    path = tmp_path_factory.mktemp("mmdet") / "mask2former.pth"
    torch.save({"meta": {"CLASSES": CLASSES}, "state_dict": as_mmdet(network)}, path)
    return network, path


def test_the_converted_network_computes_what_the_original_does(checkpoint):
    network, path = checkpoint
    loaded, official = m2f._load(str(path), None)
    assert not official
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs, ours = network(pixels), loaded(pixels)
    assert torch.equal(theirs.class_queries_logits, ours.class_queries_logits)
    assert torch.equal(theirs.masks_queries_logits, ours.masks_queries_logits)
    assert theirs.class_queries_logits.std() > 0.01


def test_patches_are_merged_as_mmdet_merges_them():
    """mmdet: `nn.Unfold(2, stride=2)`, norm, linear; transformers with the converted weights."""
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    torch.manual_seed(2)
    channels, height, width = 6, 8, 4
    norm_weight, norm_bias = torch.randn(4 * channels), torch.randn(4 * channels)
    reduction = torch.randn(2 * channels, 4 * channels)
    x = torch.randn(1, height * width, channels)
    picture = x.transpose(1, 2).reshape(1, channels, height, width)
    unfolded = torch.nn.functional.unfold(picture, 2, stride=2).transpose(1, 2)
    normal = torch.nn.functional.layer_norm(unfolded, (4 * channels,), norm_weight, norm_bias)
    expected = normal @ reduction.T

    saved = {
        "backbone.stages.0.downsample.norm.weight": norm_weight,
        "backbone.stages.0.downsample.norm.bias": norm_bias,
        "backbone.stages.0.downsample.reduction.weight": reduction,
    }
    converted = {name.split("downsample.")[1]: v for name, v in from_mmdet(saved).items()}
    assert torch.equal(as_unfolded(converted["reduction.weight"]), reduction)
    merging = SwinPatchMerging(channels)
    merging.load_state_dict(converted)
    got = merging(x, (height, width))
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_tensor_that_does_not_belong_is_named(checkpoint):
    network, _ = checkpoint
    saved = as_mmdet(network)
    with pytest.raises(RewardError, match=r"`rpn_head\.conv\.weight`"):
        from_mmdet(saved | {"rpn_head.conv.weight": torch.zeros(1)})
    del saved["panoptic_head.query_feat.weight"]
    with pytest.raises(RewardError, match=r"query_feat"):
        config_of(saved)


def test_a_checkpoint_with_a_tensor_missing_or_damaged_is_refused(checkpoint, tmp_path):
    network, path = checkpoint
    saved = as_mmdet(network)
    del saved["backbone.norm2.weight"]
    torch.save({"state_dict": saved}, tmp_path / "a.pth")
    with pytest.raises(RewardError, match=r"a\.pth.*hidden_states_norms.stage3.weight` is missing"):
        load_detector("mask2former", {"weights": str(tmp_path / "a.pth")})
    (tmp_path / "b.pth").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RewardError, match=r"b\.pth cannot be read"):
        load_detector("mask2former", {"weights": str(tmp_path / "b.pth")})
    torch.save({"weight": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(RewardError, match=r"c\.pth is not an mmdet checkpoint"):
        load_detector("mask2former", {"weights": str(tmp_path / "c.pth")})


# --- Mask2Former: the whole detector --------------------------------------------------------------


def test_it_detects_and_says_that_it_is_not_comparable(checkpoint, tiny_clip):
    network, path = checkpoint
    args = {
        "weights": str(path),
        "short_side": 64,
        "color_weights": tiny_clip["weights"],
        "color_model": tiny_clip["model"],
    }
    detector = load_detector("mask2former", args)
    assert load_detector("mask2former", dict(reversed(args.items()))) is detector
    for reason in ("not GenEval's own", "64 pixels", "ViT-L-14"):
        assert reason in detector.not_comparable
    [found] = detector.detect([PHOTO])
    assert len(found) == 100
    assert all(0 <= item.score <= 1 and item.label in CLASSES for item in found)

    pixels, (height, width) = m2f.prepare(PHOTO, 64)
    assert (height, width) == (64, 85)
    with torch.inference_mode():
        output = network(pixels)
    probabilities = output.class_queries_logits[0].softmax(-1)[:, :-1]
    assert {item.label for item in found} == {
        CLASSES[i % 80] for i in probabilities.flatten().topk(100).indices.tolist()
    }


def test_only_the_two_official_files_make_it_comparable(checkpoint, tiny_clip, monkeypatch):
    from rewards.detectors import clip_colors
    from rewards.networks.weights import sha256

    _, path = checkpoint
    args = {"color_weights": tiny_clip["weights"], "color_model": tiny_clip["model"]}
    monkeypatch.setattr(m2f, "OFFICIAL_SHA256", sha256(path)[:8])
    assert "colours" in m2f.Mask2Former(str(path), **args).not_comparable
    from pathlib import Path

    monkeypatch.setattr(clip_colors, "OPENAI_VIT_L_14", sha256(Path(tiny_clip["weights"])))
    # The right file in an architecture that is not OpenAI's (ViT-L-14 without QuickGELU).
    assert "colours" in m2f.Mask2Former(str(path), **args).not_comparable
    monkeypatch.setattr(clip_colors, "OPENAI_ARCHITECTURE", tiny_clip["model"])
    assert m2f.Mask2Former(str(path), **args).not_comparable is None
    assert "64" in m2f.Mask2Former(str(path), short_side=64, **args).not_comparable
    assert "colours" in m2f.Mask2Former(str(path)).not_comparable


def test_the_same_network_saved_by_transformers_is_not_comparable(checkpoint, tmp_path):
    network, _ = checkpoint
    network.save_pretrained(tmp_path)
    detector = m2f.Mask2Former(str(tmp_path), short_side=64)
    assert "not GenEval's own" in detector.not_comparable
    assert len(detector.detect([PHOTO])[0]) == 100


def test_geneval_scores_with_it(checkpoint):
    asked = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    args = {"weights": str(checkpoint[1]), "short_side": 64}
    [score] = geneval([PHOTO], [asked], detector="mask2former", detector_args=args)
    assert score.value == 0.0  # random weights are never sure of anything
    assert score.details["detector"] == "mask2former"
    assert "not GenEval's own" in score.details["not_comparable"]


# --- colours --------------------------------------------------------------------------------------


def test_an_object_is_cut_out_over_grey():
    picture = Image.new("RGB", (10, 8), (200, 0, 0))
    mask = np.zeros((8, 10), bool)
    mask[2:4, 3:6] = True
    cut = cut_out(picture, Detection("dog", 0.9, (3.0, 2.0, 8.0, 6.0), mask))
    assert cut.size == (5, 4)
    assert cut.getpixel((0, 0)) == (200, 0, 0)
    assert cut.getpixel((4, 3)) == (0x99, 0x99, 0x99)
    whole = cut_out(picture, Detection("dog", 0.9, (3.0, 2.0, 8.0, 6.0)))
    assert whole.getpixel((4, 3)) == (200, 0, 0)


def test_colors_are_told_by_the_official_recipe(tiny_clip):
    """Independent: the templates typed out, one text at a time, through open_clip alone."""
    import open_clip

    from rewards.detectors.clip_colors import ClipColors

    network, _, preprocess = open_clip.create_model_and_transforms(
        tiny_clip["model"], pretrained=tiny_clip["weights"]
    )
    network.eval()
    tokenize = open_clip.get_tokenizer(tiny_clip["model"])

    def slow(picture, item):
        columns = []
        for color in COLORS:
            texts = [
                f"a photo of a {color} {item.label}",
                f"a photo of a {color}-colored {item.label}",
                f"a photo of a {color} object",
            ]
            features = [network.encode_text(tokenize([text]))[0] for text in texts]
            mean = sum(f / f.norm() for f in features) / 3
            columns.append(mean / mean.norm())
        feature = network.encode_image(preprocess(cut_out(picture, item))[None])[0]
        logits = 100 * (feature / feature.norm()) @ torch.stack(columns, dim=1)
        return COLORS[int(logits.argmax())]

    colors = ClipColors(tiny_clip["weights"], None, tiny_clip["model"], "cpu")
    items, pictures = [], []
    for i, label in enumerate(["dog", "tv remote", "dog", "cup", "bus", "cow"]):
        mask = RNG.random((60, 80)) < 0.7
        items.append(Detection(label, 0.9, (5.0 * i, 3.0, 5.0 * i + 30, 40.0), mask))
        pictures.append(Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)))
    with torch.inference_mode():
        expected = [slow(p, item) for p, item in zip(pictures, items, strict=True)]
    assert [colors(p, [item])[0] for p, item in zip(pictures, items, strict=True)] == expected
    assert colors(pictures[0], []) == []


def test_without_a_classifier_a_color_cannot_be_asked(checkpoint):
    detector = load_detector("mask2former", {"weights": str(checkpoint[1])})
    with pytest.raises(RewardError, match="color_weights"):
        detector.classify_colors(PHOTO, [Detection("dog", 0.9, (0, 0, 9, 9))])


# --- RT-DETR, OWLv2, Grounding DINO ---------------------------------------------------------------

COCO_NAMES = {i: name for i, name in enumerate(CLASSES)} | {
    64: "mouse", 65: "remote", 66: "keyboard", 57: "sofa", 62: "tvmonitor",
}  # fmt: skip


def small_processor(cls, side=64):
    return cls(size={"height": side, "width": side})


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory):
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor
    from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

    folder = tmp_path_factory.mktemp("rt_detr")
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
            layer_type="basic", out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_hidden_dim=32, encoder_in_channels=[16, 24, 32], encoder_ffn_dim=32,
        encoder_attention_heads=2, d_model=32, decoder_in_channels=[32, 32, 32],
        decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, num_queries=20,
        id2label=COCO_NAMES, num_labels=80,
    )  # fmt: skip
    torch.manual_seed(0)
    RTDetrForObjectDetection(config).save_pretrained(folder)
    small_processor(RTDetrImageProcessor).save_pretrained(folder)
    return folder


def test_rt_detr_detects_under_genevals_names(rt_detr):
    detector = load_detector("rt_detr", {"weights": str(rt_detr)})
    first, second = detector.detect([PHOTO, Image.new("RGB", (30, 50))])
    assert len(first) == len(second) == 20
    for found, (width, height) in ((first, (80, 60)), (second, (30, 50))):
        for item in found:
            assert item.label in CLASSES
            assert 0 <= item.score <= 1
            x0, y0, x1, y1 = item.box_xyxy
            assert 0 <= x0 <= x1 <= width
            assert 0 <= y0 <= y1 <= height
    assert "not GenEval's Mask2Former" in detector.not_comparable


def test_a_detector_of_other_classes_is_refused(rt_detr, tmp_path):
    import shutil

    shutil.copytree(rt_detr, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["id2label"]["13"] = "seat"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError, match="class `bench`"):
        load_detector("rt_detr", {"weights": str(tmp_path / "other")})


def test_boxes_of_one_object_are_merged_and_others_kept():
    from rewards.detectors.transformers_boxes import _one_box_an_object

    found = [
        Detection("dog", 0.5, (0, 0, 10, 10)),
        Detection("dog", 0.9, (1, 0, 11, 10)),  # overlaps by 9 / 11
        Detection("cat", 0.4, (0, 0, 10, 10)),  # another class
        Detection("dog", 0.3, (6, 0, 16, 10)),  # overlaps the best by 5 / 15
    ]
    kept = _one_box_an_object(found)
    assert sorted(item.score for item in kept) == [0.3, 0.4, 0.9]
    assert _one_box_an_object([]) == []


WORDS = ("person", "tv remote", "fire hydrant")


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2 import Owlv2ImageProcessor

    folder = tmp_path_factory.mktemp("owlv2")
    tokenizer = byte_level_clip_tokenizer(folder)
    config = Owlv2Config(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 48,
            "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
        },
        projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer.model_max_length = 48
    Owlv2Processor(small_processor(Owlv2ImageProcessor), tokenizer).save_pretrained(folder)
    return folder


def test_owlv2_looks_for_the_words_it_is_given(owlv2):
    detector = load_detector("owlv2", {"weights": str(owlv2), "classes": WORDS})
    both = detector.detect([PHOTO, Image.new("RGB", (30, 50), "white")])
    for found, (width, height) in zip(both, ((80, 60), (30, 50)), strict=True):
        assert 1 <= len(found) <= 16  # 4 x 4 patches, overlapping ones merged
        assert {item.label for item in found} <= set(WORDS)
        for item in found:
            x0, y0, x1, y1 = item.box_xyxy
            assert 0 <= item.score <= 1
            assert 0 <= x0 <= x1 <= width
            assert 0 <= y0 <= y1 <= height


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory):
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("grounding_dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "person", "tv", "rem", "##ote", "fire"]
    (folder / "vocab.txt").write_text("\n".join([*words, "hydra", "##nt"]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=15, max_text_len=32,
    )  # fmt: skip
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"height": 256, "width": 256})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_grounding_dino_scores_a_class_by_the_mean_of_its_tokens(grounding_dino):
    detector = load_detector("grounding_dino", {"weights": str(grounding_dino), "classes": WORDS})
    # [CLS] person . tv rem ##ote . fire hydra ##nt . [SEP]
    expected = torch.zeros(32, 3)
    expected[1, 0] = 1
    expected[[3, 4, 5], 1] = 1 / 3
    expected[[7, 8, 9], 2] = 1 / 3
    assert torch.allclose(detector._tokens, expected)


def test_grounding_dino_detects(grounding_dino):
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

    detector = load_detector("grounding_dino", {"weights": str(grounding_dino), "classes": WORDS})
    [found] = detector.detect([PHOTO])
    assert 1 <= len(found) <= 15
    # The best object, computed by hand from the network's own output.
    network = GroundingDinoForObjectDetection.from_pretrained(grounding_dino).eval()
    processor = GroundingDinoProcessor.from_pretrained(grounding_dino)
    inputs = processor(images=PHOTO, text="person. tv remote. fire hydrant.", return_tensors="pt")
    with torch.inference_mode():
        output = network(**inputs)
    token = output.logits[0].sigmoid()
    scores = torch.stack([token[:, 1], token[:, 3:6].mean(1), token[:, 7:10].mean(1)], dim=1)
    query, label = divmod(int(scores.argmax()), 3)
    best = max(found, key=lambda item: item.score)
    assert best.label == WORDS[label]
    assert best.score == pytest.approx(float(scores.max()), rel=1e-5)
    x, y, width, height = output.pred_boxes[0, query].tolist()
    assert best.box_xyxy[0] == pytest.approx(max(0, (x - width / 2) * 80), abs=1e-3)
    assert best.box_xyxy[3] == pytest.approx(min(60, (y + height / 2) * 60), abs=1e-3)


def test_more_classes_than_grounding_dino_can_read_are_refused(grounding_dino):
    with pytest.raises(RewardError, match="tokens, 32 fit"):
        load_detector(
            "grounding_dino", {"weights": str(grounding_dino), "classes": ["person"] * 20}
        )
