"""A trainer and two rollout workers, each on a host of its own: the numbers are those of one."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from separate_hosts import Host, Network, network
from tiny_policy import write_recipe

from cli.main import main
from common.journal import read_journal
from policy import Policy

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
WORKERS = ("rollout.workers=2", "train.steps=14")  # so many, to be cut off before the last
# Ray asks for 65 s before it gives up a machine that does not answer.
IMPATIENT = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_worker_niceness": "0",  # beside two busy processes workers would take minutes to start
}


@pytest.fixture
def environment() -> dict[str, str]:
    """Of all that runs there: Ray's secret and as many threads as here, for equal last bits."""
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return os.environ | IMPATIENT | secret | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.fixture
def cluster(environment) -> Iterator[Network]:
    """Three hosts with a Ray node each: the trainer's with the head, and the workers'."""
    # Not pytest's folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder, network(3) as hosts:
        common = ("--disable-usage-stats", "--include-log-monitor=false")
        head = ("--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
        address = f"--address={hosts.hosts[0].address}:{PORT}"
        other = (address, "--num-cpus=1", "--resources", json.dumps({"there": 1}))
        # One after the other: Ray gives a node 30 s to start.
        for host, role in zip(hosts.hosts, (head, other, other), strict=True):
            own = f"--temp-dir={folder}/{host.name}"
            command = host.command(RAY, "start", *role, *common, own)
            subprocess.run(command, env=environment, check=True)
        yield hosts


def steps(out: Path) -> list[dict]:
    with contextlib.suppress(FileNotFoundError):
        return [row for row in read_journal(out / "metrics.jsonl") if "event" not in row]
    return []


def numbers(out: Path) -> list[dict]:
    timings = ("seconds", "stages", "workers")
    return [{key: row[key] for key in row if key not in timings} for row in steps(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return Policy.from_pretrained(out / "policy").ar.state_dict()


def samplers(host: Host) -> int:
    """How many rollout workers run on a host."""
    names = []
    for process in host.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            names.append(process.name())
    return sum(name.startswith("ray::Sampling") for name in names)


def busy(row: dict) -> set[str]:
    return {worker for worker, *_ in row["workers"]}


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen processes import torch or Ray
def test_hosts_and_the_loss_of_one_change_no_number(policy_folder, cluster, environment, tmp_path):
    recipe = str(write_recipe(tmp_path / "recipe", policy_folder))
    one, three = tmp_path / "one", tmp_path / "three"
    assert main(["train", recipe, *WORKERS, "--out", str(one)]) == 0

    trainer = cluster.hosts[0]
    placed = (f"rollout.ray.address={trainer.address}:{PORT}", "rollout.ray.resource=there")
    command = ("-m", "cli", "train", recipe, *WORKERS, *placed, "--out", str(three))
    training = subprocess.Popen(
        trainer.command(sys.executable, *command), cwd=ROOT, env=environment
    )
    while len(steps(three)) < 2:
        assert training.poll() is None, "the run ended before its second step: see above"
        time.sleep(0.05)
    assert [samplers(host) for host in cluster.hosts] == [0, 1, 1]
    cluster.cut_off(1)
    assert training.wait() == 0

    assert numbers(three) == numbers(one)
    for name, tensor in weights(one).items():
        assert torch.equal(weights(three)[name], tensor), name
    assert [busy(row) for row in steps(three)[:2]] == [{"rollout 0", "rollout 1"}] * 2
    assert len(busy(steps(three)[-1])) == 1
    events = [row for row in read_journal(three / "metrics.jsonl") if "event" in row]
    assert [e["section"] for e in events if e["event"] == "worker_replaced"] == ["rollout"]
