"""Rewards that hang, wait or block: what they cost, and that they cost no other reward's score."""

import asyncio
import gc
import threading
import time

import pytest
from PIL import Image

from rewards import reward
from rewards.runner import RewardRunner, RewardSpec


def grey(level):
    return Image.new("RGB", (8, 8), (level, level, level))


def level(image):
    return image.getpixel((0, 0))[0]


PICTURES = [grey(i) for i in range(6)]
PROMPTS = [f"prompt {i}" for i in range(6)]


@reward(name="t_steady")
def t_steady(images):
    return [float(level(image)) for image in images]


def run(*specs, images=PICTURES, batch_size=32):
    with RewardRunner(specs, batch_size) as runner:
        return runner.score(images, [""] * len(images))


def parts(scored, name):
    return [s.parts[name] for s in scored]


@pytest.fixture
def release():
    """Lets hanging rewards end when the test does."""
    event = threading.Event()
    yield event
    event.set()


def test_a_picture_that_hangs_costs_only_its_own_score(release):
    @reward(name="t_hangs")
    def hangs(images):
        if any(level(x) == 2 for x in images):
            release.wait(30)
        return [0.5] * len(images)

    start = time.perf_counter()
    scored = run(RewardSpec("t_hangs", timeout_s=0.5), RewardSpec("t_steady"))
    assert time.perf_counter() - start < 20
    assert parts(scored, "t_hangs") == [0.5, 0.5, None, 0.5, 0.5, 0.5]
    assert "0.5 s" in scored[2].reasons["t_hangs"]
    assert parts(scored, "t_steady") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("hanging", [range(12), range(3, 40, 4)], ids=["in a row", "everywhere"])
def test_pictures_that_hang_cost_only_their_own_scores_however_many(release, hanging):
    @reward(name="t_hangs_often")
    def hangs_often(images):
        if any(level(x) in hanging for x in images):
            release.wait(30)
        return [0.5] * len(images)

    pictures = [grey(i) for i in range(40)]
    scored = run(RewardSpec("t_hangs_often", timeout_s=0.3), images=pictures, batch_size=8)
    expected = [None if i in hanging else 0.5 for i in range(40)]
    assert parts(scored, "t_hangs_often") == expected


def test_a_coroutine_that_blocks_its_thread_takes_no_others_along(release):
    @reward(name="t_blocks_on_one")
    async def blocks_on_one(images):
        await asyncio.sleep(0.01)
        if any(level(x) == 2 for x in images):
            release.wait(30)
        await asyncio.sleep(0.01)
        return [0.5] * len(images)

    scored = run(RewardSpec("t_blocks_on_one", timeout_s=0.5))
    assert parts(scored, "t_blocks_on_one") == [0.5, 0.5, None, 0.5, 0.5, 0.5]


def test_a_reward_that_always_hangs_is_given_up_and_taken_back_when_its_calls_return(
    release, monkeypatch
):
    monkeypatch.setattr("rewards.hosting._MAX_LEFT_BEHIND", 12)
    calls = []

    @reward(name="t_stuck")
    def stuck(images):
        calls.append(len(images))
        release.wait(30)
        return [0.5] * len(images)

    many = [grey(i) for i in range(40)]
    with RewardRunner([RewardSpec("t_stuck", timeout_s=0.2)], batch_size=4) as runner:
        start = time.perf_counter()
        scored = runner.score(many, [""] * 40)
        assert parts(scored, "t_stuck") == [None] * 40
        assert calls == [4] * 2 + [1] * 8
        assert any("8 calls did not come back" in one.reasons["t_stuck"] for one in scored)
        again = runner.score(many, [""] * 40)
        assert time.perf_counter() - start < 25
        assert len(calls) == 12
        assert "workers: 1" in again[0].reasons["t_stuck"]
        release.set()
        for thread in threading.enumerate():
            if thread.name == "reward-t_stuck":
                thread.join(10)
        assert parts(runner.score(PICTURES, PROMPTS), "t_stuck") == [0.5] * 6


def test_async_calls_on_a_blocked_thread_share_one_time_limit(release):
    """Each once waited for its own: with 256 pictures and a limit of 60 s that was hours."""

    @reward(name="t_blocked")
    async def blocked(images):
        await asyncio.sleep(0.05)  # all calls have begun
        release.wait(30)
        return [0.5] * len(images)

    start = time.perf_counter()
    images = [grey(0)] * 100
    scored = run(RewardSpec("t_blocked", timeout_s=0.1), images=images, batch_size=1)
    assert time.perf_counter() - start < 100 * 0.1  # twice that if each waits for its own
    assert parts(scored, "t_blocked") == [None] * 100


def test_async_rewards_run_together_and_a_hanging_one_is_cancelled():
    begun, cancelled = [], []

    @reward(name="t_async")
    async def waits(images):
        begun.append(True)
        while len(begun) < 6:  # each waits for all
            await asyncio.sleep(0.01)
        return [0.5] * len(images)

    @reward(name="t_never")
    async def never(images):
        if not any(level(x) == 1 for x in images):
            return [0.5] * len(images)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    scored = run(
        RewardSpec("t_async", timeout_s=20), RewardSpec("t_never", timeout_s=1), batch_size=1
    )
    assert parts(scored, "t_async") == [0.5] * 6
    assert parts(scored, "t_never") == [0.5, None] + [0.5] * 4
    assert cancelled == [True]


def test_an_async_reward_that_blocks_its_thread_is_left_behind(release):
    @reward(name="t_blocks")
    async def blocks(images):
        release.wait(30)
        return [0.5] * len(images)

    start = time.perf_counter()
    scored = run(RewardSpec("t_blocks", timeout_s=0.2), RewardSpec("t_steady"), images=PICTURES[:2])
    assert time.perf_counter() - start < 20
    assert parts(scored, "t_blocks") == [None, None]
    assert parts(scored, "t_steady") == [0, 1]


def test_an_async_reward_keeps_its_event_loop_from_call_to_call():
    loops = []

    @reward(name="t_loop")
    async def same_loop(images):
        loops.append(asyncio.get_running_loop())
        return [0.5] * len(images)

    with RewardRunner([RewardSpec("t_loop")]) as runner:
        for _ in range(3):
            runner.score(PICTURES, PROMPTS)
    assert len(loops) == 3
    assert loops[0] is loops[1] is loops[2]


def test_a_timeout_error_of_the_rewards_own_keeps_its_message():
    @reward(name="t_server")
    async def server(images):
        raise TimeoutError("judge.example did not answer")

    reason = run(RewardSpec("t_server"))[0].reasons["t_server"]
    assert "judge.example" in reason


def test_closing_leaves_no_thread():
    before = set(threading.enumerate())  # of those, some may end meanwhile
    run(RewardSpec("t_steady"))
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_a_reward_that_stops_its_event_loop_costs_only_its_own_scores():
    @reward(name="t_stops")
    def stops(images):
        asyncio.get_running_loop().stop()
        return [0.5] * len(images)

    @reward(name="t_stops_and_waits")
    async def stops_and_waits(images):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(1)
        return [0.5] * len(images)

    specs = [RewardSpec("t_stops", timeout_s=0.1), RewardSpec("t_stops_and_waits", timeout_s=0.1)]
    with RewardRunner([*specs, RewardSpec("t_steady")], batch_size=3) as runner:
        for _ in range(2):
            scored = runner.score(PICTURES, PROMPTS)
            assert parts(scored, "t_stops_and_waits") == [None] * 6
            assert parts(scored, "t_steady") == [0, 1, 2, 3, 4, 5]
        time.sleep(0.05)  # the loop that stopped is closed by now
    gc.collect()  # what was never awaited is told here, not in another test
