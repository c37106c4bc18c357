"""`atelier train` from recipe to policy folder, in every variant, as a user runs it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import REDNESS, write_recipe

from cli.main import main
from common.journal import read_journal
from evals.policy_hash import policy_hash
from policy import Policy

ROOT = Path(__file__).resolve().parents[2]
STEP_LINE = re.compile(
    r"train \d+/\d+  reward (-?\d+\.\d{3}|-)(  strict \d\.\d{3})?"
    r"(  eta [0-9hms ]+)?"
)
OTHER_LINES = (
    STEP_LINE,
    re.compile(r"(load|train \d+/\d+)  done in [0-9.hms ]+"),
    re.compile(r"step \d+: held-out (\d\.\d{3}|None)"),
    # vLLM's C++ part, on a machine whose memory it binds.
    re.compile(r"\[W.*NUMA binding.*"),
)


@pytest.fixture
def train(policy_folder, tmp_path, capfd):
    """Train the tiny recipe with overrides; return exit code, run folder, stdout and stderr."""

    def run(*overrides: str, code: str = REDNESS, recipe: Path | str | None = None):
        path = recipe or write_recipe(tmp_path / "recipe", policy_folder, code=code)
        out = tmp_path / "run"
        capfd.readouterr()
        exit_code = main(["train", str(path), *overrides, "--out", str(out)])
        text = capfd.readouterr()
        return exit_code, out, text.out, text.err

    return run


def steps(out: Path) -> list[dict]:
    return [row for row in read_journal(out / "metrics.jsonl") if "event" not in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Policy.from_pretrained(folder).ar.state_dict())


def moved(out: Path, policy_folder: Path) -> list[str]:
    before, after = weights(policy_folder), weights(out / "policy")
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def assert_clean(out: str, err: str) -> None:
    """Nothing on the screen but what we put there."""
    assert re.match(r"trained \S+\n  policy   \S+\n  metrics  \S+\n  next     .*\n$", out), out
    for line in err.splitlines():
        assert any(form.fullmatch(line) for form in OTHER_LINES), line


# --- runs that end well --------------------------------------------------------------------------


def test_a_lora_run_leaves_a_merged_policy_metrics_and_a_clean_screen(train, policy_folder):
    exit_code, out, stdout, stderr = train("evals.every=2", "evals.limit=3")
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    assert len(STEP_LINE.findall(stderr)) == 6
    names = moved(out, policy_folder)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert names
    assert {name.split(".")[-2] for name in names} == set(targets)
    # The whole folder is a policy, and all but the language model is as it was.
    base, trained = Policy.from_pretrained(policy_folder), Policy.from_pretrained(out / "policy")
    for part in ("image_tokenizer", "connector", "diffusion", "vae"):
        for (name, one), other in zip(
            getattr(base, part).state_dict().items(),
            getattr(trained, part).state_dict().values(),
            strict=True,
        ):
            assert torch.equal(one, other), name
    [stage] = trained.config.provenance["stages"]
    start = policy_hash(base)
    assert stage == {"recipe": "tiny", "kind": "grpo", "steps": 6, "seed": 0, "start": start}
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == [
        "checkpoints", "metrics.jsonl", "policy", "recipe.yaml",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-000004", "step-000006",
    ]  # fmt: skip

    rows = steps(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["reward_std"] > 0
        assert row["rewards"]["redness"] == pytest.approx(row["reward"], rel=1e-5)
        assert row["clip_fraction"] == 0
        assert row["missing_rewards"] == 0
        assert row["zero_variance_groups"] == 0
        assert row["grad_norm"] > 0
        assert row["lr"] == pytest.approx(1e-2)
        assert 0 <= row["entropy"] <= np.log(64) + 1e-6
        assert row["logprob_mismatch_max"] < 1e-4
        assert row["importance_ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert {"sync", "rollout", "score", "render", "reward", "update"} == row["seconds"].keys()
        assert all(seconds >= 0 for seconds in row["seconds"].values())
    curve = [row for row in read_journal(out / "metrics.jsonl") if row.get("event") == "eval"]
    assert [row["step"] for row in curve] == [0, 2, 4, 6]
    assert all(row["strict"] is not None and row["per_task"] for row in curve)


def test_a_full_run_trains_every_weight_that_is_used(train, policy_folder):
    exit_code, out, stdout, stderr = train("policy.lora=null", "train.steps=2")
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    untouched = set(weights(policy_folder)) - set(moved(out, policy_folder))
    assert untouched == set()


@pytest.mark.parametrize("lora", [[], ["policy.lora=null"]])
def test_a_run_in_bfloat16_trains_and_stores_it(train, policy_folder, lora):
    overrides = ["policy.dtype=bfloat16", "train.steps=2", "algorithm.beta=0.05"]
    exit_code, out, stdout, stderr = train(*overrides, *lora)
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    assert moved(out, policy_folder)
    [file] = (out / "policy" / "ar").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    # Rounding differs between the sampler's pass and the trainer's, a mix-up would cost nats.
    assert all(row["logprob_mismatch_max"] < 0.5 for row in steps(out))


@pytest.mark.parametrize(
    "sampling", [["rollout.top_k=8", "rollout.temperature=0.7"], ["rollout.top_p=0.8"]]
)
def test_truncated_sampling_is_corrected_for(train, sampling):
    exit_code, out, _, stderr = train("train.steps=2", *sampling)
    assert exit_code == 0, stderr
    for row in steps(out):
        # The trainer's whole softmax gives every token less than the truncated one did.
        assert 0.3 < row["importance_ratio_mean"] < 0.95
        assert row["clip_fraction"] == 0


@pytest.mark.parametrize("lora", [[], ["policy.lora=null"]])
def test_the_learning_rate_warms_up(train, lora):
    exit_code, out, _, stderr = train("train.steps=3", "train.warmup_steps=2", *lora)
    assert exit_code == 0, stderr
    assert [row["lr"] for row in steps(out)] == pytest.approx([0, 0.005, 0.01])


def test_a_run_with_kl_reports_it(train):
    exit_code, out, _, stderr = train("algorithm.beta=0.1", "train.steps=2", "policy.lora=null")
    assert exit_code == 0, stderr
    first, second = (row["kl"] for row in steps(out))
    assert first == pytest.approx(0, abs=1e-8)
    assert second > 0


def test_per_sample_noise_changes_the_pictures_and_nothing_else(train, tmp_path):
    rows = []
    for noise in ("shared_in_group", "per_sample"):
        exit_code, out, _, stderr = train(f"decode.train.noise={noise}", "train.steps=1")
        assert exit_code == 0, stderr
        rows.append(steps(out)[0])
        out.rename(tmp_path / noise)
    shared, own = rows
    assert shared["entropy"] == own["entropy"]  # the same tokens
    assert shared["reward"] != own["reward"]
    assert own["reward_std"] > 0


def test_a_run_in_waves_learns_the_same_and_tells_when_each_stage_was_at_work(train, tmp_path):
    runs = []
    for waves in (1, 3):
        exit_code, out, stdout, stderr = train("train.steps=2", f"rollout.waves={waves}")
        assert exit_code == 0, stderr
        assert_clean(stdout, stderr)
        runs.append(steps(out))
        out.rename(tmp_path / f"waves-{waves}")
    for whole, waves in zip(*runs, strict=True):
        assert waves["reward"] == pytest.approx(whole["reward"], rel=1e-3)
        # Batches of other sizes round otherwise, and after an update that may move a token.
        if whole["step"] == 1:
            assert waves["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
        stages = [(stage, wave) for stage, wave, _, _ in waves["stages"]]
        expected = [(s, w) for s in ("rollout", "score", "render", "reward") for w in range(3)]
        assert sorted(stages) == sorted([("sync", 0), ("update", 0), *expected])
        busy = {stage: 0.0 for stage in waves["seconds"]}
        for stage, _, start, end in waves["stages"]:
            assert 0 <= start <= end
            busy[stage] += end - start
        assert busy == pytest.approx(waves["seconds"], abs=1e-3)
        first, last = waves["stages"][0], waves["stages"][-1]
        assert (first[0], last[0]) == ("sync", "update")


def test_a_reward_that_compares_a_whole_step_is_not_given_waves(train):
    result = train("rollout.waves=2", code=NOW_AND_THEN)
    refused(result, 1, "rollout.waves is 2", "`now_and_then` compares", "rollout.waves to 1")


def test_a_run_on_signs_is_read_by_ocr(train, policy_folder):
    exit_code, out, stdout, stderr = train(
        f"policy.path={policy_folder}",
        "policy.device=cpu",
        "rollout.group_size=2",
        "rollout.prompts_per_step=2",
        "decode.train.steps=1",
        "train.steps=2",
        "evals.every=2",
        "evals.limit=2",
        recipe="ocr-scenes",
    )
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    assert all(set(row["rewards"]) == {"ocr"} for row in steps(out))
    curve = [row for row in read_journal(out / "metrics.jsonl") if row.get("event") == "eval"]
    assert [row["step"] for row in curve] == [0, 2]


def test_a_run_is_scored_by_geneval_on_the_scene_world(train, policy_folder):
    exit_code, out, stdout, stderr = train(
        "rewards.functions=[{use: geneval, args: {detector: scenes}}]", "train.steps=2"
    )
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    for row in steps(out):
        assert {"strict", "soft", "extra_objects"} <= row.keys()


@pytest.mark.parametrize("lora_sync", ["merged", "adapter"])
def test_the_vllm_engine_samples_what_the_trainer_scores(train, policy_folder, lora_sync):
    exit_code, out, stdout, stderr = train(
        "rollout.engine=vllm", "train.steps=3", "train.learning_rate=1e-2", "evals.every=3",
        "evals.limit=2", f"rollout.lora_sync={lora_sync}",
    )  # fmt: skip
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    rows = steps(out)
    assert len(rows) == 3
    # After two updates of this size a stale engine would be off by far more.
    assert all(row["logprob_mismatch_max"] < 1e-4 for row in rows)
    assert moved(out, policy_folder)


def test_a_worker_samples_the_next_step_while_this_one_is_learnt(train, policy_folder):
    exit_code, out, _, stderr = train(
        "rollout.workers=1", "rollout.max_policy_lag=1", "train.steps=3", "policy.lora=null",
        "evals.every=2", "evals.limit=2",
    )  # fmt: skip
    assert exit_code == 0, stderr
    rows = steps(out)
    assert [row["policy_lag"] for row in rows] == [0, 1, 1]
    assert [row["seconds"].get("ahead", 0) > 0 for row in rows] == [True, True, False]
    # Log-probs are of the weights that drew: those of the step, then those before the update.
    assert rows[0]["logprob_mismatch_max"] < 1e-4
    assert all(row["logprob_mismatch_max"] > 1e-2 for row in rows[1:])
    assert moved(out, policy_folder)


# --- rewards and prompts of one's own ------------------------------------------------------------


def test_the_example_of_a_custom_reward_runs_from_any_folder(train, policy_folder, tmp_path):
    exit_code, out, stdout, stderr = train(
        f"policy.path={policy_folder}",
        "policy.device=cpu",
        "rollout.group_size=3",
        "rollout.prompts_per_step=2",
        "decode.train.steps=1",
        "train.steps=1",
        "evals.every=0",
        recipe=ROOT / "examples" / "custom_reward" / "recipe.yaml",
    )
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    assert set(steps(out)[0]["rewards"]) == {"geneval", "warmth"}


def test_rewards_are_called_with_pictures_and_prompts_of_the_step(train, tmp_path):
    code = f"""
import json

def redness(images, prompts, metadata, prompt_id):
    samples = zip(images, prompts, metadata, prompt_id)
    rows = [[i.size, i.mode, p, m["prompt"], n] for i, p, m, n in samples]
    with open({str(tmp_path / "seen.jsonl")!r}, "a") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)
    return [float(n) for n in range(len(images))]
"""
    exit_code, _, _, stderr = train("train.steps=1", code=code)
    assert exit_code == 0, stderr
    rows = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    for size, mode, prompt, described, _ in rows:
        assert (size, mode) == ([48, 48], "RGB")
        assert prompt == described
    names = [row[4] for row in rows]
    assert all(len(set(names[i : i + 4])) == 1 for i in range(0, 16, 4))


RAISING = """
def redness(images, prompts):
    raise OSError("the judge is away")
"""

NOW_AND_THEN = '''
import numpy as np
from rewards import reward

calls = 0

@reward(name="now_and_then", whole_batch=True)
def redness(images, prompts):
    """No picture of the second step can be scored, and one of the third."""
    global calls
    calls += 1
    if calls == 2:
        raise OSError("the judge is away")
    scores = [float(np.asarray(image, dtype=float)[..., 0].mean()) for image in images]
    return [None, *scores[1:]] if calls == 3 else scores
'''


def test_a_reward_that_always_raises_moves_nothing_and_ends_nothing(train, policy_folder, caplog):
    exit_code, out, stdout, stderr = train("train.steps=2", "policy.lora=null", code=RAISING)
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    assert "16 of 16 images could not be scored: OSError: the judge is away" in caplog.text
    assert "train 2/2  reward -" in stderr
    assert [row["missing_rewards"] for row in steps(out)] == [16, 16]
    assert [row["reward"] for row in steps(out)] == [None, None]
    assert moved(out, policy_folder) == []


def test_a_run_that_nothing_can_be_learnt_from_stops(train, policy_folder):
    exit_code, out, _, stderr = train("train.steps=6", "save.every=1", code=RAISING)
    assert exit_code == 1
    assert "no picture of the last 3 steps could be scored" in stderr
    assert "OSError: the judge is away" in stderr
    assert "Traceback" not in stderr
    assert len(steps(out)) == 2
    assert (out / "checkpoints" / "step-000002").is_dir()
    assert not (out / "policy").exists()


def test_a_reward_that_fails_now_and_then_costs_those_samples_alone(train, policy_folder):
    exit_code, out, stdout, stderr = train("train.steps=4", "algorithm.beta=0", code=NOW_AND_THEN)
    assert exit_code == 0, stderr
    assert_clean(stdout, stderr)
    rows = steps(out)
    assert [row["missing_rewards"] for row in rows] == [0, 16, 1, 0]
    assert [row["zero_variance_groups"] for row in rows] == [0, 4, 0, 0]
    assert rows[1]["reward"] is None
    assert rows[1]["grad_norm"] == 0
    assert rows[2]["grad_norm"] > 0


def write_prompts(path: Path) -> None:
    lines = [
        {
            "tag": "single_object",
            "include": [{"class": "circle", "count": 1}],
            "prompt": "a circle",
        },
        {"prompt": "an <I3> odd <|im_end|> one", "metadata": {"tag": "own"}, "extra": 4},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_prompts_come_from_a_file_beside_the_recipe(train, policy_folder, tmp_path):
    path = write_recipe(tmp_path / "recipe", policy_folder)
    write_prompts(tmp_path / "recipe" / "mine.jsonl")
    exit_code, out, _, stderr = train("prompts.source=mine.jsonl", "train.steps=2", recipe=path)
    assert exit_code == 0, stderr
    assert len(steps(out)) == 2


# --- runs that cannot start ----------------------------------------------------------------------


def refused(result, exit_code: int, *words: str) -> None:
    found, out, stdout, stderr = result
    assert found == exit_code, stderr
    for word in words:
        assert word in stderr
    assert "Traceback" not in stderr
    assert stderr.count("error: ") == 1
    assert stdout == ""
    assert not out.exists(), "a run that did not start must not stand in the way of the next"


def test_a_wrong_recipe_is_refused(train):
    refused(train("train.stepz=3"), 2, "train.stepz", "did you mean `steps`?")


def test_a_stage_run_cannot_be_resumed_and_says_so(tmp_path, capfd):
    from cli.main import main

    (tmp_path / "recipe.yaml").write_text("extends: base/2-autoencoder\n")
    assert main(["resume", str(tmp_path)]) == 1
    message = " ".join(capfd.readouterr().err.split())
    assert "autoencoder" in message
    assert "resume" in message
    assert "Traceback" not in message


def test_a_missing_policy_is_refused(train, tmp_path):
    refused(train(f"policy.path={tmp_path / 'nowhere'}"), 1, "nowhere", "policy.json is missing")


def test_a_damaged_policy_is_refused(train, policy_folder, tmp_path):
    import shutil

    folder = shutil.copytree(policy_folder, tmp_path / "damaged")
    shutil.rmtree(folder / "vae")
    refused(train(f"policy.path={folder}"), 1, "damaged/vae is missing")


def test_a_reward_that_does_not_exist_is_refused(train):
    refused(train('rewards.functions=[{use: "absent.py:nothing"}]'), 1, "absent.py")


def test_a_suite_that_does_not_exist_is_refused(train):
    exit_code, out, _, stderr = train("evals.every=1", "evals.suite=nothing")
    refused((exit_code, out, "", stderr), exit_code, "nothing")
    assert exit_code in (1, 2)


def test_adapters_on_layers_that_do_not_exist_are_refused(train):
    refused(train("policy.lora.targets=[q_proj, lm_head]"), 2, "policy.lora.targets", "lm_head")


def test_a_prompt_file_without_prompts_is_refused(train, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(train(f"prompts.source={tmp_path / 'empty.jsonl'}"), 1, "empty.jsonl")


def test_tasks_that_a_file_lacks_are_refused(train, tmp_path):
    write_prompts(tmp_path / "mine.jsonl")
    result = train(f"prompts.source={tmp_path / 'mine.jsonl'}", "prompts.tasks={own: 0, other: 1}")
    refused(result, 1, "mine.jsonl", "prompts.tasks.other", "it has own")
