"""Runs that are interrupted, killed or damaged end with the numbers of an undisturbed run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_policy import write_recipe

from cli.main import main
from common.journal import read_journal
from common.lock import folder_lock
from policy import Policy

LORA: tuple[str, ...] = ()
FULL = ("policy.lora=null",)
# Decoding gets better after the first and the third step.
MICRO = ("train.micro_batch=4", "decode.check={every: 2, limit: 1.0}", "decode.eval.steps=8")
# With what a resumed run could forget: momentum, a schedule, dropout's generator, the reference.
HARD = (
    "policy.lora.dropout=0.3",
    "algorithm.beta=0.05",
    "train.warmup_steps=5",
    "train.weight_decay=0.1",
    "evals.every=2",
    "evals.limit=2",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are taken in another order by another number of threads, here as in the children."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(policy_folder, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), policy_folder)


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """Return the folder of a run that nothing happened to, for these overrides."""

    @cache
    def run(overrides: tuple[str, ...]) -> Path:
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        assert main(["train", str(recipe), *overrides, "--out", str(out)]) == 0
        return out

    return run


def rows(out: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "stages")}
        for row in read_journal(out / "metrics.jsonl")
    ]


def assert_same(out: Path, expected: Path) -> None:
    """Row by row and weight by weight, to the last bit."""
    assert rows(out) == rows(expected)
    found, wanted = (Policy.from_pretrained(folder / "policy") for folder in (out, expected))
    for (name, one), other in zip(
        wanted.state_dict().items(), found.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert found.config == wanted.config


def start(recipe: Path, out: Path, overrides: tuple[str, ...]) -> int:
    return main(["train", str(recipe), *overrides, "--out", str(out)])


# --- SIGINT and SIGTERM --------------------------------------------------------------------------


@pytest.fixture
def signal_after(monkeypatch):
    """Send this process a signal when the row of a step has been written."""

    def arm(number: int, step: int, once: bool = True) -> None:
        from rl.callbacks import JournalCallback

        original = JournalCallback.on_log

        def on_log(self, args, state, control, logs=None, **kwargs):
            original(self, args, state, control, logs, **kwargs)
            if logs and "reward" in logs and state.global_step == step:
                monkeypatch.setattr(JournalCallback, "on_log", original)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(JournalCallback, "on_log", on_log)

    return arm


@pytest.mark.parametrize(
    "overrides", [LORA, FULL, FULL + MICRO, HARD + MICRO], ids=["lora", "full", "micro", "hard"]
)
def test_an_interrupted_run_resumes_to_the_same_numbers(
    recipe, undisturbed, signal_after, tmp_path, capfd, overrides
):
    out = tmp_path / "run"
    expected = undisturbed(overrides)
    before = signal.getsignal(signal.SIGTERM)
    signal_after(signal.SIGTERM, step=2)
    capfd.readouterr()
    assert start(recipe, out, overrides) == 75
    text = capfd.readouterr().err
    assert f"stopped after step 3; go on with `atelier resume {out}`" in text
    assert "Traceback" not in text
    assert (out / "checkpoints" / "step-000003").is_dir()
    assert not (out / "policy").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(["resume", str(out)]) == 0
    assert "resuming from" in capfd.readouterr().err
    assert_same(out, expected)


def test_an_interrupted_run_resumes_from_another_folder(
    recipe, undisturbed, signal_after, tmp_path, monkeypatch
):
    expected = undisturbed(LORA)
    monkeypatch.chdir(recipe.parent)
    signal_after(signal.SIGINT, step=1)
    assert start(Path(recipe.name), tmp_path / "run", LORA) == 75
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "run"]) == 0
    assert_same(tmp_path / "run", expected)


def test_an_interruption_in_the_last_step_comes_too_late_to_matter(
    recipe, undisturbed, signal_after, tmp_path
):
    expected = undisturbed(LORA)
    signal_after(signal.SIGTERM, step=5)
    assert start(recipe, tmp_path / "run", LORA) == 0
    assert_same(tmp_path / "run", expected)


# --- kill -9 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.ForkServerContext:
    """Processes that have everything imported already and can be killed without regret."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rl.run", "cli.main"])
    return context


def in_child(recipe: Path, out: Path, overrides: tuple[str, ...], call: str, at: int) -> None:
    """Start or resume a run; kill this process at the `at`-th `call` that has to do with saving."""
    torch.set_num_threads(1)
    if call:
        _kill_at(call, at)
    begun = (out / "recipe.yaml").is_file()
    code = main(["resume", str(out)]) if begun else start(recipe, out, overrides)
    os._exit(code)


def _kill_at(call: str, at: int) -> None:
    import safetensors.torch

    places = {
        "os.replace": (os, "replace"),
        "os.fsync": (os, "fsync"),
        "torch.save": (torch, "save"),
        "rmtree": (shutil, "rmtree"),
        "policy": (os, "replace"),
        "save_file": (safetensors.torch, "save_file"),
    }
    owner, name = places[call]
    original, calls = getattr(owner, name), 0

    def killing(*args, **kwargs):
        nonlocal calls
        calls += call != "policy" or Path(args[1]).name == "policy"
        if calls == at:
            if call in ("torch.save", "save_file"):  # half a file is on the disk
                path = next(Path(a) for a in args if isinstance(a, str | Path))
                path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


def run_child(forks, recipe, out, overrides, call="", at=0) -> int:
    child = forks.Process(target=in_child, args=(recipe, out, overrides, call, at))
    child.start()
    child.join()
    return child.exitcode


KILLS = [
    ("torch.save", 2),  # in the first checkpoint: none is left to go on from
    ("os.fsync", 12),
    ("os.replace", 4),
    ("rmtree", 4),
    ("save_file", 1),
    ("policy", 1),  # the trained policy is written, and not yet in its place
]


@pytest.mark.parametrize("overrides", [LORA, FULL + MICRO], ids=["lora", "full"])
def test_kills_while_saving_change_nothing(forks, recipe, undisturbed, tmp_path, overrides):
    expected, out = undisturbed(overrides), tmp_path / "run"
    for call, at in KILLS:
        assert run_child(forks, recipe, out, overrides, call, at) == -signal.SIGKILL, call
    assert run_child(forks, recipe, out, overrides) == 0
    assert_same(out, expected)


def test_kills_at_random_moments_change_nothing(forks, recipe, undisturbed, tmp_path):
    expected, out = undisturbed(HARD + MICRO), tmp_path / "run"
    overrides = (*HARD, *MICRO, "save.every=1")
    times = random.Random(0)
    killed = 0
    for _ in range(4):
        child = forks.Process(target=in_child, args=(recipe, out, overrides, "", 0))
        child.start()
        # Some time after its second row: in a rollout, an update, a checkpoint, an evaluation.
        seen = [trained_rows(out)]
        while child.exitcode is None and seen[-1] < min(seen) + 2:
            time.sleep(0.01)
            seen.append(trained_rows(out))
        time.sleep(times.uniform(0, 0.3))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
    assert killed >= 2
    if not (out / "policy").exists():
        assert run_child(forks, recipe, out, overrides) == 0
    assert_same(out, expected)


def trained_rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


# --- damage --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "optimizer.pt"),
    "a truncated file": lambda folder: os.truncate(folder / "adapter_model.safetensors", 500),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.fixture(scope="module")
def stopped(recipe, undisturbed, tmp_path_factory) -> Path:
    """A run killed after its step 4: checkpoints of steps 2 and 4, rows up to 5."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(undisturbed(("save.keep_last=3",)), out)
    shutil.rmtree(out / "policy")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:20])  # the first: devices
    return out


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(stopped, undisturbed, tmp_path, capfd, what):
    out = shutil.copytree(stopped, tmp_path / "run")
    DAMAGE[what](out / "checkpoints" / "step-000004")
    capfd.readouterr()
    assert main(["resume", str(out)]) == 0
    text = capfd.readouterr().err
    assert f"passed over {out / 'checkpoints' / 'step-000004'}: " in text
    assert f"resuming from {out / 'checkpoints' / 'step-000002'}" in text
    assert_same(out, undisturbed(("save.keep_last=3",)))


def test_a_run_whose_checkpoints_are_all_damaged_says_so(stopped, tmp_path, capfd):
    out = shutil.copytree(stopped, tmp_path / "run")
    for step in ("step-000002", "step-000004"):
        flip(out / "checkpoints" / step / "optimizer.pt")
    before = (out / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert main(["resume", str(out)]) == 1
    text = capfd.readouterr().err
    assert "no usable checkpoint" in text
    assert text.count("optimizer.pt is damaged") == 2
    assert "Traceback" not in text
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_without_any_checkpoint_starts_again(stopped, undisturbed, tmp_path, capfd):
    out = shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    assert main(["resume", str(out)]) == 0
    assert "there is no checkpoint yet" in capfd.readouterr().err
    assert_same(out, undisturbed(("save.keep_last=3",)))


def test_a_run_killed_after_its_last_checkpoint_only_writes_its_policy(
    undisturbed, tmp_path, capfd
):
    expected = undisturbed(LORA)
    out = shutil.copytree(expected, tmp_path / "run")
    (out / "policy").rename(out / ".policy.tmp-1")
    assert main(["resume", str(out)]) == 0
    assert_same(out, expected)
    assert not (out / ".policy.tmp-1").exists()


def test_a_folder_in_use_is_left_alone(recipe, stopped, tmp_path, capfd):
    out = shutil.copytree(stopped, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    with folder_lock(out):
        assert main(["resume", str(out)]) == 2
    text = capfd.readouterr().err
    assert f"another process is writing into {out}" in text
    assert "Traceback" not in text
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_a_run_on_a_full_disk_says_so(recipe, tmp_path, capfd):
    """A real one: room for the start of a run, not for a checkpoint."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        assert start(recipe, small / "run", FULL) == 1
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    text = capfd.readouterr().err
    assert "the disk is full while writing" in text
    assert "Traceback" not in text


def test_a_finished_run_is_not_resumed(undisturbed, capfd):
    out = undisturbed(LORA)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capfd.readouterr()
    assert main(["resume", str(out)]) == 1
    text = capfd.readouterr().err
    assert "is finished" in text
    assert "Traceback" not in text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_checkpoints_name_every_file_they_hold(undisturbed):
    folder = undisturbed(LORA) / "checkpoints" / "step-000006"
    manifest = json.loads((folder / "manifest.json").read_text())
    held = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert manifest["step"] == 6
    assert set(manifest["sha256"]) == held - {"manifest.json"}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= held
