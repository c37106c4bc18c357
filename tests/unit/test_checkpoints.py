"""Checkpoints appear whole, damage is seen, and old ones are dropped."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RunError
from rl.checkpoints import MANIFEST, checkpoint_name, newest_valid, publish, step_of

_remove = shutil.rmtree
FILES = {"model.safetensors": b"weights " * 50, "rng.pth": b"r", "deep/state.json": b'{"a": 1}'}


def write(checkpoints: Path, step: int, keep_last: int = 2) -> Path:
    staged = checkpoints / ".staging" / f"checkpoint-{step}"
    _remove(staged, ignore_errors=True)  # as the trainer does
    for name, data in FILES.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(data + str(step).encode())
    folder = publish(staged, checkpoints, step, keep_last)
    assert not staged.exists()  # moved in one rename: a copy could be seen half done
    return folder


def names(checkpoints: Path) -> list[str]:
    return sorted(p.name for p in checkpoints.iterdir() if not p.name.startswith("."))


def test_the_newest_checkpoint_is_found_and_old_ones_are_dropped(tmp_path):
    for step in (2, 4, 6, 10):
        write(tmp_path, step)
    assert names(tmp_path) == ["step-000006", "step-000010"]
    folder, passed_over = newest_valid(tmp_path)
    assert (folder.name, step_of(folder), passed_over) == ("step-000010", 10, [])
    assert (folder / "deep/state.json").read_bytes() == b'{"a": 1}10'


def test_a_run_longer_than_six_digits_keeps_its_order(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        write(tmp_path, step)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert step_of(newest_valid(tmp_path)[0]) == 1_000_000


def test_a_checkpoint_s_name_is_flushed_too(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), real(fd)))
    folder = write(tmp_path, 2)
    assert folder.parent.stat().st_ino == flushed[-1]


def test_no_checkpoint_at_all_is_not_an_error(tmp_path):
    assert newest_valid(tmp_path / "checkpoints") == (None, [])
    (tmp_path / ".staging" / "checkpoint-3").mkdir(parents=True)  # left by a kill
    assert newest_valid(tmp_path) == (None, [])


def flip(path: Path, place: int = 7) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda f: flip(f / "model.safetensors"), "model.safetensors is damaged"),
    "a truncated file": (lambda f: os.truncate(f / "rng.pth", 1), "rng.pth is damaged"),
    "a missing file": (lambda f: (f / "deep/state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest is missing"),
    "half a manifest": (lambda f: os.truncate(f / MANIFEST, 40), "manifest cannot be read"),
    "another manifest": (lambda f: (f / MANIFEST).write_text("[]"), "manifest cannot be read"),
    "a manifest of nothing": (
        lambda f: (f / MANIFEST).write_text('{"sha256": 3}'),
        "manifest cannot be read",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(what, tmp_path):
    damage, reason = DAMAGE[what]
    write(tmp_path, 2)
    damage(write(tmp_path, 4))
    folder, [line] = newest_valid(tmp_path)
    assert folder.name == "step-000002"
    assert "step-000004" in line
    assert reason in line
    damage(folder)
    with pytest.raises(RunError, match="no usable checkpoint") as error:
        newest_valid(tmp_path)
    assert "step-000004" in str(error.value)
    assert "step-000002" in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*FILES, MANIFEST]), st.integers(0, 10_000), st.integers(0, 7))
def test_any_flipped_bit_of_any_file_is_seen(name, place, bit):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), 2) / name
        data = bytearray(path.read_bytes())
        place %= len(data)
        if name == MANIFEST and place < data.index(b'"sha256"'):
            place = data.index(b'"sha256"')  # before it stands the step, which nobody reads
        text = bytes(data)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        same = name == MANIFEST and _sums(data) == _sums(text)  # white space
        if same:
            assert newest_valid(Path(folder))[0] is not None
        else:
            with pytest.raises(RunError):
                newest_valid(Path(folder))


def _sums(manifest: bytes) -> object:
    try:
        return json.loads(manifest).get("sha256")
    except (ValueError, AttributeError):
        return None


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 2)
    flip(write(tmp_path, 4) / "rng.pth")
    write(tmp_path, 4)
    folder, passed_over = newest_valid(tmp_path)
    assert (folder.name, passed_over) == ("step-000004", [])


@pytest.mark.parametrize("call", ["fsync", "replace", "rmtree"])
@pytest.mark.parametrize("after", [False, True])
def test_a_stop_at_any_moment_of_publishing_leaves_a_whole_checkpoint(
    call, after, tmp_path, monkeypatch
):
    """Every system call that matters stops the process once, before or after it was done."""
    for step in (2, 4):
        write(tmp_path, step)
    module = shutil if call == "rmtree" else os
    original, stops = getattr(module, call), 0
    for stop_at in range(1, 30):
        calls = 0

        def stopping(*args, stop_at=stop_at, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at and not after:
                raise KeyboardInterrupt
            original(*args, **kwargs)
            if calls == stop_at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, call, stopping)
            try:
                write(tmp_path, 6)
            except KeyboardInterrupt:
                stops += 1
            else:
                break
        folder, passed_over = newest_valid(tmp_path)
        assert step_of(folder) >= 4
        assert passed_over == []
    assert stops
    assert names(tmp_path) == ["step-000004", "step-000006"]


def test_names_and_steps_are_each_other_s_inverse():
    assert [step_of(Path(checkpoint_name(step))) for step in (0, 7, 123456789)] == [0, 7, 123456789]
