"""Cheap against full decoding: rank correlation within groups, and when training decodes better."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from test_grpo_trainer import build
from test_rollouts import engine_of

from common.errors import RecipeError
from policy.policy import to_images
from recipes import load_recipe
from rewards.runner import Scored
from rl.decode_check import DecodeCheck, decode_of_journal, raised, rank_correlations
from rl.rollouts import Sampler
from rollout.decode import Decode
from rollout.engine import Sampling

FULL = Decode(6, 2.0)


@pytest.mark.parametrize(
    ("cheap", "full", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 90], [1.0]),
        ([1, 2, 3, 4], [4, 3, 2, 1], [-1.0]),
        # 1 - 6 * (1 + 1) / (4 * 15)
        ([1, 2, 3, 4], [2, 1, 3, 4], [0.8]),
        ([5, 5, 5, 5], [1, 2, 3, 4], [0.0]),  # the order is lost
        ([1, 2, 3, 4], [7, 7, 7, 7], []),  # there is none to lose
        ([1, None, 3, 4], [2, 9, None, 4], []),  # two are left
        ([1, None, 3, 4], [2, 9, 5, 4], [0.5]),
        ([1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 4, 3, 2, 1], [1.0, -1.0]),
    ],
)
def test_rank_correlation_within_groups(cheap, full, expected):
    assert rank_correlations(cheap, full, 4) == pytest.approx(expected)


def test_steps_double_up_to_full_decoding_and_then_comes_its_guidance():
    start = Decode(1, 1.0, shared_noise=False, tile=24)
    steps, full = [start], replace(FULL, guidance_interval=(0.2, 0.9))
    while (better := raised(steps[-1], full)) != steps[-1]:
        steps.append(better)
    assert [(decode.steps, decode.guidance) for decode in steps] == [
        (1, 1.0), (2, 1.0), (4, 1.0), (6, 1.0), (6, 2.0),
    ]  # fmt: skip
    assert steps[-1].guidance_interval == (0.2, 0.9)
    assert [decode.tile for decode in steps] == [24, 24, 24, 24, None]
    assert not any(decode.shared_noise for decode in steps)


@pytest.mark.parametrize(
    ("used", "full", "better"), [(24, 16, 24), (16, 24, 24), (None, 24, None), (24, None, None)]
)
def test_no_check_makes_tiles_smaller(used, full, better):
    reached = Decode(6, 1.0, tile=used)
    assert raised(reached, replace(FULL, tile=full)).tile == better


def test_a_run_goes_on_with_the_decoding_it_had_reached():
    start = Decode(1, 1.0)
    assert decode_of_journal([{"step": 1, "reward": 0.2}], start) == start
    rows = [
        {"event": "decode_check", "steps": n, "guidance": 1.5, "guidance_interval": [0.2, 1.0]}
        for n in (2, 4)
    ]
    reached = Decode(4, 1.5, guidance_interval=(0.2, 1.0))
    assert decode_of_journal([*rows, {"step": 9}], start) == reached
    earlier = {"event": "decode_check", "steps": 2, "guidance": 1.0}
    assert decode_of_journal([earlier], start) == Decode(2, 1.0)
    in_tiles = [earlier | {"tile": tile} for tile in (24, None)]
    assert decode_of_journal(in_tiles[:1], start) == Decode(2, 1.0, tile=24)
    assert decode_of_journal(in_tiles, replace(start, tile=24)) == Decode(2, 1.0)
    assert decode_of_journal([earlier], replace(start, tile=24)) == Decode(2, 1.0, tile=24)


class Redness:
    """The mean of the red channel: differs between any two pictures of random weights."""

    names = ("redness",)

    def score(self, images, prompts, columns, step):
        totals = [float(np.asarray(image, dtype=float)[..., 0].mean()) for image in images]
        return [Scored(t, {"redness": t}, counted={"redness": t}) for t in totals]

    def weights(self, step):
        return {"redness": 1.0}


def trained(policy, tmp_path, limit: float, steps: int = 5) -> tuple[list[dict], Sampler, object]:
    events: list[dict] = []
    trainer = build(policy, tmp_path, runner=Redness(), **{"train.steps": steps})
    trainer.sampler.decode = Decode(1, 1.0)
    trainer.decode_check = DecodeCheck(2, limit, 2, FULL, events)
    trainer.train()
    return events, trainer.sampler, trainer


def test_decoding_that_ranks_otherwise_is_raised_and_said(policy, tmp_path):
    events, sampler, _ = trained(policy, tmp_path, limit=1.0)
    assert len(events) == 3  # steps 0, 2 and 4 of 0 to 4
    steps = 1
    for event in events:
        assert -1 <= event["rank_correlation"] <= 1
        assert event["raised"] == (event["rank_correlation"] < 1)
        steps = min(2 * steps, FULL.steps) if event["raised"] else steps
        assert (event["steps"], event["guidance"], event["groups"]) == (steps, 1.0, 2)
    assert sum(event["raised"] for event in events) >= 2
    assert sampler.decode == Decode(steps, 1.0)


def test_decoding_that_is_good_enough_stays(policy, tmp_path):
    events, sampler, _ = trained(policy, tmp_path, limit=-1.0)
    assert len(events) == 3
    assert not any(event["raised"] for event in events)
    assert sampler.decode == Decode(1, 1.0)


def test_full_decoding_is_not_compared_with_itself(policy, tmp_path):
    check = DecodeCheck(1, 1.0, 2, FULL, [])
    assert check.due(3, Decode(6, 1.0))
    assert not check.due(3, Decode(6, 2.0))
    assert check.due(3, Decode(6, 2.0, tile=24))
    assert not DecodeCheck(2, 1.0, 2, FULL, []).due(3, Decode(1, 1.0))


def test_the_number_is_the_one_of_the_pictures_decoded_by_hand(policy, tmp_path):
    """Same tokens, same noise, full decoding; ranks and their correlation written out."""
    events, _, trainer = trained(policy, tmp_path, limit=-1.0, steps=1)
    rollout, judge = trainer.last_rollout, Redness()
    sampler = Sampler(policy, engine_of(policy), Sampling(), Decode(1, 1.0), trainer.args.seed)
    [wave] = sampler._waves(["a", "b"], 4, (0, 0))
    found = []
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        with torch.no_grad():
            hidden = policy.condition_rows(rollout.prompt_ids[rows], rollout.completion_ids[rows])
            noise = policy.noise(wave.noise_seeds[rows])
            full = to_images(policy.render(hidden, noise=noise, steps=6, guidance=2.0))
        totals = [[s.total for s in judge.score(images, 0, 0, 0)] for images in (
            rollout.images[rows], full,
        )]  # fmt: skip
        low, high = (rankdata(values) for values in totals)
        found.append(np.corrcoef(low, high)[0, 1])
    assert events[0]["rank_correlation"] == pytest.approx(np.mean(found))


def test_groups_of_two_have_no_order_to_check():
    check = "decode.check.every=5"
    assert load_recipe("geneval-scenes", [check, "rollout.group_size=3"])
    with pytest.raises(RecipeError, match=r"Groups of 2 have no order[\s\S]*rollout\.group_size"):
        load_recipe("geneval-scenes", [check, "rollout.group_size=2"])
