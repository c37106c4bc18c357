"""Memory that runs out: real failures of torch's allocator in each stage of a step."""

import numpy as np
import pytest
import torch
from test_rollouts import GROUP, PROMPTS, engine_of, pixels, sampler_of

from common.errors import RunError
from rollout import Sampling
from rollout.micro_batch import MicroBatch, memory_advice, pieces
from rollout.transformers_engine import TransformersEngine


def allocate(samples: int, most: int) -> None:
    """Ask the allocator for four pebibytes if there are more samples than memory is for."""
    if samples > most:
        torch.empty(2**50)


def sizes_of(work_for: int, size: int | None, count: int = 16) -> tuple[list[int], list[dict]]:
    tried, events = [], []

    def work(size: int) -> str:
        tried.append(size)
        allocate(size, work_for)
        return "done"

    micro_batch = MicroBatch("render", size, "use less", events)
    assert micro_batch.attempt(count, work) == "done"
    assert micro_batch.attempt(count, work) == "done"  # it stays at what fits
    return tried, events


@pytest.mark.parametrize(
    ("fits", "size", "tried"),
    [
        (16, None, [16, 16]),
        (8, None, [16, 8, 8]),
        (2, None, [16, 8, 4, 2, 2]),
        (3, 7, [7, 4, 2, 2]),
        (16, 64, [16, 16]),
    ],
)
def test_a_stage_halves_until_it_fits(fits, size, tried):
    found, events = sizes_of(fits, size)
    assert found == tried
    assert [event["micro_batch"] for event in events] == tried[1:-1]
    for event in events:
        assert event["event"] == "micro_batch_halved"
        assert event["stage"] == "render"
        assert "can't allocate memory" in event["reason"]


@pytest.mark.parametrize(("fits", "size", "tries"), [(1, None, 4), (0, 2, 2), (0, 1, 1)])
def test_after_three_halvings_or_at_one_sample_it_stops_with_advice(fits, size, tries):
    tried = []

    def work(size: int) -> None:
        tried.append(size)
        allocate(size, fits)

    micro_batch = MicroBatch("render", size, "set train.micro_batch lower", [])
    with pytest.raises(RunError, match=r"`render` ran out of memory[\s\S]*Fix: set train\.micro_b"):
        micro_batch.attempt(16, work)
    assert len(tried) == tries


def test_a_gpu_s_error_counts_and_others_do_not():
    def run_out(size: int) -> int:
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return size

    assert MicroBatch("score", 4, "", []).attempt(4, run_out) == 2

    def wrong(size: int) -> None:
        raise RuntimeError("shapes do not fit")

    events: list[dict] = []
    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatch("score", 4, "", events).attempt(4, wrong)
    assert events == []


def test_the_failed_attempt_holds_no_memory_while_the_next_one_works():
    import weakref

    held = []

    def work(size: int) -> None:
        alive = [reference for reference in held if reference() is not None]
        assert not alive
        mine = torch.zeros(1000)
        held.append(weakref.ref(mine))
        allocate(size, 4)

    MicroBatch("score", 16, "", []).attempt(16, work)
    assert len(held) == 3


def test_an_update_that_does_not_fit_says_what_to_change():
    with (
        pytest.raises(RunError, match=r"the update ran out of memory[\s\S]*Fix: take less\."),
        memory_advice("the update", "take less"),
    ):
        allocate(2, 1)
    with pytest.raises(RuntimeError, match="shapes"), memory_advice("the update", "take less"):
        raise RuntimeError("shapes do not fit")


def test_pieces_cover_everything_once():
    assert [list(range(10))[rows] for rows in pieces(10, 4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9],
    ]  # fmt: skip


# --- on the tiny policy --------------------------------------------------------------------------


def test_rendering_and_scoring_that_do_not_fit_change_no_picture(policy, monkeypatch):
    expected = sampler_of(policy)(PROMPTS, GROUP, 3)
    rows = {"render": policy.render, "condition_rows": policy.condition_rows}

    def tight(name: str, most: int):
        def run(first, *others, **options):
            allocate(len(first), most)
            return rows[name](first, *others, **options)

        monkeypatch.setattr(policy, name, run)

    tight("render", 3)
    tight("condition_rows", 5)
    events: list[dict] = []
    sampler = sampler_of(policy)
    sampler.render.micro_batch._events = sampler._scoring._events = events
    found = sampler(PROMPTS, GROUP, 3)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1
    assert [(e["stage"], e["micro_batch"]) for e in events] == [
        ("score", 5), ("render", 5), ("render", 3),
    ]  # fmt: skip


def test_sampling_that_does_not_fit_draws_the_same_tokens(policy):
    expected = engine_of(policy).generate([[1, 2], [3]], 8, Sampling(), list(range(16)))
    events: list[dict] = []
    config = policy.config
    engine = TransformersEngine(
        policy.ar, config.image_start_id, config.num_image_tokens, config.num_tokens,
        config.pad_id, events=events,
    )  # fmt: skip
    hook = policy.ar.model.register_forward_pre_hook(
        lambda module, given, options: allocate(len(options["input_ids"]), 5), with_kwargs=True
    )
    found = engine.generate([[1, 2], [3]], 8, Sampling(), list(range(16)))
    hook.remove()
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert [(e["stage"], e["micro_batch"]) for e in events] == [("rollout", 8), ("rollout", 4)]
