"""Which GPU a process takes. Without GPUs here, their number is set by hand."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from common.errors import RunError
from common.journal import Journal, read_journal
from common.progress import SilentProgress
from recipes import load_recipe
from rl.devices import note_devices, repeatable_sums, training_device, use_one_gpu


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs; return which one was made current."""
    current: list[str] = []

    def pretend(count: int, process: int) -> list[str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setenv("LOCAL_RANK", str(process))
        return current

    return pretend


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_each_process_takes_its_own_gpu_before_anything_is_loaded(wanted, gpus):
    current = gpus(4, process=3)
    assert training_device(wanted) == "cuda:3"
    assert current == ["cuda:3"]


def test_a_process_without_a_gpu_is_refused(gpus):
    gpus(2, process=2)
    with pytest.raises(RunError, match="process 2 of this machine has no GPU: 2 are visible"):
        training_device("auto")
    assert training_device("cpu") == "cpu"


def test_without_gpus_auto_is_the_cpu(gpus):
    gpus(0, process=1)
    assert training_device("auto") == "cpu"
    with pytest.raises(RunError, match="0 are visible"):
        training_device("cuda")


def test_one_process_uses_one_of_several_gpus_and_says_how_to_use_all(tmp_path):
    told: list[str] = []

    class Told(SilentProgress):
        def line(self, text: str) -> None:
            told.append(text)

    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    arguments._n_gpu = 8
    use_one_gpu(arguments, Told())
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    [line] = told
    assert "one of 8 GPUs" in line
    assert "torchrun --nproc_per_node 8" in line
    use_one_gpu(arguments, Told())
    assert len(told) == 1


def test_a_run_notes_its_devices_once_and_again_when_they_change(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    recipe = load_recipe("geneval-scenes").recipe
    for step in (0, 4):  # a resumed run on the same machine
        note_devices(journal, recipe, torch.device("cpu"), step)
    more = load_recipe("geneval-scenes", ["rollout.workers=3"]).recipe
    note_devices(journal, more, torch.device("cpu"), 4)
    rows = read_journal(journal.path)
    assert [(row["step"], row["kind"], row["count"]) for row in rows] == [
        (0, "CPU", 1),
        (4, "CPU", 4),
    ]
    assert all(row["event"] == "devices" and row["device"] for row in rows)


def test_gpus_of_all_workers_count_beside_a_trainer_on_the_cpu(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    settings = ["rollout.workers=3", "rollout.ray.gpus_per_worker=1"]
    settings += ["decode.workers=2", "decode.ray.gpus_per_worker=0.5", "rewards.workers=4"]
    settings += ["rewards.ray.gpus_per_worker=0.25"]
    recipe = load_recipe("geneval-scenes", settings).recipe
    note_devices(journal, recipe, torch.device("cpu"), 0)
    [row] = read_journal(journal.path)
    assert (row["kind"], row["count"]) == ("GPU", 3 + 1 + 1)


def test_sums_are_as_they_were_after_a_run_and_on_a_gpu():
    with repeatable_sums(torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled()
    with repeatable_sums(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
