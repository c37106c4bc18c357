"""A thousand steps of workers that are killed at random: every sample arrives once, and is right.

The engine is cheap (a sample's tokens spell out its seed and the weights it was drawn with); the
workers, the cluster and the kills are real.
"""

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import ray
import torch
from ray import cloudpickle

from rollout.cluster import Placement, ray_cluster
from rollout.engine import RolloutBatch
from rollout.ray_pool import RayPool

STEPS, PROMPTS, GROUP, KILLS = 1000, 5, 3, 3
PUSH_EVERY = 20


class Spelling:
    """Tokens of a sample: its seed's step, prompt and member, and the version of the weights."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.version = -1

    def generate(self, prompt_ids, n, sampling, seeds) -> RolloutBatch:
        time.sleep(0.001)
        rows = [[*place_of(seed), self.version] for seed in seeds]
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        return RolloutBatch(prompts, torch.tensor(rows), torch.zeros(len(rows), 4))

    def load_weights(self, named_tensors, step) -> None:
        [(_, tensor)] = named_tensors
        self.version = int(tensor)

    def fingerprint(self) -> str:
        return str(self.version)

    def close(self) -> None: ...


def seed_of(step: int, prompt: int, member: int) -> int:
    return (step * PROMPTS + prompt) * GROUP + member


def place_of(seed: int) -> tuple[int, int, int]:
    rest, member = divmod(seed, GROUP)
    return *divmod(rest, PROMPTS), member


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    place = Placement("rollout", 2)
    with ray_cluster(None, [place]):
        pool = RayPool(lambda events: Spelling(), place, torch.float32, events=[])
        yield pool
        pool.close()


def kill_soon(pool: RayPool, victim: int, seconds: float) -> threading.Timer:
    process = ray.get(pool.actors.handles[victim].__ray_call__.remote(lambda worker: os.getpid()))
    timer = threading.Timer(seconds, os.kill, (process, signal.SIGKILL))
    timer.start()
    return timer


@pytest.mark.slow
def test_each_sample_of_a_thousand_steps_arrives_once_whoever_is_killed(pool):
    rng = random.Random(0)
    kills = dict.fromkeys(sorted(rng.sample(range(10, STEPS - 10), KILLS)))
    arrived: Counter[tuple[int, ...]] = Counter()
    for step in range(STEPS):
        if step in kills:
            # Within the time of a few calls: in the middle of one, or between two.
            kills[step] = kill_soon(pool, rng.randrange(2), rng.random() * 0.02)
        if step % PUSH_EVERY == 0:
            pool.load_weights([("version", torch.tensor([float(step)]))], step)
            pool.fingerprint()
        prompt_ids = [[prompt] for prompt in range(PROMPTS)]
        places = [(prompt, member) for prompt in range(PROMPTS) for member in range(GROUP)]
        seeds = [seed_of(step, *place) for place in places]
        batch = pool.generate(prompt_ids, GROUP, None, seeds)
        assert batch.prompt_ids == [[prompt] for prompt, _ in places]
        pushed = step - step % PUSH_EVERY
        assert batch.completion_ids.tolist() == [[step, *place, pushed] for place in places]
        arrived.update(tuple(row[:3]) for row in batch.completion_ids.tolist())
    for timer in kills.values():
        timer.join()
    assert len(arrived) == STEPS * PROMPTS * GROUP
    assert set(arrived.values()) == {1}
    assert pool.actors.replaced == KILLS
    assert [event["event"] for event in pool.actors._events] == ["worker_replaced"] * KILLS
    assert {event["worker"] for event in pool.actors._events} <= {0, 1}
