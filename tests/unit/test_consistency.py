"""The reward for editing, on pairs painted by the scene world, and its rules by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from common.errors import RewardError
from common.scene_world import BACKGROUND
from data.scenes import Scene, SceneObject, render_scene
from rewards import load_reward
from rewards.consistency import consistency
from rewards.detector import Detection
from rewards.edit_rules import judge_edit
from rewards.networks import similarity

CIRCLE = SceneObject("circle", "red", (1, 1))
RING = SceneObject("ring", "green", (5, 5))
SQUARE = SceneObject("square", "blue", (1, 1))


def painted(*objects):
    return render_scene(Scene("two_object", objects))


def with_background(image, color):
    pixels = np.asarray(image).copy()
    pixels[(np.abs(pixels.astype(int) - BACKGROUND).max(axis=2)) < 12] = color
    return Image.fromarray(pixels)


SOURCE = painted(CIRCLE, RING)
REPLACE = {
    "tag": "edit",
    "add": [{"class": "square", "count": 1, "color": "blue"}],
    "remove": [{"class": "circle", "count": 1, "color": "red"}],
}
RECOLOR = {
    "tag": "edit",
    "add": [{"class": "circle", "count": 1, "color": "purple"}],
    "remove": [{"class": "circle", "count": 1, "color": "red"}],
}
ADD = {"tag": "edit", "add": [{"class": "triangle", "count": 1}]}
REMOVE = {"tag": "edit", "remove": [{"class": "circle", "count": 1}]}

PURPLE_CIRCLE = SceneObject("circle", "purple", (1, 1))
TRIANGLE = SceneObject("triangle", "yellow", (1, 5))
RIGHT_EDITS = [
    (REPLACE, painted(SQUARE, RING)),
    (RECOLOR, painted(PURPLE_CIRCLE, RING)),
    (ADD, painted(CIRCLE, RING, TRIANGLE)),
    (REMOVE, painted(RING)),
]


def score(image, asked, **options):
    [result] = consistency([image], [SOURCE], [asked], **options)
    return result


@pytest.mark.parametrize(("asked", "right"), RIGHT_EDITS)
def test_the_right_edit_earns_nearly_all_and_a_copy_nothing(asked, right):
    assert score(right, asked).value > 0.97
    assert score(SOURCE, asked).value == 0.0


@pytest.mark.parametrize(("asked", "right"), RIGHT_EDITS)
@pytest.mark.parametrize("background", [(120, 150, 200), (60, 60, 60)])
def test_a_destroyed_background_earns_little_even_with_the_right_object(asked, right, background):
    """What is left of `kept` are the objects that were there before: up to a seventh."""
    assert score(with_background(right, background), asked).value < 0.15


@pytest.mark.parametrize(("asked", "right"), RIGHT_EDITS)
def test_noise_over_everything_earns_little(asked, right):
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert score(Image.fromarray(noise), asked).value < 0.05


@pytest.mark.parametrize(
    ("asked", "wrong", "success"),
    [
        # asked 2 changes, made 2, one of them is both: 1 / 3
        (REPLACE, painted(SceneObject("cross", "blue", (1, 1)), RING), 1 / 3),
        (REPLACE, painted(SceneObject("square", "green", (1, 1)), RING), 1 / 3),
        (REPLACE, painted(CIRCLE, SceneObject("square", "blue", (5, 5))), 1 / 3),
        (REPLACE, painted(CIRCLE, RING, SceneObject("square", "blue", (1, 5))), 1 / 2),
        (ADD, painted(CIRCLE, RING, SceneObject("diamond", "yellow", (1, 5))), 0.0),
        (ADD, painted(CIRCLE, RING, TRIANGLE, SceneObject("cross", "red", (5, 1))), 1 / 2),
        (ADD, painted(TRIANGLE), 1 / 3),
        (REMOVE, painted(CIRCLE), 0.0),
        (REMOVE, painted(), 1 / 2),
    ],
)
def test_a_wrong_object_earns_the_share_of_changes_that_are_right(asked, wrong, success):
    result = score(wrong, asked)
    assert result.details["success"] == pytest.approx(success)
    assert result.value <= success
    assert result.reason


def test_the_order_of_the_four_kinds_of_outcome():
    """Identity copy, right edit, wrong object, destroyed: one number tells them apart."""
    right = RIGHT_EDITS[0][1]
    wrong = painted(SceneObject("cross", "orange", (1, 1)), RING)
    values = {
        "copy": score(SOURCE, REPLACE).value,
        "right": score(right, REPLACE).value,
        "wrong object": score(wrong, REPLACE).value,
        "destroyed": score(with_background(right, (60, 60, 60)), REPLACE).value,
    }
    assert values["right"] > 0.97
    assert max(v for k, v in values.items() if k != "right") < 0.35
    assert values["copy"] == 0.0


def test_a_region_given_says_what_may_change():
    beside = painted(SQUARE, RING)
    here = REPLACE | {"region": [0, 0, 0.4, 0.4]}
    elsewhere = REPLACE | {"region": [0.6, 0, 1, 0.4]}
    assert score(beside, here).value > 0.97
    assert score(beside, elsewhere).details["outside"]["pixels"] < 0.95
    assert score(beside, REPLACE | {"region": [0, 0, 1, 1]}).details["kept"] == 1.0


class Everywhere:
    """Sees the source's circle before, and after it one new square that fills so much."""

    name, not_comparable = "told", "made up"

    def __init__(self, share):
        self.box = (0, 0, 48 * share, 48)

    def detect(self, images):
        return [[], [Detection("square", 0.9, self.box)]]


@pytest.mark.parametrize(("share", "kept"), [(0.25, 1), (0.5, 1), (0.75, 0.5), (1, 0)])
def test_an_object_painted_over_everything_keeps_nothing(share, kept):
    added = {"tag": "edit", "add": [{"class": "square", "count": 1}]}
    painted_over = SOURCE.copy()
    painted_over.paste((40, 60, 200), (0, 0, round(48 * share), 48))
    result = score(painted_over, added, detector=Everywhere(share), measures=["pixels"])
    assert result.details["success"] == 1.0
    assert result.value == pytest.approx(kept, abs=1e-6)
    # The record's author may say that all of it is to change.
    asked = added | {"region": [0, 0, 1, 1]}
    result = score(painted_over, asked, detector=Everywhere(share), measures=["pixels"])
    assert result.value == 1.0
    assert "nothing had to be kept" in result.reason


def test_a_source_that_cannot_be_opened_costs_only_its_own_score(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    SOURCE.convert("CMYK").save(tmp_path / "cmyk.jpg")
    bad = [str(tmp_path / "empty.png"), str(tmp_path / "cmyk.jpg"), str(tmp_path / "gone.png"),
           SOURCE.convert("CMYK")]  # fmt: skip
    right = RIGHT_EDITS[0][1]
    results = consistency([right] * 5, [*bad, SOURCE], [REPLACE] * 5)
    assert [result.value for result in results[:4]] == [None] * 4
    assert results[4].value > 0.97
    for result, word in zip(results, ["empty", "CMYK", "gone.png", "CMYK"], strict=False):
        assert word in result.reason


def test_a_source_under_the_window_of_ssim_costs_only_its_own_score():
    small = Image.new("RGB", (48, 10), "white")
    little, whole = consistency([SOURCE] * 2, [small, SOURCE], [REPLACE] * 2)
    assert little.value is None
    assert "48 x 10" in little.reason
    assert whole.value == 0
    eleven = Image.new("RGB", (48, 11), "white")
    assert consistency([SOURCE], [eleven], [REPLACE])[0].value is not None
    assert consistency([SOURCE], [small], [REPLACE], measures=["pixels"])[0].value is not None


def test_whole_picture_and_outside_are_both_told():
    details = score(RIGHT_EDITS[0][1], REPLACE).details
    assert details["outside"]["ssim"] > details["whole"]["ssim"]
    assert details["outside"]["pixels"] == 1.0
    # Circle and square lie in one box of 14 x 14 pixels; nothing else differs.
    assert 1 - 14 * 14 / 48**2 <= details["whole"]["pixels"] < 1
    assert details["not_comparable"]


def test_a_result_of_another_size_is_scaled_to_its_source():
    large = RIGHT_EDITS[0][1].resize((96, 96), Image.Resampling.NEAREST)
    assert score(large, REPLACE).details["success"] == 1.0


def test_the_source_may_be_a_path(tmp_path):
    SOURCE.save(tmp_path / "a.png")
    [result] = consistency([RIGHT_EDITS[0][1]], [str(tmp_path / "a.png")], [REPLACE])
    assert result.value > 0.97
    record = {"prompt": "p", "prompt_id": "p-9", "metadata": REPLACE}
    load_reward("consistency").check_record(record | {"source": str(tmp_path / "a.png")})
    with pytest.raises(RewardError, match=r"p-9.*no file .*b\.png"):
        load_reward("consistency").check_record(record | {"source": str(tmp_path / "b.png")})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "neither"),
        ({"tag": "edit"}, "neither"),
        ({"add": [{"class": "cirlce", "count": 1}]}, r"add\[0\].class.*`circle`"),
        ({"remove": [{"class": "circle", "count": 0}]}, r"remove\[0\].count"),
        ({"add": [{"class": "circle", "count": 1, "color": "gren"}]}, "`green`"),
        ({"add": {"class": "circle", "count": 1}}, "not a list"),
        (ADD | {"region": [0, 0, 48, 48]}, "region.*fractions"),
        (ADD | {"region": [0.5, 0, 0.5, 1]}, "region"),
        (ADD | {"region": "left"}, "region"),
    ],
)
def test_a_record_that_describes_no_edit_is_refused(bad, words):
    record = {"prompt": "p", "prompt_id": "p-9", "metadata": bad, "source": SOURCE}
    with pytest.raises(RewardError, match=f"p-9.*{words}"):
        load_reward("consistency").check_record(record)


def test_a_record_without_a_source_is_refused():
    with pytest.raises(RewardError, match="source"):
        load_reward("consistency").check_record({"prompt": "p", "metadata": ADD})


def test_unknown_measures_are_refused():
    with pytest.raises(RewardError, match="Did you mean `ssim`"):
        score(SOURCE, ADD, measures=["sim"])
    with pytest.raises(RewardError, match=r"measure `dino`.*weights"):
        score(SOURCE, ADD, measures=["dino"])


# --- the rules ------------------------------------------------------------------------------------


def at(label, x, color=None):
    return Detection(label, 0.9, (x, 0, x + 10, 10)), color


def test_the_changed_one_of_equal_objects_is_the_one_without_a_counterpart():
    asked = {"add": [{"class": "dog", "count": 1}]}
    result = judge_edit(
        asked, [at("dog", 0), at("dog", 40)], [at("dog", 1), at("dog", 80), at("dog", 39)]
    )
    assert (result.success, result.boxes) == (1.0, ((80, 0, 90, 10),))


def test_a_clause_with_a_color_is_served_first():
    asked = {"add": [{"class": "dog", "count": 1}, {"class": "dog", "count": 1, "color": "red"}]}
    result = judge_edit(asked, [], [at("dog", 0, "red"), at("dog", 30, "blue")])
    assert result.success == 1.0
    result = judge_edit(asked, [], [at("dog", 0, "blue"), at("dog", 30, "blue")])
    assert result.success == pytest.approx(1 / 3)  # asked 2, made 2, both 1
    assert "red dog" in result.reason


# --- the measures ---------------------------------------------------------------------------------


def gaussian_ssim(a, b):
    """SSIM of two flat pictures: only the luminance term is left."""
    c1 = 0.01**2
    return (2 * a * b + c1) / (a * a + b * b + c1)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    flat = [Image.new("RGB", (48, 48), (v, v, v)) for v in (200, 100)]
    [result] = consistency([flat[1]], [flat[0]], [ADD], measures=["ssim"])
    expected = gaussian_ssim(200 / 255, 100 / 255)
    assert result.details["whole"]["ssim"] == pytest.approx(expected, abs=1e-4)


def test_ssim_in_stripes_is_that_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    shape = (37, 20, 3)
    first = rng.integers(0, 200, shape, dtype=np.uint8)
    pair = [Image.fromarray(first), Image.fromarray(first // 2 + rng.integers(0, 50, shape, "u1"))]
    where = rng.random(shape[:2]) < 0.5
    before, after = (np.moveaxis(np.asarray(x) / 255, 2, 0)[None] for x in pair)
    _, full = structural_similarity_index_measure(
        torch.tensor(after), torch.tensor(before), data_range=1.0, return_full_image=True
    )
    expected = full[0].mean(dim=0)[torch.tensor(where)].mean().item()
    for rows in (1, 4, 12, 36, 37):
        monkeypatch.setattr(similarity, "_STRIPE_PIXELS", rows * shape[1])
        assert similarity.ssim(*pair, where) == pytest.approx(expected, abs=1e-6), rows
    assert 0.1 < expected < 0.9


@pytest.fixture(scope="module")
def small_networks(tmp_path_factory):
    """CLIP, DINOv2 and an LPIPS backbone with random weights, in their published formats."""
    import torchvision
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "squeeze.pth")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder / "dino")
    BitImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    ).save_pretrained(folder / "dino")
    return {
        "lpips": {"weights": str(folder / "squeeze.pth"), "net": "squeeze"},
        "dino": {"weights": str(folder / "dino")},
    }


def test_learned_measures_are_1_for_equal_pictures_and_less_otherwise(small_networks, tiny_clip):
    networks = small_networks | {"clip": tiny_clip}
    names = ["lpips", "clip", "dino"]
    same = score(SOURCE, ADD, measures=names, networks=networks).details["whole"]
    other = score(painted(SQUARE), ADD, measures=names, networks=networks).details["whole"]
    assert same == {name: pytest.approx(1.0, abs=1e-4) for name in names}
    for name in names:
        assert 0 <= other[name] < 1 - 1e-4, name


def test_lpips_is_the_published_one(small_networks):
    """Against torchmetrics' own function, given the same backbone."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    network = _NoTrainLpips(net="squeeze", pnet_rand=True)
    published = torch.load(small_networks["lpips"]["weights"], weights_only=True)
    for part in network.net.slices:
        for number, layer in part.named_children():
            prefix = f"features.{number}."
            layer.load_state_dict(
                {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)}
            )
    pixels = [
        torch.from_numpy(np.asarray(p, np.float32) / 255).permute(2, 0, 1)[None]
        for p in (SOURCE, painted(SQUARE))
    ]
    expected = 1 - float(network(*pixels, normalize=True))
    got = score(painted(SQUARE), ADD, measures=["lpips"], networks=small_networks)
    # The spatial map is enlarged before it is averaged, which changes the mean a little.
    assert got.details["whole"]["lpips"] == pytest.approx(expected, abs=0.02)
    assert expected < 0.98


def test_a_missing_backbone_says_what_it_is():
    with pytest.raises(RewardError, match=r"lpips backbone.*alexnet.*no file"):
        score(SOURCE, ADD, measures=["lpips"], networks={"lpips": {"weights": "/nowhere/a.pth"}})


def test_weights_of_another_architecture_are_refused(small_networks):
    wrong = {"lpips": {"weights": small_networks["lpips"]["weights"], "net": "alex"}}
    with pytest.raises(RewardError, match="lpips backbone"):
        score(SOURCE, ADD, measures=["lpips"], networks=wrong)
