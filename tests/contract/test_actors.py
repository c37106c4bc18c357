"""Losses of actors on a real cluster: what stops a run, and what the other actors make up for."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from common.errors import RunError
from rollout import actors
from rollout.actors import ActorPool
from rollout.cluster import Placement, check_room, ray_cluster

PLACE = Placement("rollout", 3, cpus=0.1, timeout_s=60)


class TwoArguments(Exception):
    """Cannot be unpickled, as many libraries' errors cannot."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


class Worker:
    """Does what files say: `die-PIECE` once, `always-PIECE`; when it starts `broken-N`, `slow`."""

    def __init__(self, folder: Path) -> None:
        while (folder / "slow").exists():
            time.sleep(0.1)
        for name in sorted(folder.glob("broken-*")):
            name.unlink()
            raise ValueError("no driver yet")
        self.folder = folder

    def work(self, piece: int) -> int:
        once = self.folder / f"die-{piece}"
        if once.exists() or (self.folder / f"always-{piece}").exists():
            once.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if piece == 99:
            (self.folder / "asleep").touch()
            time.sleep(3600)
        if piece == 98:
            raise OSError(28, "No space left on device", "pictures")
        if piece < 0:
            raise TwoArguments("below ", "zero")
        return piece


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ray_cluster(None, [PLACE]):
        yield


@pytest.fixture
def pool(tmp_path, monkeypatch) -> Iterator[ActorPool]:
    monkeypatch.setattr(actors, "MAX_LOSSES", 1)
    pool = ActorPool(Worker, (tmp_path,), PLACE)
    pool.await_ready()
    yield pool
    pool.close()


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_several_pieces_may_each_lose_a_worker(pool, tmp_path):
    touch(tmp_path, "die-0", "die-1")
    assert pool.run("work", [(0,), (1,), (2,)]) == [0, 1, 2]
    assert pool.replaced == 2


def test_a_piece_that_loses_one_worker_after_the_other_stops_the_run(pool, tmp_path):
    touch(tmp_path, "always-1")
    with pytest.raises(RunError, match=r"more than 1 rollout workers were lost in the same `work`"):
        pool.run("work", [(0,), (1,), (2,)])


def test_workers_that_died_idle_are_not_held_against_the_next_piece(pool):
    for handle in pool.handles[:2]:
        ray.kill(handle)
    assert pool.run("work", [(0,)]) == [0]


def test_a_replacement_that_cannot_start_is_a_loss_and_the_rest_do_the_work(pool, tmp_path):
    touch(tmp_path, "die-0", *(f"broken-{i}" for i in range(9)))
    assert pool.run("work", [(0,), (1,)]) == [0, 1]
    while pool._starting:
        pool._join(ray.wait(list(pool._starting))[0][0])
    assert [event["event"] for event in pool._events] == [
        "worker_replaced", "worker_replaced", "worker_given_up",
    ]  # fmt: skip
    assert "no driver yet" not in pool._events[0]["reason"]
    assert pool.run("work", [(0,), (1,), (2,)]) == [0, 1, 2]


def test_what_a_worker_refuses_is_told_with_its_number(pool):
    with pytest.raises(TypeError, match=r"^rollout worker 0: .* not supported between .*'str'"):
        pool.run("work", [("text",)])
    assert pool.replaced == 0


def test_a_fault_whose_text_is_made_of_several_arguments_keeps_them(pool):
    with pytest.raises(OSError, match="No space left") as caught:
        pool.run("work", [(98,)])
    assert caught.value.errno == 28
    assert caught.value.__notes__ == ["in rollout worker 0"]
    assert pool.run("work", [(0,), (1,), (2,)]) == [0, 1, 2]


def test_answers_tell_whose_they_are(pool):
    assert pool.answers("work", [(5,), (6,)]) == [(0, 5), (1, 6)]
    assert pool.on_all("work", 7) == {0: 7, 1: 7, 2: 7}
    ray.kill(pool.handles[1])
    with contextlib.suppress(ray.exceptions.RayActorError):
        while True:  # it may still answer
            ray.get(pool.handles[1].work.remote(0))
    assert pool.on_all("work", 8) == {0: 8, 2: 8}


def test_a_closed_pool_waits_for_nobody_who_was_asked(pool):
    pool._ask_idle()
    pool.close()
    with pytest.raises(RunError, match="were closed"):
        pool.run("work", [(0,)])


def test_an_error_that_cannot_be_unpickled_is_told_and_loses_no_worker(pool):
    with pytest.raises(RunError, match=r"^rollout worker \d failed[\s\S]*TwoArguments: below zero"):
        pool.run("work", [(-1,)])
    assert pool.replaced == 0
    assert pool.run("work", [(4,)]) == [4]


def test_a_pool_that_is_closed_gives_up_what_is_running(pool, tmp_path):
    with ThreadPoolExecutor() as thread:
        running = thread.submit(pool.run, "work", [(99,)])
        while not (tmp_path / "asleep").exists():
            assert not running.done()
            time.sleep(0.01)
        pool.close()
        with pytest.raises(RunError, match="closed"):
            running.result(timeout=20)
    assert pool.handles == []
    assert pool.replaced == 0


def test_a_pool_that_is_closed_gives_up_waiting_for_workers_that_start(pool, tmp_path):
    touch(tmp_path, "slow", "die-0", "die-1", "die-2")
    with ThreadPoolExecutor() as thread:
        running = thread.submit(pool.run, "work", [(0,), (1,), (2,)])
        while pool.replaced < 3:
            assert not running.done()
            time.sleep(0.01)
        pool.close()
        with pytest.raises(RunError, match="closed"):
            running.result(timeout=20)
    with pytest.raises(RunError, match="closed"):
        pool.run("work", [(0,)])


JOIN = """
import sys
from common.errors import RunError
from rollout.cluster import Placement, ray_cluster
try:
    with ray_cluster(sys.argv[1], [Placement("rollout", 1, cpus=0.1)]):
        print("joined")
except RunError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("secret", "told"),
    [
        ({"RAY_AUTH_MODE": "token"}, "joined"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for its token"),
        ({"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}, "asks for its token"),
    ],
)
def test_a_cluster_s_token_is_told_from_a_cluster_that_is_not_there(secret, told, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", JOIN, ray.get_runtime_context().gcs_address],
        env=os.environ | {"RAY_gcs_server_port_wait_time_s": "1"} | secret,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told in result.stdout
    if told != "joined":
        assert "Fix: copy ~/.ray/auth_token" in result.stdout


@pytest.mark.parametrize("auto", [False, True])
def test_an_address_where_nothing_answers_is_refused_at_once(auto, monkeypatch):
    ray.shutdown()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        if auto:  # as after a head that was killed: Ray still knows its address
            monkeypatch.setenv("RAY_ADDRESS", address)
            address = "auto"
        began = time.perf_counter()
        with (
            pytest.raises(RunError, match=rf"rollout\.ray\.address: .*{address} .*refused"),
            ray_cluster(address, [PLACE]),
        ):
            pass
        assert time.perf_counter() - began < 5


@pytest.mark.parametrize("address", ["nonsense", "host:port", ":6379"])
def test_what_is_no_address_is_refused_by_its_key(address):
    ray.shutdown()
    with (
        pytest.raises(RunError, match=rf"rollout\.ray\.address[\s\S]*{address}[\s\S]*Fix"),
        ray_cluster(address, [PLACE]),
    ):
        pass


def test_workers_that_fit_exactly_have_room(monkeypatch):
    """3 x 0.1 is 0.30000000000000004 in floating point."""
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.3})
    check_room([Placement("rollout", 3, cpus=0.1)])
    with pytest.raises(RunError, match=r"0\.4 CPU"):
        check_room([Placement("rollout", 4, cpus=0.1)])
