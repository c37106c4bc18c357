"""Saved rollouts: what a replay makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import write_recipe

from common.errors import RunError
from data.prompts import records_of_run
from policy.sampling import Sampling
from recipes import load_recipe
from recipes.schema_grpo import GrpoRecipe
from rewards.composition import Composition
from rewards.runner import Scored
from rewards.spec import Gate, RewardSpec
from rl.replay import load_rollout, save_rollout
from rl.rollouts import Rollout
from rl.saved_rollouts import check_judges, check_saved, refuse_used


def saved(folder: Path, parts: list[dict], step: int = 0, prompts: Sequence[str] = ()) -> list[str]:
    """Save a sample for each of the parts, judged by `red` alone; return their prompts."""
    prompts = prompts or ["x"] * len(parts)
    tensor = torch.zeros(len(parts), 4)
    scores = [Scored(one["red"], one, counted={"red": one["red"]}) for one in parts]
    rollout = Rollout([[1]] * len(parts), tensor, tensor.clone(), tensor.clone(), [], scores, [])
    save_rollout(folder, rollout, prompts, Sampling(), step, 0)
    return list(prompts)


@pytest.mark.parametrize(
    ("red", "blue", "totals"),
    [
        ({}, {"weight": 0.0}, [0.2, 0.6, 0.7]),
        ({"weight": 0.0}, {"weight": 2.0}, [1.8, 0.2, None]),
        ({"range": (0.2, 0.6)}, {"weight": 0.0}, [0.0, 1.0, 1.25]),
        ({"weight": 0.0}, {"only_if": Gate("red", 0.5)}, [0.0, 0.1, None]),
        ({"schedule": ((0, 1.0), (4, 3.0))}, {"weight": 0.0}, [0.4, 1.2, 1.4]),
    ],
)
def test_a_replay_counts_saved_scores_by_its_own_recipe(tmp_path, red, blue, totals):
    parts = [{"red": 0.2, "blue": 0.9}, {"red": 0.6, "blue": 0.1}, {"red": 0.7, "blue": None}]
    prompts = saved(tmp_path, parts, step=2)
    composition = Composition({"red": RewardSpec("r", **red), "blue": RewardSpec("b", **blue)})
    rollout, _ = load_rollout(tmp_path, prompts, composition, 2, 0, torch.device("cpu"))
    assert [one.parts for one in rollout.scores] == parts
    for one, total in zip(rollout.scores, totals, strict=True):
        assert one.total == (None if total is None else pytest.approx(total))
        assert (one.counted is None) == (total is None)


def saved_run(tmp_path: Path, policy_folder: Path) -> tuple[GrpoRecipe, Path]:
    """A recipe of two steps and the folder of their rollouts."""
    recipe = load_recipe(str(write_recipe(tmp_path, policy_folder)), ["train.steps=2"]).recipe
    folder, drawn = tmp_path / "saved", records_of_run(recipe)
    for step in range(2):
        prompts = [r["prompt"] for r in drawn[4 * step :][:4] for _ in range(4)]
        saved(folder, [{"red": 0.5 + step}] * 16, step, prompts)
    check_saved(folder, recipe, 1)
    return recipe, folder


@pytest.mark.parametrize(
    ("name", "left"),
    [(name, left) for name in ("samples.json", "tokens.safetensors") for left in (0, 40, -1)]
    + [("tokens.safetensors", None)],
)
def test_a_damaged_file_of_any_step_is_told_before_the_run(tmp_path, policy_folder, name, left):
    """Missing, or with the first bytes alone."""
    recipe, folder = saved_run(tmp_path, policy_folder)
    file = folder / "step-000001-0" / name
    whole = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(whole[:left])
    with pytest.raises(RunError, match=rf"step-000001-0/{name} cannot be used: (?s:.*)Fix: copy"):
        check_saved(folder, recipe, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "it does not hold"),
        ('{"processes": 1, "sampling": {}, "policy_lag": null}', "it does not hold"),
        ("[" * 100_000, "maximum recursion depth"),
    ],
)
def test_a_file_of_something_else_is_told_before_the_run(tmp_path, policy_folder, text, told):
    recipe = load_recipe(str(write_recipe(tmp_path, policy_folder)), ["train.steps=1"]).recipe
    prompts = [r["prompt"] for r in records_of_run(recipe) for _ in range(4)]
    saved(tmp_path / "saved", [{"red": 0.5}] * 16, 0, prompts)
    (tmp_path / "saved" / "step-000000-0" / "samples.json").write_text(text)
    with pytest.raises(RunError, match=rf"samples\.json cannot be used: {told}"):
        check_saved(tmp_path / "saved", recipe, 1)


SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("key", "value"), [("sampling", SAMPLING | {"temperature": 2.0}), ("processes", 2)]
)
def test_facts_that_differ_between_steps_are_told_before_the_run(
    tmp_path, policy_folder, key, value
):
    recipe, folder = saved_run(tmp_path, policy_folder)
    file = folder / "step-000001-0" / "samples.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(RunError, match=rf"0001-0/samples.json cannot be used: its `{key}` is not"):
        check_saved(folder, recipe, 1)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("sampling", SAMPLING | {"temperature": "hot"}, ""),
        ("sampling", None, "its `sampling` does not hold temperature, top_k, top_p"),
        ("sampling", {}, "its `sampling` does not hold"),
        ("sampling", {"temperature": 1.0}, "its `sampling` does not hold"),
        ("sampling", SAMPLING | {"temprature": 1.0}, "its `sampling` does not hold"),
        ("processes", 1.0, r"its `processes` is 1\.0, no number of them"),
        ("processes", "1", "its `processes` is '1', no number of them"),
        ("processes", 0, "its `processes` is 0, no number of them"),
        ("processes", True, "its `processes` is True, no number of them"),
    ],
)
def test_edited_facts_of_all_steps_are_told_before_the_run(
    tmp_path, policy_folder, key, value, told
):
    recipe, folder = saved_run(tmp_path, policy_folder)
    for file in folder.glob("*/samples.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(
        RunError, match=rf"0000-0/samples.json cannot be used: {told}(?s:.*)Fix: copy"
    ):
        check_saved(folder, recipe, 1)


def test_steps_that_changed_places_are_told_before_the_run(tmp_path, policy_folder):
    recipe, folder = saved_run(tmp_path, policy_folder)
    one, other = folder / "step-000000-0", folder / "step-000001-0"
    aside = folder / "aside"
    one.rename(aside), other.rename(one), aside.rename(other)
    with pytest.raises(RunError, match=r"0000-0/samples.json cannot be used: it is of step 1"):
        check_saved(folder, recipe, 1)


def test_tokens_that_were_edited_are_told_before_the_run_and_at_their_step(tmp_path, policy_folder):
    recipe, folder = saved_run(tmp_path, policy_folder)
    file = folder / "step-000001-0" / "tokens.safetensors"
    edited = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(edited, file)
    told = r"0001-0/tokens.safetensors cannot be used: its tokens, or the prompt_ids"
    with pytest.raises(RunError, match=told):
        check_saved(folder, recipe, 1)
    with pytest.raises(RunError, match=told):
        load_rollout(folder, [], Composition({}), 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("score", "told"),
    [
        ({"parts": {}}, "sample 7 was judged by none, and the recipe has red"),
        ({"parts": {"red": 0.1, "rde": 0.2}}, "sample 7 was judged by red, rde, and the recipe"),
        ({"parts": {"red": "0.5"}}, "score '0.5' of `red` for sample 7 is neither a number"),
        ({"parts": {"red": float("nan")}}, "score nan of `red` for sample 7 is neither a number"),
        ({"parts": {"red": 3e38}}, r"score 3e\+38 of `red` for sample 7 is neither a number"),
        ({"parts": {"red": 10**400}}, "of `red` for sample 7 is neither a number"),
        ({"parts": {"red": True}}, "score True of `red` for sample 7 is neither a number"),
        ({"parts": {"red": 0.5}, "reasons": None}, "cannot be used"),
        ({"parts": {"red": 0.5}, "reasons": {"red": 4}}, "sample 7 has a reason that is no text"),
        ({"parts": {"red": 0.5}, "details": None}, "details of sample 7 are no mapping"),
        ({"parts": [0.5]}, "cannot be used"),
        ({"part": {"red": 0.5}}, "cannot be used: it lacks 'parts'"),
    ],
)
def test_an_edited_score_of_any_step_is_told_before_the_run(tmp_path, score, told):
    for step in range(2):
        saved(tmp_path, [{"red": 0.5}] * 8, step)
    check_judges(tmp_path, ["red"], 2)
    file = tmp_path / "step-000001-0" / "samples.json"
    facts = json.loads(file.read_text())
    facts["samples"][7]["score"] = {"parts": {"red": None}, "note": "by hand"}
    file.write_text(json.dumps(facts))
    check_judges(tmp_path, ["red"], 2)
    rollout, _ = load_rollout(
        tmp_path, ["x"] * 8, Composition({"red": RewardSpec("r")}), 1, 0, torch.device("cpu")
    )
    assert rollout.scores[7].total is None
    facts["samples"][7]["score"] = score
    file.write_text(json.dumps(facts))
    with pytest.raises(RunError, match=rf"0001-0/samples.json.* {told}(?s:.*)Fix: "):
        check_judges(tmp_path, ["red"], 2)


def test_a_folder_to_save_rollouts_to_can_be_written(tmp_path):
    (tmp_path / "notes").write_text("")
    told = r"rollout\.save_to: .* saved to {}: {}\.\n    Fix: give --save-rollouts a new folder"
    for folder, why in (
        (tmp_path / "notes", "Not a directory"),
        (tmp_path / "notes" / "deeper", "Not a directory"),
        # Not even root may write there.
        (Path("/proc/rollouts"), "No such file or directory"),
    ):
        with pytest.raises(RunError, match=told.format(folder, why)):
            refuse_used(folder)
    refuse_used(tmp_path / "new" / "deeper")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]
