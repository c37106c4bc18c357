"""Preference models as benchmarks: their prompt lists, and the numbers that they publish."""

import json
from pathlib import Path
from statistics import pstdev
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_preference import save_pick_score

from common.errors import DataError, RewardError
from evals.results import load_results
from evals.run import evaluate
from evals.suites import load_suite, task_of
from evals.suites.files import read_prompts
from rewards.preference import hps_v2, pick_score


class Painter:
    """Noise that depends on the seed alone."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(steps=1, guidance=1.0)

    def generate(self, prompts, *, steps, guidance, temperature, seeds):
        pictures = [np.random.default_rng(s).integers(0, 256, (40, 40, 3)) for s in seeds]
        return [Image.fromarray(picture.astype(np.uint8)) for picture in pictures]


# --- lists of prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("a.txt", "a dog\n\ntwo cats\n", ["a-00000", "a-00001"]),
        ("b.json", '["a dog", "two cats"]', ["b-00000", "b-00001"]),
        # ImageReward's benchmark-prompts.json
        (
            "c.json",
            '[{"id": "005695-0057", "prompt": "a dog"}, {"id": "x", "prompt": "two cats"}]',
            ["005695-0057", "x"],
        ),
        # DrawBench and PartiPrompts
        ("d.csv", "Prompts,Category\na dog,Colors\ntwo cats,Counting\n", ["d-00000", "d-00001"]),
        ("e.tsv", "Prompt\tCategory\na dog\tx\ntwo cats\ty\n", ["e-00000", "e-00001"]),
        ("f.jsonl", '{"prompt": "a dog", "prompt_id": "q"}\n{"prompt": "two cats"}\n',
         ["q", "f-000002"]),
    ],
)  # fmt: skip
def test_lists_of_prompts(tmp_path: Path, name: str, text: str, ids: list[str]) -> None:
    (tmp_path / name).write_text(text)
    records = read_prompts(tmp_path / name)
    assert [record["prompt"] for record in records] == ["a dog", "two cats"]
    assert [record["prompt_id"] for record in records] == ids
    assert {task_of(record) for record in records} == {name[0]}


@pytest.mark.parametrize("meta", [True, False])
def test_objects_of_a_json_list_keep_what_rewards_ask_for(tmp_path: Path, meta: bool) -> None:
    asked = {"tag": "counting", "include": [{"class": "circle", "count": 2}]}
    row = {"prompt": "two circles", "target": 0.5, **({"metadata": asked} if meta else asked)}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    options = {"prompts": str(tmp_path / "a.json"), "reward": "geneval", "detector": "scenes"}
    suite = load_suite("prompt-file", options=options)
    [record] = suite.records
    suite.close()
    assert (record["prompt"], record["target"]) == ("two circles", 0.5)
    assert record["metadata"]["include"] == asked["include"]
    assert task_of(record) == "counting"


def test_a_prompt_that_stands_twice_in_a_list_is_one_fact(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\ntwo cats\na dog\n")
    first, other, again = (record["cluster"] for record in read_prompts(tmp_path / "a.txt"))
    assert first == again != other


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "\n \n", "no prompts"),
        ("a.json", '{"a": 1}', "not a list of prompts"),
        ("a.json", "[", "not JSON"),
        ("a.json", '["a dog", {"id": "x"}]', "entry 2 has no prompt"),
        ("a.json", '["a dog", 3]', "entry 2 has no prompt"),
        ("a.csv", "id,caption\n1,a dog\n", "none of its columns"),
        *(
            ("a.txt", text, r"JSON(?s:.*)Fix: write one prompt a line, or objects with `prompt`")
            for text in (
                '{\n  "prompt": "a dog",\n  "metadata": {}\n}\n',  # one object on many lines
                '["a dog"]\n["two cats"]\n',
                '{"a": 1}\n',
                '["a dog", 3]',
                "[]",
                "[" * 100_000,
            )
        ),
        ("a.json", "[" * 100_000, "it is not JSON"),
        ("a.jsonl", "[" * 100_000, "not JSON"),
    ],
)
def test_an_unreadable_list_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"prompt": "a dog"}\n{"prompt": "two cats"}\n', "a.jsonl"),
        ('\n{"prompt": "a dog"}\n', "a.jsonl"),
        ('["a dog", "two cats"]', "a.json"),
        ('[\n  "a dog"\n]\n', "a.json"),
        ('[{"prompt": "a dog"}]', "a.json"),
    ],
)
def test_json_is_told_the_name_under_which_it_is_read(
    tmp_path: Path, text: str, right: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=rf"a\.txt holds JSON(?s:.*)Fix: call it {right}\.$"):
        read_prompts(tmp_path / "a.txt")
    named = (tmp_path / "a.txt").rename(tmp_path / right)
    assert read_prompts(named)[0]["prompt"] == "a dog"


# --- HPS v2 -------------------------------------------------------------------------------------


def test_hps_v2_scores_each_style_with_the_real_network(tiny_clip, tmp_path: Path) -> None:
    styles = {"anime": 2, "concept-art": 1, "paintings": 1, "photo": 1}
    for style, number in styles.items():
        texts = [f"{style} number {i}" for i in range(number)]
        (tmp_path / f"{style}.json").write_text(json.dumps(texts))
    suite = load_suite("hps-v2", options={"prompts": str(tmp_path), **tiny_clip})
    results = evaluate(Painter(), suite, tmp_path / "r", seeds=1, weights="w")
    scores: dict[str, list[float]] = {}
    for row in load_results(tmp_path / "r").samples:
        with Image.open(tmp_path / "r" / row["image"]) as picture:
            [expected] = hps_v2([picture.convert("RGB")], [row["prompt"]], **tiny_clip)
        assert row["values"]["hps_v2"] == pytest.approx(expected, abs=1e-6)
        scores.setdefault(row["task"], []).append(100 * expected)
    means = {style: sum(values) / len(values) for style, values in scores.items()}
    assert {style: results["published"][style] for style in styles} == pytest.approx(means)
    assert results["published"]["average"] == pytest.approx(sum(means.values()) / 4)
    assert "5 prompts instead of 3200" in results["suite"]["not_comparable"]
    assert suite.pictures == 1


def test_hps_v2_spread_is_that_of_groups_of_80(tmp_path: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps(["a", "b"]))
    suite = load_suite("hps-v2", options={"prompts": str(tmp_path), "weights": "w.pt"})
    values = [0.2] * 80 + [0.3] * 80 + [0.25] * 80
    rows = [
        {"prompt_id": f"anime-{i}", "task": "anime", "values": {"hps_v2": value}}
        for i, value in enumerate(values)
    ]
    told = suite.published(rows)
    assert told["anime"] == pytest.approx(25)
    assert told["anime, spread of groups"] == pytest.approx(pstdev([20, 30, 25]))
    (tmp_path / "photo.json").unlink()
    with pytest.raises(DataError, match=r"photo\.json"):
        load_suite("hps-v2", options={"prompts": str(tmp_path), "weights": "w.pt"})


# --- ImageReward and PickScore --------------------------------------------------------------------


def listed(file: Path, number: int) -> str:
    file.write_text(json.dumps([{"id": str(i), "prompt": f"prompt {i}"} for i in range(number)]))
    return str(file)


def test_image_reward_averages_pictures_and_then_prompts(tmp_path: Path) -> None:
    prompts = listed(tmp_path / "benchmark-prompts.json", 100)
    suite = load_suite("image-reward", options={"prompts": prompts, "weights": "IR.pt"})
    rows = [
        {"prompt_id": name, "values": {"image_reward": value}}
        for name, value in (("a", 1.0), ("a", 2.0), ("a", 0.0), ("b", -1.0))
    ]
    assert suite.published(rows) == {"ImageReward": 0.0}
    assert suite.headline == "image_reward"
    assert suite.pictures == 10  # the repository's protocol
    told = suite.comparability(seeds=10, limit=None)
    assert "no published checksum" in told
    assert "9 pictures per prompt instead of 10" in suite.comparability(seeds=9, limit=None)
    drawbench = load_suite(
        "image-reward", options={"prompts": listed(tmp_path / "d.json", 200), "weights": "IR.pt"}
    )
    assert drawbench.pictures == 1
    other = load_suite(
        "image-reward", options={"prompts": listed(tmp_path / "o.json", 3), "weights": "IR.pt"}
    )
    assert "neither ImageReward's 100 nor DrawBench's 200" in other.not_comparable


def test_pick_score_shows_the_score_itself_beside_the_one_of_training(tmp_path: Path) -> None:
    save_pick_score(tmp_path)
    (tmp_path / "p.txt").write_text("a red dog\ntwo cups\n")
    where = {"weights": str(tmp_path / "weights"), "processor": str(tmp_path / "processor")}
    suite = load_suite("pick-score", options={"prompts": str(tmp_path / "p.txt"), **where})
    results = evaluate(Painter(), suite, tmp_path / "r", seeds=2, weights="w")
    expected = []
    for row in load_results(tmp_path / "r").samples:
        with Image.open(tmp_path / "r" / row["image"]) as picture:
            expected += pick_score([picture.convert("RGB")], [row["prompt"]], **where)
    mean = sum(expected) / 4
    assert results["published"]["PickScore / 26"] == pytest.approx(mean, abs=1e-5)
    assert results["published"]["PickScore"] == pytest.approx(26 * mean, abs=1e-4)


def test_what_decides_a_score_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red dog\n")
    options = {"prompts": str(tmp_path / "p.txt"), "weights": "w"}
    settings = load_suite("pick-score", options=options).settings
    assert settings["reward_weights"] == "w"
    assert settings["reward_source"].startswith("pick_score of source ")
    (tmp_path / "p.txt").write_text("a blue dog\n")
    other = load_suite("pick-score", options=options).settings
    assert other["prompts_sha256"] != settings["prompts_sha256"]
    with pytest.raises(RewardError, match=r"no argument `wieghts`.*`weights`"):
        load_suite("pick-score", options=options | {"wieghts": "x"})
