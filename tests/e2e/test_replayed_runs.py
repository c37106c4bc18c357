"""Rollouts of one run, learnt from by another: the same updates, or a refusal that says why."""

import json
from pathlib import Path

import pytest
import test_grpo_run
import torch
from test_grpo_run import assert_clean, refused, steps, weights
from tiny_policy import write_recipe

from cli.main import main
from common.journal import read_journal
from data.prompts import records_of_run
from policy.sampling import Sampling
from recipes import load_recipe
from rewards.runner import Scored
from rl.replay import save_rollout
from rl.rollouts import Rollout

train = test_grpo_run.train  # the fixture


def without_times(out: Path) -> list[dict]:
    rows = read_journal(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "stages")} for row in rows]


def test_a_replay_repeats_the_updates_to_the_last_bit_and_samples_nothing(train, tmp_path):
    saved, made = tmp_path / "saved", tmp_path / "made"
    options = ("train.steps=3", "algorithm.beta=0.05")
    exit_code, out, _, stderr = train(*options, "--save-rollouts", str(saved))
    assert exit_code == 0, stderr
    assert all(row["seconds"].pop("save") > 0 for row in steps(out))
    out.rename(made)
    assert sorted(f.name for f in saved.iterdir()) == [f"step-00000{i}-0" for i in range(3)]
    assert len(list((saved / "step-000000-0" / "images").glob("*.png"))) == 16
    # The engine of this recipe is not even started: vLLM is, and takes seconds.
    exit_code, out, stdout, stderr = train(*options, "rollout.engine=vllm", "--replay", str(saved))
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    assert without_times(out) == without_times(made)
    found, expected = weights(out / "policy"), weights(made / "policy")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(row["seconds"].keys() == {"update"} for row in steps(out))


def test_rollouts_that_do_not_fit_are_refused(train, tmp_path):
    saved = tmp_path / "saved"
    refused(train("--replay", str(saved)), 1, "rollouts of 0 steps", "folder of --save-rollouts")
    exit_code, out, _, stderr = train("train.steps=1", "--save-rollouts", str(saved))
    assert exit_code == 0, stderr
    out.rename(tmp_path / "made")
    refused(train("--save-rollouts", str(saved)), 1, "holds saved rollouts already")
    refused(train("--replay", str(saved)), 1, "recipe has 6", "set train.steps=1")
    refused(
        train("--replay", str(saved), "--save-rollouts", str(tmp_path / "x")), 2, "one of the two"
    )
    replay = ("train.steps=1", "--replay", str(saved))
    refused(train(*replay, "rollout.temperature=0.5"), 1, "temperature is 0.5", "temperature=1")
    refused(train(*replay, "rollout.top_p=0.9"), 1, "rollout.top_p is 0.9, and", "rollout.top_p=1")
    other = "rewards.functions=[{use: geneval, args: {detector: scenes}}]"
    refused(train(*replay, other), 1, "judged by redness", "the recipe has geneval")
    for override in ("seed=5", "rollout.group_size=2", "rollout.prompts_per_step=2"):
        refused(train(*replay, override), 1, "samples of other prompts", "seed and group size")


def test_rollouts_of_two_processes_are_not_replayed_by_one(train, tmp_path):
    tensor = torch.zeros(1, 36)
    scored = Scored(0.5, {"redness": 0.5}, counted={"redness": 0.5})
    rollout = Rollout([[1]], tensor, tensor.clone(), tensor.clone(), [], [scored], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        for process in range(2):
            save_rollout(tmp_path / "saved", rollout, ["x"], Sampling(), 0, process)
    result = train("train.steps=1", "--replay", str(tmp_path / "saved"))
    refused(result, 1, "saved by 2 training processes", "this run has 1", "start 2")


def test_check_refuses_what_train_refuses(policy_folder, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, policy_folder)
    records = records_of_run(load_recipe(str(recipe), ["train.steps=1"]).recipe)
    prompts = [record["prompt"] for record in records for _ in range(4)]
    tensor = torch.zeros(16, 36)
    scores = [Scored(0.5, {"another": 0.5}, counted={"another": 0.5})] * 16
    rollout = Rollout([[1]] * 16, tensor, tensor.clone(), tensor.clone(), [], scores, [])
    save_rollout(tmp_path / "saved", rollout, prompts, Sampling(), 0, 0)
    monkeypatch.setenv("HOME", str(tmp_path))

    def check(folder: str, *overrides: str) -> str:
        assert main(["check", str(recipe), "train.steps=1", folder, *overrides]) == 1
        return " ".join(capsys.readouterr().err.split())

    replay = "rollout.replay=~/saved"
    assert "was judged by another" in check(replay)
    assert "samples of other prompts" in check(replay, "rollout.group_size=2")
    assert "holds saved rollouts already" in check("rollout.save_to=~/saved")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "saved by 1 training processes" in check(replay)
    file = tmp_path / "saved" / "step-000000-0" / "samples.json"
    saved = json.loads(file.read_text())
    del saved["sampling"]
    file.write_text(json.dumps(saved))
    assert "an earlier version saved them" in check(replay)
