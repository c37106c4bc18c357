"""The model card, read back by the Hugging Face library, and its way to a server of that kind."""

import json
import shutil
from pathlib import Path

import pytest
from eval_stand_in import StandInPolicy, toy_suite
from hub_server import HubServer
from huggingface_hub import ModelCard

from cli.main import main
from evals.policy_hash import policy_hash
from evals.results import load_results
from evals.run import evaluate
from policy import Policy

RECIPE = "name: demo\n# a fence: ```\nseed: 3\n"


@pytest.fixture
def run(policy_folder: Path, tmp_path: Path) -> Path:
    """A finished run with an evaluation of its policy beside it, in results/."""
    folder = tmp_path / "runs" / "demo"
    shutil.copytree(policy_folder, folder / "policy")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "policy" / "secret.txt").write_text("not part of a policy")
    evaluated(tmp_path / "results", policy_hash(Policy.from_pretrained(folder / "policy")))
    return folder


def evaluated(out: Path, weights: str) -> Path:
    suite = toy_suite(60)
    policy = StandInPolicy(suite.records, 0.4)
    evaluate(policy, suite, out, seeds=2, weights=weights, setup={"dtype": "float32"})
    return out


def test_the_card_holds_numbers_intervals_and_recipe(run: Path, tmp_path: Path) -> None:
    arguments = ["card", str(run), str(tmp_path / "results"), "--license", "apache-2.0"]
    assert main([*arguments, "--base-model", "some/body"]) == 0
    card = ModelCard.load(run / "policy" / "README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "some/body")
    assert (card.data.library_name, card.data.pipeline_tag) == ("atelier", "text-to-image")
    assert card.data.model_name == "demo"
    results = load_results(tmp_path / "results").results
    index = {(e.dataset_config, e.metric_type): e for e in card.data.eval_results}
    parts = {"overall": results["overall"]}
    parts |= {name: entry["metrics"] for name, entry in results["tasks"].items()}
    intervals = 0
    for task, part in parts.items():
        for metric, estimate in part.items():
            entry = index.pop((task, metric))
            assert entry.metric_value == estimate["mean"]
            interval = [estimate["low"], estimate["high"]]
            # Too few prompts have no interval, and then none is claimed.
            assert entry.metric_args.get("interval_95", [None, None]) == interval
            intervals += interval != [None, None]
            assert entry.dataset_type == "toy-scenes"
    assert not index
    assert intervals >= 4
    text = card.content
    assert "````yaml\n" + RECIPE.rstrip() + "\n````" in text
    assert "Comparable with the leaderboard: no, it is made for tests" in text
    strict = results["overall"]["strict"]
    assert f"{100 * strict['mean']:.1f}\u2009%" in text
    assert results["policy"]["hash"] in text
    # Again, in place of the old one: it is a card of ours.
    assert main(arguments) == 0


def test_a_policy_that_lies_beside_some_recipe_was_not_trained_by_it(run: Path) -> None:
    (run / "policy").rename(run / "copy")
    assert main(["card", str(run / "copy")]) == 0
    card = ModelCard.load(run / "copy" / "README.md")
    assert card.data.model_name == "copy"
    assert RECIPE not in card.content


def test_a_card_is_made_from_inside_of_the_folder(run: Path, monkeypatch) -> None:
    for inside in (run, run / "policy"):
        monkeypatch.chdir(inside)
        assert main(["card", "."]) == 0
        card = ModelCard.load(run / "policy" / "README.md")
        assert card.data.model_name == "demo"
        assert "seed: 3" in card.text


def test_results_of_another_policy_are_refused(run: Path, tmp_path: Path, capsys) -> None:
    other = evaluated(tmp_path / "other", "0" * 32)
    assert main(["card", str(run), str(other)]) == 1
    assert "another policy" in capsys.readouterr().err
    file = tmp_path / "results" / "results.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"policy": {"name": "x", "hash": "unknown"}}))
    assert main(["card", str(run), str(tmp_path / "results")]) == 1
    assert "does not say which policy" in capsys.readouterr().err
    assert not (run / "policy" / "README.md").exists()


def test_a_readme_of_somebody_s_own_is_kept(run: Path, capsys) -> None:
    readme = run / "policy" / "README.md"
    readme.write_text("# Mine\n\nlibrary_name: atelier\n")
    assert main(["card", str(run)]) == 2
    assert "not written by `atelier card`" in capsys.readouterr().err
    assert readme.read_text().startswith("# Mine")
    assert main(["push", str(run), "owner/name"]) == 2
    assert "has no card" in capsys.readouterr().err
    assert main(["card", str(run), "--out", str(run / "CARD.md")]) == 0
    assert "No evaluation is part of this card" in (run / "CARD.md").read_text()


# --- to a server ---------------------------------------------------------------------------------


def test_a_pushed_policy_is_the_same_policy(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", HubServer.TOKEN)
    assert main(["card", str(run), str(tmp_path / "results")]) == 0
    with HubServer(tmp_path / "hub") as server:
        arguments = ["push", str(run), "owner/name", "--endpoint", server.url]
        assert main([*arguments, "--message", "First"]) == 0
        server.shutdown()
    assert f"{server.url}/owner/name" in "".join(capsys.readouterr().out.split())
    assert server.created[0]["visibility"] == "private"
    assert server.commits[0]["summary"] == "First"
    pushed = Policy.from_pretrained(tmp_path / "hub")
    assert policy_hash(pushed) == policy_hash(Policy.from_pretrained(run / "policy"))
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.model_name == "demo"
    assert not (tmp_path / "hub" / "secret.txt").exists()


def test_a_folder_takes_a_policy_as_a_hub_does(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["card", str(run)]) == 0
    (tmp_path / "hub").mkdir()
    (run / "policy" / "notes.txt").write_text("mine")
    for _ in range(2):  # the second replaces the first
        assert main(["push", str(run), "owner/name", "--endpoint", str(tmp_path / "hub")]) == 0
    (run / "policy" / "notes.txt").unlink()
    copied = tmp_path / "hub" / "owner" / "name"
    assert Policy.from_pretrained(copied).config == Policy.from_pretrained(run / "policy").config
    assert (copied / "README.md").is_file()
    assert not (copied / "notes.txt").exists()
    assert main(["push", str(run), "../name", "--endpoint", str(tmp_path / "hub")]) == 1
    assert "was not written" in capsys.readouterr().err
    (tmp_path / "hub" / "owner" / "mine").mkdir()
    assert main(["push", str(run), "owner/mine", "--endpoint", str(tmp_path / "hub")]) == 1
    assert "holds something else" in capsys.readouterr().err


def test_a_push_to_a_folder_loses_nothing(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert main(["card", str(run)]) == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    arguments = ["push", str(run), "owner/name", "--endpoint", "~/hub"]
    assert main(arguments) == 0
    copied = tmp_path / "hub" / "owner" / "name"
    assert main(["push", str(copied), *arguments[2:]]) == 1
    assert "is what is to be pushed" in capsys.readouterr().err
    (copied / ".git").mkdir()
    (copied / ".git" / "HEAD").write_text("ref")
    assert main(arguments) == 1
    assert "holds something else" in capsys.readouterr().err
    assert (copied / ".git" / "HEAD").read_text() == "ref"


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [("hub.example.com", "not a folder"), ("file:///tmp", "owner/name was not written")],
)
def test_an_endpoint_that_is_neither_server_nor_folder(
    run: Path, tmp_path: Path, monkeypatch, capsys, endpoint: str, told: str
) -> None:
    assert main(["card", str(run)]) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", HubServer.TOKEN)
    assert main(["push", str(run), "owner/name", "--endpoint", endpoint]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / endpoint).exists()


def test_a_refusal_is_one_message(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["card", str(run)]) == 0
    with HubServer(tmp_path / "hub") as server:
        assert main(["push", str(run), "owner/name", "--endpoint", server.url]) == 1
        server.shutdown()
    told = capsys.readouterr().err
    assert "owner/name was not written" in told
    assert "hf auth login" in told
    assert not (tmp_path / "hub").exists()
