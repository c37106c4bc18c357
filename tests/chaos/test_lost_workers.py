"""Runs whose rollout workers are killed end with the numbers of a run that nothing happened to."""

import contextlib
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_policy import write_recipe

from cli.main import main
from common.journal import read_journal
from policy import Policy

WORKERS = ("rollout.workers=2", "rollout.prompts_per_step=4", "train.steps=6")


@pytest.fixture(scope="module")
def recipe(policy_folder, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), policy_folder)


def run(recipe: Path, out: Path, *overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    assert main(["train", str(recipe), *overrides, "--out", str(out)]) == 0
    rows = [
        {key: value for key, value in row.items() if key not in ("seconds", "stages")}
        for row in read_journal(out / "metrics.jsonl")
        if "event" not in row
    ]
    return rows, Policy.from_pretrained(out / "policy").ar.state_dict()


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    return run(recipe, tmp_path_factory.mktemp("undisturbed") / "run", *WORKERS)


def rollout_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if process.name().startswith("ray::_Worker"):
                found.append(process)
    return found


class Killer(threading.Thread):
    """Kills a random worker `kills` times, each time after the run has gone on by a step."""

    def __init__(self, metrics: Path, kills: int) -> None:
        super().__init__(daemon=True)
        self.metrics, self.kills, self.killed = metrics, kills, 0
        self.over = threading.Event()

    def run(self) -> None:
        rng, seen = random.Random(0), 0
        while self.killed < self.kills and not self.over.is_set():
            time.sleep(rng.random() * 0.2)
            steps = sum("event" not in row for row in read_journal(self.metrics))
            workers = rollout_workers()
            if steps > seen and workers:
                seen = steps
                rng.choice(workers).kill()
                self.killed += 1


def test_kills_at_random_change_no_number(recipe, undisturbed, tmp_path):
    expected_rows, expected = undisturbed
    killer = Killer(tmp_path / "killed" / "metrics.jsonl", kills=2)
    killer.start()
    rows, weights = run(recipe, tmp_path / "killed", *WORKERS)
    killer.over.set()
    killer.join()
    assert killer.killed == 2
    journal = read_journal(tmp_path / "killed" / "metrics.jsonl")
    losses = [row for row in journal if row.get("event") == "worker_replaced"]
    assert len(losses) == 2
    assert all(loss["worker"] in (0, 1) and loss["reason"] for loss in losses)
    steps = [loss["step"] for loss in losses]
    assert steps == sorted(steps)  # two kills may be met in one step
    assert rows == expected_rows
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert rollout_workers() == []  # the run took its cluster down


def test_workers_and_one_process_learn_the_same(recipe, undisturbed, tmp_path):
    pooled, _ = undisturbed
    alone, _ = run(recipe, tmp_path / "alone", *WORKERS, "rollout.workers=0", "train.steps=3")
    # Half a batch is summed in another order than a whole one. At this learning rate the last bits
    # move a token after some steps, so the first ones are compared.
    for one, other in zip(pooled[:3], alone, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
