"""`atelier plan`: what it says about a tiny recipe and the published one, and how it looks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cli import console, doctor, machine, plan_parts
from cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = "blip3o-next-3b/grpo-geneval"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(machine, "gpus", lambda: None)


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


# --- a tiny recipe -----------------------------------------------------------------------------


def test_a_tiny_plan_imports_no_torch_and_takes_no_second(policy_folder, tmp_path):
    arguments = [
        "plan", "geneval-scenes", f"policy.path={policy_folder}", "train.steps=10", "save.every=4",
        "policy.lora.rank=2", "policy.lora.targets=[q_proj, v_proj]",
        "decode.train.steps=6", "decode.train.guidance=1.5",
    ]  # fmt: skip
    code = "import sys, time; from cli.main import main; code = main(); "
    code += "assert 'torch' not in sys.modules; assert time.process_time() < 2; sys.exit(code)"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        cwd=tmp_path,
    )
    text = " ".join(result.stdout.split())
    images, layers = 10 * 12 * 12, 2
    assert f"images {images:,} (12 prompts x 12 a step)" in text
    assert f"image tokens {images * 36:,} " in text
    assert f"{images * 6 * 2:,} passes" in text  # six steps, with and without condition
    q, v = 2 * (64 + 64), 2 * (64 + 32)  # rank times (in + out)
    assert f"trained {layers * (q + v):,} (adapters" in text
    assert "3 written, the newest 2 kept" in text  # steps 4, 8 and the last
    assert "of this machine" in text
    assert "GPU" not in text
    assert not (tmp_path / "runs").exists()


def test_plan_names_what_is_wrong_with_the_policy(policy_folder, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(policy_folder, tmp_path / "copy")

    def error_of(*more):
        code = main(["plan", "geneval-scenes", f"policy.path={folder}", *more])
        return code, capsys.readouterr().err

    code, message = error_of("policy.lora.targets=[q_porj]")
    assert code == 2
    assert "did you mean `q_proj`" in message
    (folder / "diffusion" / "config.json").unlink()
    code, message = error_of()
    assert code == 1
    assert "copy/diffusion has no config.json" in message
    (weights,) = (folder / "vae").glob("*.safetensors")
    weights.write_bytes(b"\xff" * 20)
    code, message = error_of()
    assert code == 1
    assert f"vae/{weights.name} is damaged" in message
    (folder / "policy.json").unlink()
    code, message = error_of()
    assert code == 2
    assert "no policy.json" in message


def test_one_change_is_named_where_memory_is_short(policy_folder, monkeypatch, capsys):
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1_300_000_000)
    recipe = ("geneval-scenes", "policy.path=base")
    verdict = planned(capsys, *recipe)["verdict"]
    assert not verdict["fits"]
    assert verdict["decided_by"] == "update"
    change = verdict["fix"]["change"]
    after = planned(capsys, *recipe, change)["verdict"]
    assert after["fits"]
    assert after["needs"] == verdict["fix"]["needs"]
    micro = int(change.removeprefix("train.micro_batch="))
    larger = next(size for size in range(micro + 1, 145) if 144 % size == 0)
    assert not planned(capsys, *recipe, f"train.micro_batch={larger}")["verdict"]["fits"]
    lines = shown(capsys, *recipe).splitlines()
    assert sum("Fix:" in line for line in lines) == 1
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1_001_000_000)
    assert planned(capsys, *recipe)["verdict"]["fix"] is None
    assert "more memory" in shown(capsys, *recipe)


@pytest.mark.parametrize(
    ("asked", "gigabytes", "named"),
    [
        (["rollout.workers=30"], 10, r"rollout\.workers=\d"),
        (["rollout.workers=3"], 2, r"rollout\.workers=0"),
        (["rollout.workers=30", "rollout.max_policy_lag=1"], 3, r"rollout\.workers=1"),
        (["decode.workers=30"], 10, r"decode\.workers=\d"),
        (["rollout.workers=30", "decode.workers=2"], 10, r"rollout\.workers=\d"),
        (["rollout.workers=9", "decode.workers=9"], 5, r"rollout\.workers=0 decode\.workers=0"),
    ],
)
def test_as_many_workers_are_named_as_fit(monkeypatch, capsys, asked, gigabytes, named):
    monkeypatch.setattr(machine, "memory_bytes", lambda: gigabytes * 10**9)
    recipe = ("geneval-scenes", "policy.path=base", *asked)
    verdict = planned(capsys, *recipe)["verdict"]
    assert not verdict["fits"]
    change = verdict["fix"]["change"]
    assert re.fullmatch(named, change)
    after = planned(capsys, *recipe, *change.split())["verdict"]
    assert after["fits"]
    assert after["needs"] == verdict["fix"]["needs"]
    key, _, count = change.split()[0].partition("=")
    more = change.replace(f"{key}={count}", f"{key}={int(count) + 1}", 1).split()
    if len(more) == 1:
        assert not planned(capsys, *recipe, *more)["verdict"]["fits"]


def test_the_doctor_names_the_same_change(monkeypatch, capsys):
    assert doctor._memory().status == "ok"
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1_300_000_000)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 1_300_000_000)
    check = doctor._memory()
    assert check.status == "warn"
    assert check.fix.split()[-1] == planned(capsys, "geneval-scenes")["verdict"]["fix"]["change"]


# --- the published architecture -----------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """Build the meta modules once."""
    from policy.published import published_anatomy

    return published_anatomy()


@pytest.fixture
def sizes(monkeypatch, published):
    import policy.published

    monkeypatch.setattr(policy.published, "published_anatomy", lambda: published)


def test_the_shipped_recipe_fits_one_h100_and_four_times_its_micro_batch_does_not(sizes, capsys):
    facts = planned(capsys, PUBLISHED)
    assert facts["sizes"].startswith("the published configurations")
    assert facts["parameters"]["ar"] == 1_854_256_128
    assert facts["trained"]["full"] == 1_854_256_128
    # Rank 32: q and o are 2048 wide on both sides, k and v half on one, the MLP's three 6144.
    assert facts["trained"]["lora"] == 28 * 32 * (2 * 4096 + 2 * 3072 + 3 * 8192)
    assert facts["verdict"]["device"] == "H100"
    assert facts["verdict"]["fits"]
    spread = [(row["gpus"], row["zero_stage"]) for row in facts["memory"]]
    assert spread == [(1, 0), (8, 1), (8, 2), (32, 1), (32, 2)]
    assert len(facts["options"]) == 2 * len(spread)
    for row in facts["memory"]:
        assert row["peak"] == sum(row["resident"].values()) + max(row["phases"].values())
    larger = planned(capsys, PUBLISHED, "train.micro_batch=32")["verdict"]
    assert not larger["fits"]
    assert larger["fix"]["change"] == "train.micro_batch=16"


def test_the_gpu_of_the_machine_decides(sizes, monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", lambda: [("NVIDIA L40S", 46_068 * 2**20)])
    verdict = planned(capsys, PUBLISHED)["verdict"]
    assert verdict["device"] == "NVIDIA L40S"
    assert verdict["fix"]["change"] == "train.micro_batch=4"


def test_a_folder_that_is_there_is_read(sizes, policy_folder, tmp_path, capsys):
    folder = tmp_path / "blip3o-next-3b"
    folder.symlink_to(policy_folder)
    facts = planned(capsys, PUBLISHED, f"policy.path={folder}")
    assert facts["sizes"] == str(folder)


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_a_terminal(sizes, monkeypatch, columns):
    screen = Console(force_terminal=True, no_color=True, width=columns, soft_wrap=True, record=True)
    monkeypatch.setattr(console, "stdout", lambda: screen)
    assert main(["plan", PUBLISHED, "policy.lora=null", "train.micro_batch=256"]) == 0
    lines = screen.export_text().splitlines()
    assert len(lines) > 50
    files = lines.index("files")
    assert max(map(len, lines[:files])) <= 80 if columns == 80 else columns


def test_piped_output_is_plain_text(sizes, capsys):
    text = shown(capsys, PUBLISHED)
    assert "\x1b" not in text
    assert "(estimate)" in text
    table = [line for line in text.splitlines() if line.startswith("  + ")]
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    assert "32 GPUs need rollout.prompts_per_step=32" in text


def test_workers_of_this_machine_take_its_memory(capsys):
    alone = planned(capsys, "geneval-scenes", "policy.path=base")
    asked = ("geneval-scenes", "policy.path=base", "rollout.workers=2", "decode.workers=3")
    facts = planned(capsys, *asked)
    of = {section: one["peak"] + 10**9 for section, one in facts["workers"].items()}
    kept = facts["memory"][0]["resident"]
    assert kept["rollout workers"] == 2 * of["rollout"]
    assert kept["decode workers"] == 3 * of["decode"]
    more = facts["verdict"]["needs"] - alone["verdict"]["needs"]
    assert more == 2 * of["rollout"] + 3 * of["decode"]  # the update decides in both
    joined = planned(capsys, *asked, "rollout.ray.address=auto")
    assert joined["verdict"]["needs"] == alone["verdict"]["needs"]


def test_workers_are_counted_where_they_are(sizes, capsys):
    asked = [PUBLISHED, "decode.workers=2", "rollout.workers=2", "rollout.engine=vllm"]
    asked += ["rollout.ray.gpus_per_worker=1", "rollout.ray.address=auto"]
    asked += ["rollout.vllm.weight_transfer=nccl"]
    facts = planned(capsys, *asked)
    assert facts["workers"].keys() == {"rollout", "decode"}
    one, several = facts["memory"][0]["phases"], facts["memory"][1]["phases"]
    assert one["sampling"] == 0 < several["sampling"]  # several GPUs have no workers
    assert one["decoding"] < 10**9 < several["decoding"]
    assert "sending" in one
    assert "sending" not in several
    text = shown(capsys, *asked)
    assert text.index("memory of each worker") < text.index("several GPUs need decode.workers=0")
    shared = [PUBLISHED, "rollout.workers=2", "rollout.engine=vllm"]
    shared += ["rollout.ray.gpus_per_worker=0.5", "rollout.vllm.weight_transfer=ipc"]
    text = shown(capsys, *shared)  # their memory is in that of the trainer's GPU
    assert "each worker" not in text
    assert "several GPUs need rollout.workers=0" in text
    assert planned(capsys, PUBLISHED)["workers"] == {}
    assert "each worker" not in shown(capsys, PUBLISHED)


@pytest.mark.parametrize(
    ("steps", "every", "times"),
    [(2, 10, 2), (20, 10, 3), (25, 10, 4), (25, 0, 0)],  # before the first step: 0, 10, 20, 25
)
def test_evaluations_before_and_after_training_count(capsys, steps, every, times):
    overrides = [f"train.steps={steps}", f"evals.every={every}"]
    assert planned(capsys, "geneval-scenes", *overrides)["work"]["evaluations"] == times


def test_a_codec_s_rows_are_counted(capsys):
    overrides = ["train.steps=101", "train.unquantized_steps=1"]  # steps 1, 51 and 101
    assert planned(capsys, "base/1-image-tokenizer", *overrides)["files"]["metrics_rows"] == 3
    assert planned(capsys, "base/2-autoencoder", "train.steps=60")["files"]["metrics_rows"] == 3


def test_operations_are_readable():
    assert plan_parts.operations(999) == "999 FLOP"
    assert plan_parts.operations(64.6e12) == "64.6 TFLOP"
    assert plan_parts.operations(2.21e16) == "22.1 PFLOP"
