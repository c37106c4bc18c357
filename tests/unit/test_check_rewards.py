"""`atelier check` calls the rewards: every way in which one can be wrong is told."""

import json
import sys

import pytest
from PIL import Image

from cli.main import main
from common.errors import RewardError
from rewards.runner import RewardRunner, RewardSpec

RECIPE = """
extends: geneval-scenes
name: mine
prompts: {source: %s}
rewards:
  functions: [%s]
"""
REWARDS = """
import math, time
from PIL import Image
from rewards import reward

def length(images, prompts): return [0.5] * 3
def one(images): return [0.5]
def nan(images): return [0.5, math.nan, 0.5, 0.5]
def kind(images): return ["high"] * len(images)
def number(images): return 1.0
def raises(images): raise KeyError("no face")
def slow(images): time.sleep(20)
def good(images, prompts, scale=1.0): return [scale * image.width for image in images]
async def later(images): return [None] + [1.0] * (len(images) - 1)
@reward(name="ranked", whole_batch=True)
def ranked(images): return [float(i) for i in range(len(images))]
def opens(images): return [Image.open("gone.png").width]
def trl(prompts, completions, **kwargs): return [c.width / 128 for c in completions]
def taste(images, metadata): return [1.0] * len(images)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def check(folder, functions, source="scenes", *options):
    (folder / "mine.yaml").write_text(RECIPE % (source, functions))
    return main(["check", "mine.yaml", *options])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("length", "returned 3 scores for 4 images"),
        ("one", "returned 1 scores for 4 images"),
        ("nan", "returned nan"),
        ("kind", "returned str"),
        ("number", "returned float"),
        ("raises", "KeyError: 'no face' (mine.py:11)"),
        ("slow", "did not return within 0.2 s"),
        ("later", "returned None"),
        ("opens", "gone.png' (mine.py:17)"),  # not the line in Pillow
    ],
)
def test_what_is_wrong_with_a_reward_is_told(folder, capsys, name, problem):
    limit = 0.2 if name == "slow" else 60
    use = f'{{use: "mine.py:{name}", timeout_s: {limit}}}, {{use: geneval}}'
    assert check(folder, use) == 1
    captured = capsys.readouterr()
    assert f"reward `{name}`: " in captured.err
    assert problem in captured.err
    assert "geneval  " in captured.out  # the others are tried all the same
    assert captured.out.splitlines()[-1] != "ok"


def test_good_rewards_show_their_scores_and_seconds(folder, capsys):
    assert check(folder, '{use: "mine.py:good", args: {scale: 0.5}}, {use: "mine.py:trl"}') == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ok"
    assert lines[-3].split()[:6] == ["good", "32", "32", "32", "32", "in"]
    assert lines[-2].split()[:5] == ["trl", "0.5", "0.5", "0.5", "0.5"]


def test_as_json(folder, capsys):
    assert check(folder, '{use: "mine.py:nan"}', "scenes", "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    [trial] = facts["rewards"]
    assert facts["valid"] is True
    assert trial["name"] == "nan"
    assert trial["scores"] == [0.5, None, 0.5, 0.5]
    assert "nan" in trial["problems"][0]
    assert trial["seconds"] >= 0
    assert check(folder, '{use: "mine.py:nan"}', "scenes", "--json", "--no-rewards") == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == []


def test_what_a_reward_prints_stands_beside_the_json(folder, capsys):
    chatty = (
        "print('loaded')\ndef chatty(images):\n    print('seen')\n    return [1.0] * len(images)\n"
    )
    (folder / "chatty.py").write_text(chatty)
    assert check(folder, '{use: "chatty.py:chatty"}', "scenes", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rewards"][0]["name"] == "chatty"
    assert "loaded" in printed.err
    assert "seen" in printed.err


@pytest.mark.parametrize(
    ("use", "record", "words"),
    [
        ("ocr", {"prompt": "a sign"}, ["quotes no text"]),
        ("geneval", {"prompt": "x"}, ["tag"]),
        ("geneval", {"prompt": "x", "metadata": {"tag": "t"}}, ["include"]),
        (
            "geneval",
            {"prompt": "x", "metadata": {"tag": "t", "include": [{"class": "circl", "count": 1}]}},
            ["circl", "circle"],
        ),
        (
            "geneval",
            {
                "prompt": "x",
                "metadata": {
                    "tag": "t",
                    "include": [{"class": "circle", "count": 1, "color": "rde"}],
                },
            },
            ["rde", "red"],
        ),
        ('"mine.py:good", only_if: {reward: goood, at_least: 1}', {"prompt": "x"}, ["goood"]),
        ('"mine.py:goood"', {"prompt": "x"}, ["`good`"]),
    ],
)
def test_what_cannot_be_scored_is_an_error_that_names_it(folder, capsys, use, record, words):
    good = {
        "prompt": 'says "CAB"',
        "metadata": {"tag": "t", "include": [{"class": "ring", "count": 1}]},
    }
    rows = [good, {**record, "prompt_id": "record-seven"}]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(folder, f"{{use: {use}}}", "p.jsonl") == 1
    error = capsys.readouterr().err
    assert "goood" in use or "record-seven" in error
    assert all(word in error for word in words)


def test_a_reward_file_alone(capsys):
    assert main(["check", "mine.py:good", "scale=2"]) == 0
    assert "good  128  128  128  128  in " in capsys.readouterr().out
    assert main(["check", "mine.py:nan"]) == 1
    assert main(["check", "mine.py:good", "scal=2"]) == 1
    assert "`scale`" in capsys.readouterr().err
    assert main(["check", "mine.py:good", "scale"]) == 2
    error = capsys.readouterr().err
    assert "scale: not of the form KEY=VALUE" in error
    assert "--arg" not in error  # which this command does not have


def test_a_reward_file_alone_as_json(folder, capsys):
    def printed(code, *arguments):
        assert main(["check", *arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    facts = printed(0, "mine.py:good", "scale=2")
    (good,) = facts["rewards"]
    assert facts["valid"] is True
    assert (good["name"], good["scores"], good["problems"]) == ("good", [128] * 4, [])
    assert check(folder, '{use: "mine.py:good"}', "scenes", "--json") == 0
    (of_recipe,) = json.loads(capsys.readouterr().out)["rewards"]
    assert good.keys() == of_recipe.keys()
    facts = printed(1, "mine.py:nan")
    assert facts["valid"] is False
    assert "returned nan" in facts["rewards"][0]["problems"][0]
    for code, arguments, word in (
        (1, ["mine.py:good", "scal=2"], "`scal`"),
        (2, ["mine.py:good", "scale"], "KEY=VALUE"),
        (2, ["mine.py"], "mine.py:FUNCTION"),
        (1, ["mine.py:absent"], "absent"),
    ):
        facts = printed(code, *arguments)
        assert facts["valid"] is False
        assert word in str(facts["problems"])


def test_a_fix_is_named_once(folder, capsys):
    (folder / "remote.py").write_text("from rewards.remote import remote as call\n")
    assert main(["check", "mine.py"]) == 2
    assert "mine.py:FUNCTION" in capsys.readouterr().err
    assert main(["check", "mine.py:absent"]) == 1
    assert "reward, " not in capsys.readouterr().err  # which the file only imports
    assert main(["check", "remote.py:call", "servers=x"]) == 1
    assert capsys.readouterr().err.count("Fix: ") == 1


def test_a_reward_that_checks_records_does_not_ask_for_their_columns_as_arguments(folder):
    for use, advice in (("geneval", "prompt record."), ("mine.py:taste", "under `args`")):
        with (
            RewardRunner([RewardSpec(use)]) as runner,
            pytest.raises(RewardError, match=f"p-9.*{advice}"),
        ):
            runner.check_records([{"prompt": "x", "prompt_id": "p-9"}])


def test_sources_of_edits_stand_beside_their_prompt_file(folder, capsys):
    (folder / "edits").mkdir()
    Image.new("RGB", (48, 48), "white").save(folder / "edits" / "before.png")
    add = {"tag": "edit", "add": [{"class": "circle", "count": 1}]}
    row = {"prompt": "add a circle", "source": "before.png", "metadata": add}
    (folder / "edits" / "p.jsonl").write_text(json.dumps(row))
    assert check(folder, '{use: consistency, args: {measures: ["pixels"]}}', "edits/p.jsonl") == 0
    assert "consistency  0  0" in capsys.readouterr().out
    (folder / "edits" / "l.jsonl").write_text(json.dumps(row | {"image": "before.png"}))
    command = ["score", "edits/l.jsonl", "-r", "consistency", "--out", "scored"]
    assert main([*command, "--arg", "consistency.measures=[pixels]"]) == 0


@pytest.mark.parametrize("override", ["rollout.waves=3", "decode.check.every=2"])
def test_a_reward_of_whole_steps_in_a_recipe_that_divides_them(folder, capsys, override):
    ranked = '{use: "mine.py:ranked"}'
    assert check(folder, ranked) == 0
    capsys.readouterr()
    assert check(folder, ranked, "scenes", override) == 1
    said = capsys.readouterr().err
    assert f"{override.split('=')[0]} is" in said
    assert "`ranked` compares" in said


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.replay=nothing-here", "nothing-here holds the rollouts of 0 steps"),
        ("log.trackers=[wandb]", "wandb is not installed. Fix: pip install wandb"),
        ("decode.compile=true", "there is no no-cxx. Fix: install it, or set decode.compile=false"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_loaded(
    folder, capsys, monkeypatch, verb, override, words
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there, where it is
    monkeypatch.setenv("CXX", "no-cxx")
    (folder / "mine.yaml").write_text(RECIPE % ("scenes", "{use: geneval}"))
    assert main([verb, "mine.yaml", "policy.path=no-policy", override]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "no-policy" not in said
