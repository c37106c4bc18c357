"""The runner: no reward and no picture may spoil another's score."""

import logging
import math
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from common.errors import RewardError
from rewards import Score, reward
from rewards.checks import try_rewards
from rewards.runner import RewardRunner, RewardSpec
from rewards.spec import Gate


def grey(level):
    return Image.new("RGB", (8, 8), (level, level, level))


def level(image):
    return image.getpixel((0, 0))[0]


PICTURES = [grey(i) for i in range(6)]
PROMPTS = [f"prompt {i}" for i in range(6)]


@reward(name="t_level")
def t_level(images, prompts):
    return [float(level(image)) for image in images]


def run(*specs, images=PICTURES, prompts=None, columns=None, **options):
    prompts = PROMPTS[: len(images)] if prompts is None else prompts
    with RewardRunner(specs, **options) as runner:
        return runner.score(images, prompts, columns or {})


def parts(scored, name):
    return [s.parts[name] for s in scored]


def test_weights_parts_and_order():
    @reward(name="t_length")
    def length(prompts):
        return [len(p) for p in prompts]

    specs = RewardSpec("t_level", weight=2), RewardSpec("t_length", weight=-0.5)
    scored = run(*specs, batch_size=4)
    assert parts(scored, "t_level") == [0, 1, 2, 3, 4, 5]
    assert parts(scored, "t_length") == [8] * 6
    assert [s.total for s in scored] == [2 * i - 4 for i in range(6)]
    assert all(not s.reasons for s in scored)


def test_a_weight_of_zero_is_logged_and_not_counted():
    @reward(name="t_nothing")
    def nothing(images):
        return [None for _ in images]

    scored = run(RewardSpec("t_level"), RewardSpec("t_nothing", weight=0))
    assert [s.total for s in scored] == [0, 1, 2, 3, 4, 5]
    assert parts(scored, "t_nothing") == [None] * 6


def test_the_total_is_none_where_a_weighted_part_is():
    @reward(name="t_some")
    def some(images):
        return [None if level(x) == 2 else 1.0 for x in images]

    scored = run(RewardSpec("t_level"), RewardSpec("t_some"))
    assert [s.total for s in scored] == [1, 2, None, 4, 5, 6]
    assert scored[2].parts == {"t_level": 2.0, "t_some": None}
    assert "t_some" in scored[2].reasons


def test_the_same_reward_twice_has_two_names():
    assert list(run(RewardSpec("t_level"), RewardSpec("t_level"))[0].parts) == [
        "t_level",
        "t_level#2",
    ]


def test_details_and_reasons_reach_the_caller():
    @reward(name="t_told")
    def told(images):
        return [Score(1.0, "as asked", {"seen": level(x)}) for x in images]

    scored = run(RewardSpec("t_told"))
    assert scored[3].reasons == {"t_told": "as asked"}
    assert scored[3].details == {"t_told": {"seen": 3}}


def test_details_are_what_json_can_hold():
    given = {1: (2, 3), "array": np.arange(2), "object": grey, "deep": {None: np.float32(0.5)}}

    @reward(name="t_odd_details")
    def odd_details(images):
        return [Score(1.0, "", given) for x in images]

    details = run(RewardSpec("t_odd_details"))[0].details["t_odd_details"]
    assert details == {"1": [2, 3], "array": [0, 1], "object": str(grey), "deep": {"null": 0.5}}


def test_reasons_and_details_can_be_written_whatever_they_hold():
    @reward(name="t_unwritable")
    def unwritable(images):
        odd = {"cut \ud83d": ["cut \ud83d", math.nan, -math.inf, np.float64("inf"), "é"]}
        return [Score(1.0, "cut \ud83d", odd) for _ in images]

    @reward(name="t_unwritable_error")
    def unwritable_error(images):
        raise ValueError("cut \ud83d")

    [scored] = run(*map(RewardSpec, ("t_unwritable", "t_unwritable_error")), images=PICTURES[:1])
    assert scored.reasons["t_unwritable"] == "cut ?"
    assert scored.details["t_unwritable"] == {"cut ?": ["cut ?", None, None, None, "é"]}
    assert "cut ?" in scored.reasons["t_unwritable_error"]


@pytest.mark.parametrize("details", [[1, 2], [], "text", {(1, 2): 3}])
def test_details_that_are_no_json_object_cost_only_their_own_score(details):
    @reward(name="t_no_details")
    def no_details(images):
        return [Score(1.0, "", details if level(x) == 1 else {}) for x in images]

    scored = run(RewardSpec("t_no_details"))
    assert parts(scored, "t_no_details") == [1, None, 1, 1, 1, 1]
    assert "no JSON object" in scored[1].reasons["t_no_details"]


# --- garbage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("garbage", "word"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("0.5", "str"),
        ([0.5], "list"),
        (1j, "complex"),
        (10**400, "too large"),
        (1e20, "too large"),
        (np.float64(-1e300), "too large"),
        (Score(math.nan), "nan"),
        (Score("high"), "str"),
        (np.float32("nan"), "nan"),
        (np.zeros(1), "ndarray"),
        (Score(None, "no face in sight"), "no face in sight"),
        (None, "None"),
    ],
)
def test_garbage_for_one_picture_costs_only_its_score(garbage, word, caplog):
    @reward(name="t_garbage")
    def garbled(images):
        return [garbage if level(x) == 1 else 0.25 for x in images]

    with caplog.at_level(logging.WARNING, "atelier.rewards"):
        scored = run(RewardSpec("t_level"), RewardSpec("t_garbage"))
    assert parts(scored, "t_garbage") == [0.25, None, 0.25, 0.25, 0.25, 0.25]
    assert word in scored[1].reasons["t_garbage"]
    assert parts(scored, "t_level") == [0, 1, 2, 3, 4, 5]
    assert "t_garbage" in caplog.text
    assert "1 of 6" in caplog.text


@pytest.mark.parametrize(
    "made",
    [
        lambda n: [0.5] * n,
        lambda n: (0.5,) * n,
        lambda n: [np.float64(0.5)] * n,
        lambda n: [np.array(0.5)] * n,
        lambda n: np.full(n, 0.5, np.float32),
    ],
)
def test_lists_tuples_arrays_and_scalars_of_numpy_are_scores(made):
    @reward(name="t_made")
    def t_made(images):
        return made(len(images))

    scored = run(RewardSpec("t_made"))
    assert parts(scored, "t_made") == [0.5] * 6
    assert all(type(value) is float for value in parts(scored, "t_made"))


def test_true_and_false_are_one_and_zero():
    @reward(name="t_bool")
    def t_bool(images):
        return [level(x) > 2 for x in images]

    assert parts(run(RewardSpec("t_bool")), "t_bool") == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("returned", [None, 0.5, {}, [], [1.0] * 5, [1.0] * 7])
def test_a_wrong_return_value_or_length_is_none_for_all(returned):
    @reward(name="t_wrong")
    def wrong(images):
        return returned

    scored = run(RewardSpec("t_level"), RewardSpec("t_wrong"))
    assert parts(scored, "t_wrong") == [None] * 6
    assert parts(scored, "t_level") == [0, 1, 2, 3, 4, 5]
    assert all("returned" in s.reasons["t_wrong"] for s in scored)


def test_a_picture_that_is_left_out_of_the_list_costs_only_its_own_score():
    @reward(name="t_leaves_out")
    def leaves_out(images):
        return [1.0 for x in images if level(x) != 3]

    scored = run(RewardSpec("t_leaves_out"))
    assert parts(scored, "t_leaves_out") == [1, 1, 1, None, 1, 1]
    assert "0 scores for 1 images" in scored[3].reasons["t_leaves_out"]


class Panic(BaseException):
    """As raised by libraries written in Rust."""


def test_torch_that_another_thread_is_importing_is_left_alone(monkeypatch):
    half_way = ModuleType("torch")
    half_way.__spec__ = ModuleSpec("torch", None)
    half_way.__spec__._initializing = True  # as importlib says it
    monkeypatch.setitem(sys.modules, "torch", half_way)
    assert parts(run(RewardSpec("t_level")), "t_level") == [0, 1, 2, 3, 4, 5]


class Silent(Exception):
    """Its message cannot be told."""

    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("oops"), SystemExit(3), StopIteration(), Panic("oops"), GeneratorExit(),
        KeyboardInterrupt(), Silent(),
    ],
)  # fmt: skip
def test_a_picture_that_raises_costs_only_its_own_score(error):
    calls = []

    @reward(name="t_raises")
    def raises(images):
        calls.append(len(images))
        if any(level(x) == 4 for x in images):
            raise error
        return [0.5] * len(images)

    scored = run(RewardSpec("t_raises"), RewardSpec("t_level"), batch_size=3)
    assert parts(scored, "t_raises") == [0.5] * 4 + [None, 0.5]
    assert parts(scored, "t_level") == [0, 1, 2, 3, 4, 5]
    # Two batches of three, then the pictures of the failed one singly, each once.
    assert calls == [3, 3, 1, 1, 1]


@pytest.mark.parametrize("error", [Panic("oops"), GeneratorExit("oops")])
def test_what_a_coroutine_raises_costs_only_its_own_scores(error):
    @reward(name="t_awaited_panic")
    async def awaited_panic(images):
        raise error

    scored = run(RewardSpec("t_awaited_panic"), RewardSpec("t_level"))
    assert parts(scored, "t_awaited_panic") == [None] * 6
    assert parts(scored, "t_level") == [0, 1, 2, 3, 4, 5]
    assert "oops" in scored[0].reasons["t_awaited_panic"]


def test_the_reason_names_error_and_line():
    @reward(name="t_line")
    def line(images):
        raise KeyError("gone")

    reason = run(RewardSpec("t_line"))[0].reasons["t_line"]
    assert "KeyError: 'gone'" in reason
    assert "test_reward_runner.py:" in reason


def test_a_reward_of_the_whole_batch_is_called_once_with_all_of_it():
    calls = []

    @reward(name="t_whole", whole_batch=True)
    def whole(images):
        calls.append(len(images))
        raise ValueError("no")

    scored = run(RewardSpec("t_whole"), batch_size=2)
    assert calls == [6]
    assert parts(scored, "t_whole") == [None] * 6


def test_pictures_and_columns_are_private_to_each_reward():
    @reward(name="t_vandal")
    def vandal(images, prompts, metadata, boxes):
        for image in images:
            image.paste((99, 99, 99), (0, 0, 8, 8))
        images.clear()
        prompts.clear()
        for entry in metadata:
            entry["include"].append("graffiti")
        boxes[0][0] = 99
        return [0.0] * 6

    @reward(name="t_late")
    def late(images, prompts, metadata, boxes):
        time.sleep(0.2)
        ok = [
            len(m["include"]) == 1 and int(b[0]) == 1 for m, b in zip(metadata, boxes, strict=True)
        ]
        return [level(x) if fine else -1 for x, fine in zip(images, ok, strict=True)]

    metadata = [{"include": ["circle"]} for _ in range(6)]
    boxes = [np.ones(2) for _ in range(6)]
    pictures = [grey(i) for i in range(6)]
    scored = run(
        RewardSpec("t_vandal"),
        RewardSpec("t_late"),
        images=pictures,
        columns={"metadata": metadata, "boxes": boxes},
    )
    assert parts(scored, "t_late") == [0, 1, 2, 3, 4, 5]
    assert [level(x) for x in pictures] == [0, 1, 2, 3, 4, 5]
    assert metadata == [{"include": ["circle"]}] * 6


def test_a_picture_that_cannot_be_read_costs_only_its_own_score(tmp_path):
    path = tmp_path / "torn.png"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    seen = []

    @reward(name="t_seen")
    def t_seen(images):
        seen.append(len(images))
        return [1.0] * len(images)

    scored = run(RewardSpec("t_seen"), images=[grey(0), Image.open(path), "a.png", grey(3)])
    assert parts(scored, "t_seen") == [1.0, None, None, 1.0]
    assert "cannot be read" in scored[1].reasons["t_seen"]
    assert "str" in scored[2].reasons["t_seen"]
    assert seen == [2]


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"weight": math.nan}, "weight"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": math.nan}, "timeout_s"),
        ({"workers": -1}, "workers"),
        ({"schedule": ()}, "schedule"),
        ({"schedule": ((5, 1.0), (5, 2.0))}, "schedule"),
        ({"schedule": ((5, math.nan),)}, "schedule"),
        ({"range": (2.0, 2.0)}, "range"),
        ({"range": (math.nan, 1.0)}, "range"),
        ({"range": (0.0, math.inf)}, "range"),
        ({"only_if": Gate("t_other", math.nan)}, "at_least"),
        ({"use": "t_levl"}, "t_level"),
        ({"args": {"scale": 2}}, "scale"),
        ({"only_if": Gate("t_level", 1)}, "no other reward"),
        ({"only_if": Gate("t_othr", 1)}, "`t_other`"),
        ({"name": "t_other"}, "two rewards"),
    ],
)
def test_wrong_specs_are_refused_before_anything_runs(wrong, word):
    def build():
        spec = RewardSpec(**{"use": "t_level"} | wrong)
        RewardRunner([RewardSpec("t_level", name="t_other"), spec])

    with pytest.raises(RewardError, match=word):
        build()


def test_no_rewards_and_unequal_lengths_are_refused():
    with pytest.raises(RewardError, match="no reward"):
        RewardRunner([])
    with pytest.raises(RewardError, match="prompts"):
        run(RewardSpec("t_level"), prompts=["one"])
    with pytest.raises(RewardError, match="metadata"):
        run(RewardSpec("t_level"), columns={"metadata": [{}]})


def test_no_pictures_no_scores():
    assert run(RewardSpec("t_level"), images=[]) == []


def test_only_a_reward_that_opens_a_column_gets_paths_below_the_folder(tmp_path):
    seen = {}

    @reward(name="t_opens", paths=("mask",))
    def opens(images, mask):
        seen["opens"] = mask
        return [0.5] * len(images)

    @reward(name="t_reads")
    def reads(images, mask):
        seen["reads"] = mask
        return [0.5] * len(images)

    masks = ["a.png", "", "https://h/x", ["b.png", "c.png"], None, f"{tmp_path}/d.png"]
    run(RewardSpec("t_opens"), RewardSpec("t_reads"), columns={"mask": masks}, folder=tmp_path)
    both = [f"{tmp_path}/b.png", f"{tmp_path}/c.png"]
    assert seen["opens"] == [f"{tmp_path}/a.png", *masks[1:3], both, None, masks[5]]
    assert seen["reads"] == masks


def test_the_mean_of_a_batch_never_becomes_the_score_of_one_picture():
    with RewardRunner([RewardSpec("t_batch_mean")]) as runner:
        for count in (6, 6, 6, 6, 1):  # the fourth round would be a probe, and the last is short
            scored = runner.score(PICTURES[:count], PROMPTS[:count])
            assert parts(scored, "t_batch_mean") == [None] * count
            assert "1 scores for 6 images" in scored[0].reasons["t_batch_mean"]
    scored = run(RewardSpec("t_batch_mean"), images=PICTURES[:3], batch_size=2)
    assert parts(scored, "t_batch_mean") == [None] * 3  # calls of two and of one


def test_a_missing_column_is_named():
    @reward(name="t_needs")
    def needs(images, caption):
        return [1.0] * len(images)

    scored = run(RewardSpec("t_needs"), columns={"metadata": [{}] * 6})
    assert parts(scored, "t_needs") == [None] * 6
    assert "`caption`" in scored[0].reasons["t_needs"]
    with RewardRunner([RewardSpec("t_needs")]) as runner, pytest.raises(RewardError, match="p-1"):
        runner.check_records([{"prompt": "x", "prompt_id": "p-1"}])


# --- trying rewards out ---------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["images", "prompts", "self"])
def test_a_column_of_a_name_that_is_taken_is_refused(column):
    records = [{"prompt": "x", "prompt_id": "p-1", column: 1}]
    with (
        RewardRunner([RewardSpec("t_level")]) as runner,
        pytest.raises(RewardError, match=f"p-1.*`{column}`.*rename"),
    ):
        runner.check_records(records)


def test_trying_rewards_reports_problems_and_time():
    @reward(name="t_bad")
    def bad(images):
        return [math.nan] * len(images)

    records = [{"prompt": f"p{i}", "metadata": {"i": i}} for i in range(2)]
    good, poor = try_rewards([RewardSpec("t_level"), RewardSpec("t_bad")], records)
    assert (good.name, good.problems) == ("t_level", ())
    assert good.scores[0] == 128  # the grey picture
    assert len(good.scores) == 4
    assert good.seconds > 0
    assert poor.scores == (None,) * 4
    assert len(poor.problems) == 1
    assert "nan" in poor.problems[0]


def test_trying_rewards_names_a_record_that_cannot_be_scored():
    with pytest.raises(RewardError, match="p-9"):
        try_rewards([RewardSpec("ocr")], [{"prompt": "no quotes", "prompt_id": "p-9"}])


@reward(name="t_batch_mean")
def batch_mean(images, prompts):
    return [1.0]


@reward(name="t_only_singles")
def only_singles(images, prompts):
    if len(images) > 1:
        raise MemoryError("too many")
    return [0.5]


def test_a_function_that_breaks_the_contract_is_not_asked_picture_by_picture(caplog):
    """The mean of a batch, in a list, is a right answer for one picture only by its shape."""
    assert [score.total for score in run(RewardSpec("t_batch_mean"))] == [None] * len(PICTURES)
    assert f"it returned 1 scores for {len(PICTURES)} images" in caplog.text


def test_a_batch_that_fails_is_told_even_if_single_calls_succeed(caplog):
    assert [score.total for score in run(RewardSpec("t_only_singles"))] == [0.5] * len(PICTURES)
    assert "a call failed (MemoryError: too many" in caplog.text
