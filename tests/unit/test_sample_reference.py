"""`atelier sample` with real policies: single pictures, what they say, and references."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from picture_folder import encoded, png, write_tar
from PIL import Image
from published_checkpoint import edit_policy

from cli.main import main
from data.shards import Shards, build_index
from evals.policy_hash import policy_hash
from policy import Policy
from policy.pixels import reference_pixels, to_pixels


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editor") / "policy"
    edit_policy().save_pretrained(folder)
    return folder


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (60, 90), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def facts(file) -> dict:
    with Image.open(file) as picture:
        return json.loads(picture.text["atelier"])


def test_single_pictures_can_be_made_again_from_what_they_say(editor, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", str(editor), "make it blue", "a", "--n", "2", "--seed", "1"]
    arguments += ["--steps", "2", "--reference", str(red), "--top-k", "5"]
    assert main(arguments) == 0
    files = sorted(path.name for path in (tmp_path / "sample").iterdir())
    assert files == ["1-1.png", "1-2.png", "2-1.png", "2-2.png"]
    found = facts("sample/1-2.png")
    model = Policy.from_pretrained(editor)
    assert found["policy_hash"] == policy_hash(model)
    assert (found["prompt"], found["seed"], found["index"]) == ("make it blue", 1, 1)
    assert (found["reference"]["name"], found["steps"], found["top_k"]) == ("red.png", 2, 5)
    assert facts("sample.png")["prompts"] == ["make it blue", "a"]
    with Image.open("sample.png") as sheet:
        assert sheet.width > 3 * 144  # the reference and two pictures
        assert sheet.getpixel((60, 60)) == (255, 0, 0)
    # The same words alone, and fewer of them: the same pictures.
    assert main([*arguments[:3], *arguments[4:], "--out", "again.png"]) == 0
    first, again = (np.asarray(Image.open(f"{name}/1-2.png")) for name in ("sample", "again"))
    assert np.array_equal(first, again)
    assert first.shape == (48, 48, 3)
    # A second run takes another name.
    assert main(arguments) == 0
    assert facts("sample-2/1-1.png") == facts("sample/1-1.png")


def test_another_reference_gives_another_picture(editor, red, tmp_path):
    blue = tmp_path / "blue.png"
    Image.new("RGB", (60, 90), "blue").save(blue)
    pictures = []
    for number, reference in enumerate((["--reference", str(red)], ["--reference", str(blue)], [])):
        out = tmp_path / f"{number}.png"
        arguments = ["sample", str(editor), "a", "-n", "1", "--steps", "2", "--out", str(out)]
        assert main([*arguments, *reference]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}" / "1-1.png"), dtype=int))
    assert all(np.abs(pictures[0] - other).max() > 1 for other in pictures[1:])


def test_a_bad_reference_stops_before_anything_is_drawn(
    editor, policy_folder, red, tmp_path, capsys
):
    out = ["--out", str(tmp_path / "x.png")]
    (tmp_path / "cut.png").write_bytes(red.read_bytes()[:50])
    for name, words in (("cut.png", "cannot be read as a picture"), ("no.png", "no picture")):
        arguments = ["sample", str(editor), "a", "--reference", str(tmp_path / name)]
        assert main([*arguments, *out]) == 1
        assert words in capsys.readouterr().err
    assert main(["sample", str(policy_folder), "a", "--reference", str(red), *out]) == 2
    assert "takes no reference picture" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_pixels_span_minus_one_to_one():
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((1, 0), (255, 51, 0))
    expected = torch.tensor([[[-1.0, 1.0]], [[-1.0, -0.6]], [[-1.0, -1.0]]])
    torch.testing.assert_close(to_pixels(picture), expected)


def test_a_reference_is_seen_in_sampling_as_in_training(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (131, 77, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    members = [("a.png", png()), ("a.txt", b"x"), ("a.reference.png", encoded(picture))]
    index = build_index([write_tar(tmp_path / "s.tar", members)], references=True)
    policy = edit_policy()
    trained = torch.from_numpy(Shards(index, policy.config.image_size, 0)[0].reference.copy())
    sampled = reference_pixels(picture, policy.config)
    assert torch.equal(sampled[0], trained.permute(2, 0, 1).float() / 127.5 - 1)
    switched = replace(policy.config, compatibility=("squashed_tokens",))
    assert reference_pixels(picture, switched).shape == (1, 3, 131, 77)
