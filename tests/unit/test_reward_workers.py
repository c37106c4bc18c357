"""Rewards in processes of their own, the cache, and the reward that is down."""

import json
import math
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from common.errors import RewardError
from rewards import Score, load_reward, reward
from rewards.cache import ScoreCache, reward_identity, score_key
from rewards.contract import RewardFunction, Traits
from rewards.hosting import CLOSED, Call
from rewards.outcomes import Patience
from rewards.runner import RewardRunner, RewardSpec
from rewards.workers import WorkerHost

FILE = '''
import os, pathlib, signal, sys, time
import numpy as np
from rewards import Score

def odd(images, prompts, target=0, note=None):
    """The red of the first pixel; some prompts ask for trouble."""
    scores = []
    for image, prompt in zip(images, prompts):
        if prompt == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if prompt == "exit":
            os._exit(7)
        if prompt == "sys.exit":
            sys.exit(3)
        if prompt == "hang":
            time.sleep(60)
        if prompt == "raise":
            raise KeyError("gone")
        value = float("nan") if prompt == "nan" else np.float32(image.getpixel((0, 0))[0])
        scores.append(Score(value, "as asked", {"pid": os.getpid(), "note": note and note[0]}))
    return scores

async def later(images):
    return [1.0] * len(images)

def threads(images):
    return [float(os.environ["OMP_NUM_THREADS"])] * len(images)

def hangs_on_red(images):
    if any(image.getpixel((0, 0))[0] == 3 for image in images):
        time.sleep(60)
    return [1.0] * len(images)

def sizes(images):
    time.sleep(0.05)
    return [float(len(images))] * len(images)

def together(images, prompts):
    """1.0 once three processes were in their calls at once."""
    (pathlib.Path(prompts[0]) / str(os.getpid())).touch()
    for _ in range(6000):
        if len(os.listdir(prompts[0])) >= 3:
            return [1.0] * len(images)
        time.sleep(0.01)
    return [0.0] * len(images)
'''
STUCK = """
import pathlib, time

def stuck(images, prompts):
    pathlib.Path(prompts[0]).touch()
    while pathlib.Path(prompts[0]).exists():
        time.sleep(0.01)
"""
TROUBLE = {
    "crash": "ended with code -11",
    "exit": "ended with code 7",
    "sys.exit": "sys.exit(3)",
    "hang": "within 2 s",
    "raise": "KeyError: 'gone' (odd.py:19)",
    "nan": "nan",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "odd.py"
    path.write_text(FILE)
    return path


def pictures(count):
    return [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)]


def parts(scored, name):
    return [s.parts[name] for s in scored]


# --- processes ------------------------------------------------------------------------------------


def test_crash_hang_and_the_rest_cost_only_their_own_picture(file):
    prompts = ["fine", *TROUBLE, "fine"]
    spec = RewardSpec(f"{file}:odd", timeout_s=2, workers=1)
    with RewardRunner([spec], batch_size=3) as runner:
        scored = runner.score(pictures(8), prompts, {"note": list("abcdefgh")})
        assert parts(scored, "odd") == [0, *[None] * 6, 7]
        for prompt, one in zip(prompts[1:-1], scored[1:-1], strict=True):
            assert TROUBLE[prompt] in one.reasons["odd"], prompt
        details = scored[-1].details["odd"]
        assert details["note"] in "gh"  # of its own call, alone or in its batch
        assert details["pid"] != os.getpid()
    assert not multiprocessing.active_children()  # the one that hung was killed


def test_several_processes_work_side_by_side_one_thread_each_and_async_is_awaited(file, tmp_path):
    specs = [
        RewardSpec(f"{file}:together", workers=3, timeout_s=90),
        RewardSpec(f"{file}:later", workers=1),
        RewardSpec(f"{file}:threads", workers=1),
    ]
    with RewardRunner(specs, batch_size=1) as runner:
        scored = runner.score(pictures(6), [str(tmp_path)] * 6)
    assert parts(scored, "together") == [1.0] * 6
    assert parts(scored, "later") == [1.0] * 6
    assert parts(scored, "threads") == [1.0] * 6


def test_a_reward_that_loads_in_this_process_alone_says_so(tmp_path):
    path = tmp_path / "here.py"
    path.write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    raise OSError('no GPU left')\n"
        "def f(images): return [1.0] * len(images)\n"
    )
    with RewardRunner([RewardSpec(f"{path}:f", workers=1)]) as runner:
        [one] = runner.score(pictures(1), [""])
    assert "no GPU left" in one.reasons["f"]


def test_a_function_of_the_running_script_is_refused():
    def mine(images):
        return []

    mine.__module__ = "__main__"
    reward(name="w_mine")(mine)
    with pytest.raises(RewardError, match="worker process cannot import"):
        RewardRunner([RewardSpec("w_mine", workers=1)])


def test_arguments_that_cannot_be_sent_are_refused_at_once(file):
    with pytest.raises(RewardError, match=r"`odd`.*cannot be sent to a worker process"):
        RewardRunner([RewardSpec(f"{file}:odd", args={"target": lambda: 0}, workers=1)])


def test_interrupting_the_run_leaves_its_processes_alone(file):
    with RewardRunner([RewardSpec(f"{file}:odd", workers=1)]) as runner:
        pid = runner.score(pictures(1), [""])[0].details["odd"]["pid"]
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        again = runner.score(pictures(1), [""])[0]
        assert again.details["odd"]["pid"] == pid


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_does_not_wait_for_a_reward_that_hangs(tmp_path, workers):
    (tmp_path / "stuck.py").write_text(STUCK)
    spec = RewardSpec(f"{tmp_path}/stuck.py:stuck", timeout_s=60, workers=workers)
    runner = RewardRunner([spec])

    def interrupt():
        while not (tmp_path / "called").exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        runner.score(pictures(8), [str(tmp_path / "called")] * 8)
    started = time.perf_counter()
    runner.close()
    assert time.perf_counter() - started < 5
    (tmp_path / "called").unlink()  # lets the thread end


def test_closing_ends_a_process_that_is_just_being_started(file):
    """`close` may come between the start and the moment from which there is something to kill."""
    use = f"{file}:odd"
    host = WorkerHost(load_reward(use), use, 30.0, 1)
    host._workers[0].kill()  # as in `close`, before there is a process
    call = Call(pictures(1), ["hang"], {})
    started = time.perf_counter()
    assert host.run([call], Patience(2)) == [CLOSED]
    assert time.perf_counter() - started < 10
    host.close()
    assert not multiprocessing.active_children()


def test_one_picture_on_which_a_reward_hangs_costs_only_its_own_score(file):
    with RewardRunner([RewardSpec(f"{file}:hangs_on_red", timeout_s=1, workers=1)]) as runner:
        scored = runner.score(pictures(6), [""] * 6)
    assert parts(scored, "hangs_on_red") == [1, 1, 1, None, 1, 1]


@pytest.mark.parametrize(
    ("count", "workers", "sizes"),
    [(8, 3, [3, 3, 2]), (40, 0, [20, 20]), (70, 2, [18, 18, 18, 16])],
)
def test_few_pictures_are_shared_by_all_processes(file, count, workers, sizes):
    with RewardRunner([RewardSpec(f"{file}:sizes", workers=workers)]) as runner:
        scored = runner.score(pictures(count), [""] * count)
    assert parts(scored, "sizes") == [float(size) for size in sizes for _ in range(size)]


# --- a reward that is down ------------------------------------------------------------------------


def test_a_reward_that_is_down_is_only_probed_until_it_is_back():
    calls, down = [], [True]

    @reward(name="w_judge")
    def judge(images):
        calls.append(len(images))
        if down[0]:
            raise ConnectionError("nobody there")
        return [0.5] * len(images)

    with RewardRunner([RewardSpec("w_judge")], batch_size=8) as runner:
        for _ in range(3):
            runner.score(pictures(8), [""] * 8)
        assert calls == [8, *[1] * 8] * 3
        calls.clear()
        scored = runner.score(pictures(8), [""] * 8)
        assert calls == [1, 1, 1]
        assert parts(scored, "w_judge") == [None] * 8
        assert "only tried on 3 pictures" in scored[7].reasons["w_judge"]
        assert "nobody there" in scored[7].reasons["w_judge"]
        calls.clear()
        down[0] = False
        assert parts(runner.score(pictures(8), [""] * 8), "w_judge") == [0.5] * 8
        assert calls == [1, 1, 1, 5]
        calls.clear()
        runner.score(pictures(8), [""] * 8)
        assert calls == [8]


@pytest.mark.parametrize("failure", [None, math.nan, "no score"])
def test_a_reward_whose_every_picture_has_no_score_is_down_too(failure):
    """A judge whose server is gone returns None for each picture; it raises nothing."""
    calls, down = [], [True]

    @reward(name="w_nones")
    def nones(images):
        calls.append([image.getpixel((0, 0))[0] for image in images])
        return [failure if down[0] else 0.5] * len(images)

    with RewardRunner([RewardSpec("w_nones")], batch_size=12) as runner:
        for _ in range(3):
            assert parts(runner.score(pictures(12), [""] * 12), "w_nones") == [None] * 12
        assert [len(call) for call in calls] == [12] * 3
        calls.clear()
        for _ in range(2):
            scored = runner.score(pictures(12), [""] * 12)
            assert parts(scored, "w_nones") == [None] * 12
            assert any("only tried on 3 pictures" in one.reasons["w_nones"] for one in scored)
        assert [len(call) for call in calls] == [1] * 6
        assert calls[:3] != calls[3:]  # a picture may be why, so others are tried next
        down[0] = False
        assert parts(runner.score(pictures(12), [""] * 12), "w_nones") == [0.5] * 12


def test_bad_pictures_in_a_row_do_not_stop_a_reward():
    @reward(name="w_picky")
    def picky(images):
        if any(image.getpixel((0, 0))[0] < 30 for image in images):
            raise ValueError("too dark")
        return [1.0] * len(images)

    with RewardRunner([RewardSpec("w_picky")], batch_size=8) as runner:
        for _ in range(5):
            assert (
                parts(runner.score(pictures(40), [""] * 40), "w_picky") == [None] * 30 + [1.0] * 10
            )


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def counting():
    calls = []

    @reward(name="w_count")
    def count(images, prompts, tag=None, scale=1.0):
        calls.append(len(images))
        return [
            Score(None, "not this one") if p == "none" else Score(i.width * scale, p, {"t": p})
            for i, p in zip(images, prompts, strict=True)
        ]

    return calls


def test_equal_pictures_are_scored_once_and_remembered(counting):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "red", "blue", "red")]
    prompts = ["a", "a", "a", "b"]
    cache = ScoreCache()
    with RewardRunner([RewardSpec("w_count")], cache=cache) as runner:
        first = runner.score(images, prompts)
        assert counting == [3]
        again = runner.score(images[::-1], prompts[::-1])
        assert counting == [3]
        assert again == first[::-1]
        assert first[3].details == {"w_count": {"t": "b"}}


@pytest.mark.parametrize("change", ["size", "mode", "pixel", "prompt", "column", "args"])
def test_whatever_the_reward_sees_is_part_of_the_key(counting, change):
    cache = ScoreCache()
    image = Image.new("RGB", (8, 8))
    with RewardRunner([RewardSpec("w_count")], cache=cache) as runner:
        runner.score([image], ["a"], {"tag": [{"x": 1}], "unseen": [1]})
        runner.score([image], ["a"], {"tag": [{"x": 1}], "unseen": [2]})
        assert counting == [1]
    other = image.copy()
    other.putpixel((3, 3), (0, 0, 1))
    images = {"size": Image.new("RGB", (4, 16)), "mode": image.convert("RGBA"), "pixel": other}
    args = {"scale": 2.0} if change == "args" else {}
    with RewardRunner([RewardSpec("w_count", args=args)], cache=cache) as runner:
        runner.score(
            [images.get(change, image)],
            ["b" if change == "prompt" else "a"],
            {"tag": [{"x": 2 if change == "column" else 1}]},
        )
    assert counting == [1, 1]


def test_two_rewards_of_one_name_do_not_share_scores():
    @reward(name="w_same")
    def first(images):
        return [1.0] * len(images)

    one = load_reward("w_same")
    other = RewardFunction(lambda images: [2.0] * len(images), Traits("w_same"), {})
    assert reward_identity(one) != reward_identity(other)
    assert reward_identity(one) == reward_identity(load_reward("w_same"))


def test_failures_and_whole_batches_are_not_remembered(counting):
    with RewardRunner([RewardSpec("w_count")], cache=ScoreCache()) as runner:
        for _ in range(2):
            runner.score(pictures(1), ["none"])
    assert counting == [1, 1]
    calls = []

    @reward(name="w_whole", whole_batch=True)
    def whole(images):
        calls.append(len(images))
        return [1.0] * len(images)

    with RewardRunner([RewardSpec("w_whole")], cache=ScoreCache()) as runner:
        for _ in range(2):
            runner.score(pictures(1) * 3, [""] * 3)
    assert calls == [3, 3]


def test_a_cache_on_disk_lasts_and_notices_an_edit(tmp_path):
    path = tmp_path / "mine.py"

    def scores(code):
        path.write_text(
            f"def f(images):\n    open({str(log)!r}, 'a').write('x')\n    return {code}\n"
        )
        cache = ScoreCache(tmp_path / "cache.sqlite")
        with RewardRunner([RewardSpec(f"{path}:f")], cache=cache) as runner:
            result = parts(runner.score(pictures(1), [""]), "f")
        cache.close()
        return result

    log = tmp_path / "log"
    assert [scores("[1.0]"), scores("[1.0]"), scores("[2.0]")] == [[1.0], [1.0], [2.0]]
    assert log.read_text() == "xx"


def test_a_cache_that_is_something_else_is_refused(tmp_path):
    file = tmp_path / "scores.jsonl"
    file.write_text(json.dumps({"x": 1}) * 500)
    with pytest.raises(RewardError, match=r"scores\.jsonl is not a score cache"):
        ScoreCache(file)
    with pytest.raises(RewardError, match=r"is not a score cache.*name another file"):
        ScoreCache(tmp_path)
    with pytest.raises(RewardError, match="is not a score cache"):
        ScoreCache(file / "below.sqlite")


def test_a_cache_that_is_locked_costs_a_warning_and_no_score(counting, tmp_path, caplog):
    cache = ScoreCache(tmp_path / "cache.sqlite")
    cache._data.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(tmp_path / "cache.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with RewardRunner([RewardSpec("w_count")], cache=cache) as runner:
        for _ in range(2):
            assert runner.score(pictures(2), ["a", "b"])[1].total is not None
        assert [record.message for record in caplog.records if "locked" in record.message] == [
            "the score cache failed (database is locked); what it lacks is scored anew"
        ]
        other.close()
        runner.score(pictures(2), ["a", "b"])
        before = len(counting)
        runner.score(pictures(2), ["a", "b"])
        assert len(counting) == before
    cache.close()


def test_columns_that_cannot_be_sorted_are_scored_anew(counting):
    with RewardRunner([RewardSpec("w_count")], cache=ScoreCache()) as runner:
        columns = {"tag": [{1: "a", "b": "c"}, {(1, 2): 3}]}
        for _ in range(2):
            scored = runner.score(pictures(2), ["a", "b"], columns)
            assert [one.total is not None for one in scored] == [True, True]


def test_a_replaced_file_is_scored_again(tmp_path):
    source = tmp_path / "source.txt"

    @reward(name="w_file", paths=("source",))
    def file_length(images, source):
        return [len(Path(path).read_bytes()) for path in source]

    with RewardRunner([RewardSpec("w_file")], cache=ScoreCache()) as runner:
        for length in (3, 5):
            source.write_bytes(bytes(length))
            scored = runner.score(pictures(1), [""], {"source": [str(source)]})
            assert parts(scored, "w_file") == [length]


def test_a_file_counts_the_same_however_its_path_is_spelt(tmp_path):
    (tmp_path / "source.txt").write_bytes(b"same")
    spelt = [str(tmp_path / "source.txt"), f"{tmp_path}/./source.txt"]
    keys = {score_key("", "", "", {"source": x}, ("source",)) for x in spelt}
    assert len(keys) == 1


def test_a_replaced_file_among_the_arguments_is_scored_again(tmp_path):
    weights = tmp_path / "weights.bin"

    @reward(name="w_weights")
    def weigh(images, *, networks):
        return [len(Path(networks["own"]).read_bytes())] * len(images)

    cache = ScoreCache()
    spec = RewardSpec("w_weights", args={"networks": {"own": str(weights)}})
    for length in (3, 5):
        weights.write_bytes(bytes(length))
        with RewardRunner([spec], cache=cache) as runner:
            assert parts(runner.score(pictures(1), [""]), "w_weights") == [length]


def test_a_function_that_is_in_no_file_is_never_cached():
    cache = ScoreCache()
    for value in (1.0, 2.0):

        @reward(name="w_cell")
        def cell_score(images, value=value):
            return [value] * len(images)

        cell_score.__code__ = cell_score.__code__.replace(co_filename="<cell>")
        with RewardRunner([RewardSpec("w_cell")], cache=cache) as runner:
            assert parts(runner.score(pictures(1), [""]), "w_cell") == [value]


def test_scores_that_depend_on_what_is_elsewhere_are_not_kept():
    calls = []

    @reward(name="w_elsewhere", cacheable=False)
    def elsewhere(images):
        calls.append(len(images))
        return [1.0] * len(images)

    with RewardRunner([RewardSpec("w_elsewhere")], cache=ScoreCache()) as runner:
        for _ in range(2):
            runner.score(pictures(1), [""])
    assert calls == [1, 1]
    assert not load_reward("remote", servers=[]).cacheable
