"""Decode and reward actors: one process's numbers, whatever is lost, and stages that overlap."""

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_policy import CODES, HIDDEN

from common.errors import RunError
from policy import Policy
from rewards.runner import RewardRunner, RewardSpec
from rl.rollouts import Sampler
from rollout import RolloutBatch, Sampling
from rollout.cluster import Placement, ray_cluster
from rollout.decode import Decode, Decoder
from rollout.decode_pool import DecodePool, Head
from rollout.pipeline import in_turn
from rollout.ray_pool import RayPool
from rollout.reward_pool import RewardPool
from rollout.timeline import busy_seconds

COUNT = 12
DECODE = Decode(steps=2, guidance=1.5, tile=32)
SEEDS = [7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10]
PLACES = [
    Placement(section, 2, cpus=0.3, timeout_s=240) for section in ("decode", "rewards", "rollout")
]
REWARDS = """
import numpy as np
from rewards import reward

def redness(images, prompts, wanted):
    return [w + float(np.asarray(i, dtype=float)[..., 0].mean()) for i, w in zip(images, wanted)]

@reward(name="rank", whole_batch=True)
def rank(images, prompts):
    return [float(i) for i in np.argsort([np.asarray(image).sum() for image in images])]

def picky(images, prompts):
    return [None if prompt == "p3" else 1.0 for prompt in prompts]
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the actors: bits depend on it
    with ray_cluster(None, PLACES):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def specs(tmp_path_factory) -> list[RewardSpec]:
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(REWARDS)
    return [RewardSpec(f"{file}:{name}") for name in ("redness", "picky")]


@pytest.fixture(scope="module")
def decoders(policy_folder) -> Iterator[DecodePool]:
    pool = DecodePool(Head(str(policy_folder), "float32"), PLACES[0], 3, [], [])
    yield pool
    pool.actors.close()


@pytest.fixture(scope="module")
def judges(specs) -> Iterator[RewardPool]:
    pool = RewardPool(specs, PLACES[1], events=[], busy=[])
    yield pool
    pool.actors.close()


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    return torch.randn(COUNT, 37, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(COUNT)]


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def in_actor(pool, number: int, function, *arguments):
    import ray

    return ray.get(pool.actors.handles[number].__ray_call__.remote(function, *arguments))


def alone(policy_folder, hidden, micro_batch: int | None) -> np.ndarray:
    decoder = Decoder(Policy.from_pretrained(policy_folder), micro_batch, [])
    return pixels(decoder(hidden, SEEDS, DECODE))


def asked(pictures) -> tuple:
    prompts = [f"p{i}" for i in range(COUNT)]
    return pictures, prompts, {"wanted": [float(i) for i in range(COUNT)]}, 5


# --- the numbers of one process -------------------------------------------------------------------


def test_actors_render_every_bit_that_one_process_renders(decoders, policy_folder, hidden):
    found = pixels(decoders(hidden, SEEDS, DECODE))
    assert np.array_equal(found, alone(policy_folder, hidden, 3))
    assert len({picture.tobytes() for picture in found}) == COUNT
    used = {interval.stage for interval in decoders.actors._busy}
    assert used
    assert used <= {"decode 0", "decode 1"}  # whoever is free takes the next piece


def test_a_decode_actor_holds_no_language_model(decoders):
    names = in_actor(decoders, 0, lambda actor: [n for n, _ in actor.policy.named_parameters()])
    assert not [name for name in names if name.startswith(("ar.model", "image_tokenizer"))]
    assert [name for name in names if name.startswith("diffusion.")]


def test_reward_actors_score_what_one_process_scores(judges, specs, pictures, caplog):
    with RewardRunner(specs) as runner:
        expected = runner.score(*asked(pictures))
    caplog.clear()
    assert judges.score([], [], {}) == []
    found = judges.score(*asked(pictures))
    assert found == expected
    assert found[3].total is None
    assert found[3].reasons["picky"] == "the reward returned None"
    assert "reward `picky`: 1 of 12 images could not be scored" in caplog.text


def test_a_reward_that_compares_the_pictures_of_a_call_gets_them_all(specs, pictures):
    ranks = RewardSpec(specs[0].use.replace(":redness", ":rank"))
    pool = RewardPool([ranks], PLACES[1], whole_batch=True)
    found = [one.total for one in pool.score(pictures, [""] * COUNT, {})]
    pool.actors.close()
    assert sorted(found) == list(range(COUNT))


def test_what_a_decode_actor_refuses_is_raised_here(decoders, hidden, pictures):
    before = decoders.actors.replaced
    with pytest.raises(RuntimeError, match="shape"):
        decoders(hidden[:, :, :5], SEEDS, DECODE)
    assert decoders.actors.replaced == before
    assert len(decoders(hidden[:2], SEEDS[:2], DECODE)) == 2


# --- losses ---------------------------------------------------------------------------------------


def hang_at_next_score(actor) -> None:
    actor.runner.score = lambda *_: time.sleep(3600)


def test_a_reward_actor_that_hangs_changes_no_score(judges, specs, pictures, monkeypatch):
    judges.actors.await_ready()
    monkeypatch.setattr(judges.actors, "_placement", replace(PLACES[1], timeout_s=10))
    in_actor(judges, 1, hang_at_next_score)
    with RewardRunner(specs) as runner:
        expected = runner.score(*asked(pictures))
    assert judges.score(*asked(pictures)) == expected
    [event] = judges.actors._events
    assert event == {
        "event": "worker_replaced", "section": "rewards", "worker": 1, "during": "score",
        "reason": "no answer for 10 s",
    }  # fmt: skip


def run_out_of_memory(actor, most: int) -> None:
    """Ask the allocator for four pebibytes where there are more pictures than memory is for."""
    render = type(actor.policy).render.__get__(actor.policy)

    def tight(hidden, **options):
        if len(hidden) > most:
            torch.empty(2**50)
        return render(hidden, **options)

    actor.policy.render = tight


def test_memory_that_runs_out_in_actors_halves_their_batches_three_times(
    decoders, policy_folder, hidden, monkeypatch
):
    decoders.actors.await_ready()
    for number in range(2):
        in_actor(decoders, number, run_out_of_memory, 1)
    monkeypatch.setattr(decoders.micro_batch, "size", None)
    monkeypatch.setattr(decoders.micro_batch, "_halvings", 0)
    decoders.actors._events.clear()
    monkeypatch.setattr(decoders.micro_batch, "_events", events := [])
    found = pixels(decoders(hidden, SEEDS, DECODE))
    # Of 12 pictures an actor's share is 6.
    assert [event["micro_batch"] for event in events] == [3, 2, 1]
    told = re.compile(r"decode worker [01]: .*can't allocate memory")
    assert all(told.match(event["reason"]) for event in events)
    assert np.array_equal(found, alone(policy_folder, hidden, 1))
    for number in range(2):
        in_actor(decoders, number, run_out_of_memory, 0)
    with pytest.raises(
        RunError, match=r"`render` ran out of memory.*decode worker \d[\s\S]*Fix: set train\.mi"
    ):
        decoders(hidden, SEEDS, DECODE)
    for number in range(2):
        in_actor(decoders, number, run_out_of_memory, COUNT)


# --- the stages of a step -------------------------------------------------------------------------


class Dice:
    """An engine that asks no model: tokens are drawn from the seeds."""

    dtype = torch.float32

    def __init__(self, first: int, codes: int, length: int) -> None:
        self.first, self.codes, self.length = first, codes, length

    def generate(self, prompt_ids, n, sampling, seeds) -> RolloutBatch:
        rows = [
            torch.randint(
                self.first, self.first + self.codes, (self.length,),
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]  # fmt: skip
        prompts = [ids for ids in prompt_ids for _ in range(n)]
        return RolloutBatch(prompts, torch.stack(rows), torch.zeros(len(rows), self.length))


def slower(actor, seconds: float) -> None:
    """Let a stage wait, as for a GPU of its own."""
    parts = {"SamplingActor": "engine", "DecodeActor": "policy", "RewardActor": "runner"}
    names = {"SamplingActor": "generate", "DecodeActor": "render", "RewardActor": "score"}
    kind = type(actor).__name__
    part = getattr(actor, parts[kind])
    work = getattr(part, names[kind])

    def waited(*arguments, **options):
        time.sleep(seconds)
        return work(*arguments, **options)

    setattr(part, names[kind], waited)


def test_stages_in_actors_overlap_and_change_no_number(decoders, judges, policy, monkeypatch):
    config = policy.config
    dice = partial(Dice, config.image_start_id, CODES, config.num_tokens)
    engine = RayPool(lambda events: dice(), PLACES[2], torch.float32, [], [])
    monkeypatch.setattr(decoders.micro_batch, "size", None)
    for pool in (engine, decoders, judges):
        pool.actors.await_ready()
        for number in range(2):
            in_actor(pool, number, slower, 1.0)
    sampler = Sampler(policy, engine, Sampling(), DECODE, run_seed=0, waves=3, render=decoders)
    prompts = ["a photo of a red circle", "x", "two blue squares", "y", "z", "a sign"]

    def judge(images, rows: slice):
        wanted = [float(i) for i in range(6 * 2)]
        return judges.score(images, [""] * len(images), {"wanted": wanted[rows]})

    begin = time.perf_counter()
    together = sampler(prompts, 2, 0, judge=judge)
    passed = time.perf_counter() - begin
    assert passed < sum(busy_seconds(together.intervals).values())
    spans = {(i.stage, i.wave): i for i in together.intervals}
    for first, second in pairwise(["rollout", "render", "reward"]):
        # Which waves meet depends on which stage is the slower one.
        pairs = [(spans[second, i], spans[first, i + 1]) for i in range(2)]
        assert any(a.start < b.end and b.start < a.end for a, b in pairs), (first, pairs)
    for pool in (engine, decoders, judges):
        own = sorted(pool.actors._busy)
        assert all(a.end <= b.start for a, b in pairwise(own) if a.stage == b.stage)
    monkeypatch.setattr("rl.rollouts.overlapped", in_turn)
    serial = sampler(prompts, 2, 0, judge=judge)
    engine.close()
    assert torch.equal(together.completion_ids, serial.completion_ids)
    assert torch.equal(together.logprobs, serial.logprobs)
    assert np.array_equal(pixels(together.images), pixels(serial.images))
    assert together.scores == serial.scores
