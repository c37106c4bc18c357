"""Waves through stages: what overlaps, what does not, and that overlap changes no number."""

import threading
import time
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollouts import GROUP, engine_of, pixels, sampler_of

from common.errors import RunError
from rollout.pipeline import in_turn, overlapped
from rollout.timeline import Timeline

PROMPTS = ["a photo of a red circle", "x", 'a sign that says "CAB"', "two blue squares", "y"]


def append(letter: str):
    """A stage that adds its letter to a wave's text."""
    return lambda wave: wave + letter


@settings(deadline=None, max_examples=30)
@given(waves=st.integers(1, 9), stages=st.integers(1, 5))
def test_every_wave_passes_every_stage_once_and_in_order(waves, stages):
    letters = "abcde"[:stages]
    given_waves = [str(number) for number in range(waves)]
    expected = [wave + letters for wave in given_waves]
    assert in_turn([append(letter) for letter in letters], given_waves) == expected
    assert overlapped([append(letter) for letter in letters], given_waves) == expected


def test_neighbouring_stages_work_at_the_same_time_and_no_stage_twice():
    timeline = Timeline()
    begun = {(letter, wave): threading.Event() for letter in "abc" for wave in range(6)}

    def stage(letter: str):
        def work(wave: int) -> int:
            with timeline.busy(letter, wave):
                begun[letter, wave].set()
                # None ends before its neighbours are at work on the waves before and after.
                for other in {"a": "b", "b": "ac", "c": "b"}[letter]:
                    neighbour = other, wave + ord(letter) - ord(other)
                    if neighbour in begun:
                        assert begun[neighbour].wait(20), (letter, wave, other)
            return wave

        return work

    overlapped([stage(letter) for letter in "abc"], list(range(6)))
    for letter in "abc":
        own = sorted(i for i in timeline.intervals if i.stage == letter)
        assert [interval.wave for interval in own] == list(range(6))
        assert all(a.end <= b.start for a, b in pairwise(own))
    for number in range(6):
        path = sorted((i for i in timeline.intervals if i.wave == number), key=lambda i: i.start)
        assert [interval.stage for interval in path] == ["a", "b", "c"]


def test_no_more_waves_are_under_way_than_there_are_stages():
    begun, finished, most = [], [], []

    def first(wave: int) -> int:
        begun.append(wave)
        most.append(len(begun) - len(finished))
        return wave

    def last(wave: int) -> int:
        time.sleep(0.02)
        finished.append(wave)
        return wave

    overlapped([first, lambda wave: wave, last], list(range(10)))
    assert max(most) == 3


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_the_exception_of_a_stage_ends_the_work(guilty):
    seen = []

    def stage(number):
        def work(wave: int) -> int:
            if number == guilty and wave == 2:
                raise RunError(f"stage {number} failed")
            seen.append((number, wave))
            return wave

        return work

    before = set(threading.enumerate())
    with pytest.raises(RunError, match=f"stage {guilty} failed"):
        overlapped([stage(number) for number in range(3)], list(range(50)))
    assert not set(threading.enumerate()) - before  # no thread is left behind
    assert max(wave for number, wave in seen if number == 0) < 8


# --- on the tiny policy --------------------------------------------------------------------------


def brightness(images, rows) -> list[tuple[int, float]]:
    places = range(rows.start, rows.stop)
    return [(i, float(np.asarray(p).mean())) for i, p in zip(places, images, strict=True)]


def rolled(policy, waves, **options):
    return sampler_of(policy, waves=waves, **options)(PROMPTS, GROUP, 4, judge=brightness)


def assert_same_bits(one, other) -> None:
    assert one.prompt_ids == other.prompt_ids
    for name in ("completion_ids", "behaviour_logprobs", "logprobs"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(pixels(one), pixels(other))
    assert one.scores == other.scores


class Elsewhere:
    """An engine that is not the policy's own module: the four stages have a thread each."""

    def __init__(self, policy) -> None:
        self.generate = engine_of(deepcopy(policy)).generate


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_an_overlapped_step_has_the_numbers_of_the_serial_one(
    policy, monkeypatch, elsewhere, shared
):
    policy.ar.train()  # as in a run: a stage that let another see it would sample with dropout
    options = {"shared": shared, "micro_batch": 2}
    if elsewhere:
        options["engine"] = Elsewhere(policy)
    together = rolled(policy, 3, **options)
    monkeypatch.setattr("rl.rollouts.overlapped", in_turn)
    assert_same_bits(together, rolled(policy, 3, **options))
    assert policy.ar.training
    assert {interval.wave for interval in together.intervals} == {0, 1, 2}
    stages = {interval.stage for interval in together.intervals}
    assert stages == {"rollout", "score", "render", "reward"}


def test_waves_change_no_token_and_no_place(policy):
    whole, waves = rolled(policy, 1), rolled(policy, 3)
    assert whole.prompt_ids == waves.prompt_ids
    assert torch.equal(whole.completion_ids, waves.completion_ids)
    torch.testing.assert_close(whole.logprobs, waves.logprobs, atol=1e-5, rtol=0)
    assert np.abs(pixels(whole) - pixels(waves)).max() <= 1
    assert [place for place, _ in waves.scores] == list(range(len(PROMPTS) * GROUP))


def test_more_waves_than_prompts_is_no_matter(policy):
    assert torch.equal(rolled(policy, 50).completion_ids, rolled(policy, 1).completion_ids)
