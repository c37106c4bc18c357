"""The suites: registry, options, limits, and scorers on pictures whose truth is known."""

import json
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from eval_stand_in import StandInPolicy
from PIL import Image

from common.errors import AtelierError, DataError, RewardError, RunError, UsageError
from data.scenes import Scene, render_scene
from evals.compare import compare
from evals.run import evaluate
from evals.suites import Suite, list_suites, load_suite, register_suite, suite_summary, task_of
from evals.suites.geneval import TASK_SIZES, asked_for

OFFICIAL = Path(__file__).parents[3] / "shared" / "geneval" / "evaluation_metadata.jsonl"
needs_official = pytest.mark.skipif(not OFFICIAL.is_file(), reason="the official file is not here")


def scores(suite: Suite, error: float) -> list[dict[str, float | None]]:
    policy = StandInPolicy(suite.records, error)
    prompts = [record["prompt"] for record in suite.records]
    images = policy.generate(
        prompts, steps=1, guidance=1.0, temperature=1.0, seeds=list(range(len(prompts)))
    )
    return [
        suite.score(image, record).values
        for image, record in zip(images, suite.records, strict=True)
    ]


def test_built_in_suites_are_listed() -> None:
    built_in = {"geneval", "geneval-scenes", "ocr-scenes", "prompt-file"}
    assert built_in <= set(list_suites())


def test_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(AtelierError, match="geneval-scenes"):
        load_suite("geneval-scene")


def test_limit_takes_tasks_in_turn_and_nests() -> None:
    whole = load_suite("geneval-scenes")
    six, twelve = whole.limited(6), whole.limited(12)
    assert len({task_of(record) for record in six.records}) == 6
    assert twelve.records[:6] == six.records
    assert whole.limited(10_000) == whole


def test_prompt_ids_are_unique() -> None:
    for name in ("geneval-scenes", "ocr-scenes"):
        ids = [record["prompt_id"] for record in load_suite(name).records]
        assert len(ids) == len(set(ids))


def test_right_pictures_score_one_and_wrong_ones_zero() -> None:
    suite = load_suite("geneval-scenes")
    right, wrong = scores(suite, 0.0), scores(suite, 1.0)
    assert sum(v["strict"] or 0 for v in right) >= 0.99 * len(right)
    assert sum(v["strict"] or 0 for v in wrong) <= 0.06 * len(wrong)
    assert all(value["extra_objects"] == 0 for value in right)


def test_sign_is_read_letter_by_letter() -> None:
    suite = load_suite("ocr-scenes", 3)
    record = next(r for r in suite.records if len(r["metadata"]["text"]) >= 2)
    word = record["metadata"]["text"]
    asked = suite.score(render_scene(Scene("text", word=word)), record)
    assert asked.values == {"exact": 1.0, "ocr": 1.0}
    last = "A" if word[-1] != "A" else "X"
    other = suite.score(render_scene(Scene("text", word=word[:-1] + last)), record)
    # one wrong letter of n: the published score is 1 - 1 / n
    assert other.values["exact"] == 0.0
    assert other.values["ocr"] == pytest.approx(1 - 1 / len(word))
    assert word in other.reason


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("geneval-scenes", {"colour": "red"}, "has no option `colour`"),
        ("prompt-file", {"prompt": "x.jsonl", "reward": "ocr"}, "write `prompts`"),
        ("prompt-file", {"prompts": "x.jsonl"}, "needs the option `reward`"),
        ("geneval", {}, "needs the option `prompts`"),
    ],
)
def test_a_wrong_option_says_what_to_write(name: str, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_suite(name, options=options)


# --- GenEval itself ----------------------------------------------------------------------------


@needs_official
def test_the_official_prompts_are_the_553() -> None:
    suite = load_suite("geneval", options={"prompts": str(OFFICIAL), "detector": "scenes"})
    assert Counter(task_of(record) for record in suite.records) == TASK_SIZES
    assert sum(TASK_SIZES.values()) == 553
    assert [record["prompt_id"] for record in suite.records] == [f"{i:05d}" for i in range(553)]
    assert suite.records[0]["prompt"] == "a photo of a bench"
    assert suite.records[0]["metadata"]["include"] == [{"class": "bench", "count": 1}]
    assert suite.pictures == 4
    # scored by another detector than the published one
    assert suite.comparability(seeds=4, limit=None)
    assert suite.settings == {"detector": "scenes", "prompts": "sha256:5c48e0813e812e3c"}


@needs_official
def test_a_changed_prompt_file_is_refused(tmp_path: Path) -> None:
    changed = tmp_path / "evaluation_metadata.jsonl"
    changed.write_bytes(OFFICIAL.read_bytes().replace(b"a photo of a bench", b"a photo of a Bench"))
    with pytest.raises(DataError, match="not the official prompt list"):
        load_suite("geneval", options={"prompts": str(changed), "detector": "scenes"})


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="djghosh13/geneval"):
        load_suite("geneval", options={"prompts": str(tmp_path / "no.jsonl")})


@needs_official
def test_unknown_detectors_and_their_options_are_refused() -> None:
    options = {"prompts": str(OFFICIAL), "detector": "scene"}
    with pytest.raises(RewardError, match="scenes"):
        load_suite("geneval", options=options)
    with pytest.raises(UsageError, match="detector `scenes` has no option `weights`"):
        load_suite("geneval", options=options | {"detector": "scenes", "weights": "w.pth"})


# --- the fact asked for ------------------------------------------------------------------------


def clause(label: str, color: str | None = None, position: list | None = None) -> dict:
    found: dict = {"class": label, "count": 1}
    found |= {} if color is None else {"color": color}
    return found | ({} if position is None else {"position": position})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([clause("cat"), clause("dog")], [clause("dog"), clause("cat")], True),
        ([clause("cat"), clause("dog")], [clause("cat"), clause("cow")], False),
        # "a dog left of a cat" and "a cat right of a dog"
        (
            [clause("cat"), clause("dog", position=["left of", 0])],
            [clause("dog"), clause("cat", position=["right of", 0])],
            True,
        ),
        (
            [clause("cat"), clause("dog", position=["above", 0])],
            [clause("dog"), clause("cat", position=["below", 0])],
            True,
        ),
        (
            [clause("cat"), clause("dog", position=["left of", 0])],
            [clause("dog"), clause("cat", position=["left of", 0])],
            False,
        ),
        (
            [clause("cat"), clause("dog", position=["left of", 0])],
            [clause("cat"), clause("dog", position=["above", 0])],
            False,
        ),
        (
            [clause("cat", "red"), clause("dog", "blue")],
            [clause("dog", "blue"), clause("cat", "red")],
            True,
        ),
        (
            [clause("cat", "red"), clause("dog", "blue")],
            [clause("cat", "blue"), clause("dog", "red")],
            False,
        ),
        ([{"class": "cat", "count": 2}], [{"class": "cat", "count": 3}], False),
    ],
)
def test_prompts_that_ask_for_the_same_fact(one: list, other: list, same: bool) -> None:
    facts = [asked_for({"include": include}) for include in (one, other)]
    assert (facts[0] == facts[1]) == same


def test_every_held_out_relation_has_its_mirror_in_the_same_cluster() -> None:
    records = load_suite("geneval-scenes").records
    sizes = Counter(r["cluster"] for r in records if task_of(r) == "position")
    assert set(sizes.values()) <= {1, 2}
    assert 2 in sizes.values()
    prompts = {r["prompt"]: r["cluster"] for r in records}
    pair = next(p for p in prompts if " right of " in p)
    a, b = pair.removeprefix("a photo of ").split(" right of ")
    mirror = f"a photo of {b} left of {a}"
    assert prompts.get(mirror, prompts[pair]) == prompts[pair]


# --- rewards over a prompt file ----------------------------------------------------------------


def test_a_reward_over_a_prompt_file(tmp_path: Path) -> None:
    reward = tmp_path / "brightness.py"
    reward.write_text(
        "def brightness(images, prompts, wanted):\n"
        "    return [None if w == 'skip' else i.convert('L').getpixel((0, 0)) / 255\n"
        "            for i, w in zip(images, wanted)]\n"
    )
    lines = [
        {"prompt": "a lamp", "wanted": "light", "metadata": {"tag": "lamps"}},
        {"prompt": "a cave", "wanted": "skip"},
    ]
    prompts = tmp_path / "rooms.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"prompts": str(prompts), "reward": f"{reward}:brightness"}
    suite = load_suite("prompt-file", options=options)
    assert [task_of(record) for record in suite.records] == ["lamps", "rooms"]
    assert suite.headline == "brightness"
    white = Image.new("RGB", (8, 8), "white")
    assert suite.score(white, suite.records[0]).values == {"brightness": 1.0}
    skipped = suite.score(white, suite.records[1])
    assert skipped.values == {"brightness": None}
    assert skipped.reason
    assert suite.comparability(seeds=4, limit=None) == "the prompt file is the user's own"
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "a lamp"}\n')
    with pytest.raises(RewardError, match="wanted"):
        load_suite("prompt-file", options=options | {"prompts": str(bare)})


def test_two_prompts_under_one_id_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "rooms.jsonl"
    lines = [{"prompt": prompt, "prompt_id": "lamp"} for prompt in ("a lamp", "a red lamp")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "bright.py").write_text(CODE)
    options = {"prompts": str(prompts), "reward": f"{tmp_path}/bright.py:bright"}
    with pytest.raises(
        DataError, match=r"id 'lamp': 'a lamp' and 'a red lamp'.*\n *Fix: give each"
    ):
        load_suite("prompt-file", options=options)


def test_the_same_prompt_twice_is_one_fact(tmp_path: Path) -> None:
    (tmp_path / "bright.py").write_text(CODE)
    lines = ['{"prompt": "a lamp"}', '{"prompt": "a lamp"}', '{"prompt": "a chair"}']
    (tmp_path / "rooms.jsonl").write_text("\n".join(lines) + "\n")
    options = {"prompts": f"{tmp_path}/rooms.jsonl", "reward": f"{tmp_path}/bright.py:bright"}
    records = load_suite("prompt-file", options=options).records
    assert len({record["prompt_id"] for record in records}) == 3
    assert [record["cluster"] for record in records] == ["a lamp", "a lamp", "a chair"]


def test_a_prompt_file_may_be_a_plain_list(tmp_path: Path) -> None:
    (tmp_path / "bright.py").write_text(CODE)
    (tmp_path / "rooms.txt").write_text("a lamp\na chair\n\na lamp\n")
    options = {"prompts": f"{tmp_path}/rooms.txt", "reward": f"{tmp_path}/bright.py:bright"}
    records = load_suite("prompt-file", options=options).records
    assert [record["prompt"] for record in records] == ["a lamp", "a chair", "a lamp"]
    assert {task_of(record) for record in records} == {"rooms"}
    assert records[0]["cluster"] == records[2]["cluster"]
    assert len({record["prompt_id"] for record in records}) == 3


def judged_by(folder: Path, code: str, prompt: str = "a lamp", **options: str) -> Suite:
    """A suite over folder/rooms.jsonl with the reward in folder/bright.py."""
    folder.mkdir(exist_ok=True)
    (folder / "bright.py").write_text(code)
    (folder / "rooms.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    given = {"prompts": f"{folder}/rooms.jsonl", "reward": f"{folder}/bright.py:bright"}
    return load_suite("prompt-file", options=given | options)


CODE = "def bright(images, prompts, weight=1.0):\n    return [weight for _ in images]\n"


def test_the_reward_s_code_and_arguments_are_part_of_a_suite(tmp_path: Path) -> None:
    first = judged_by(tmp_path / "a", CODE)
    assert judged_by(tmp_path / "b", CODE).settings == first.settings  # wherever the files lie
    edited = judged_by(tmp_path / "a", CODE.replace("[weight for", "[weight / 2 for"))
    assert edited.settings["reward"] != first.settings["reward"]
    assert edited.settings["prompts"] == first.settings["prompts"]
    weighted = judged_by(tmp_path / "a", CODE, weight="0.25")
    assert weighted.settings == first.settings | {"weight": "0.25"}
    image = Image.new("RGB", (8, 8))
    assert weighted.score(image, weighted.records[0]).values == {"bright": 0.25}
    other = judged_by(tmp_path / "a", CODE, prompt="a cave")
    assert other.settings["prompts"] != first.settings["prompts"]


def test_a_changed_reward_is_neither_reused_nor_paired(tmp_path: Path) -> None:
    def evaluated(code: str, out: str) -> list[tuple[str, int]]:
        suite = judged_by(tmp_path / "files", code)
        policy = StandInPolicy(load_suite("geneval-scenes", 1).records, 0.0)
        policy.metadata = dict.fromkeys(["a lamp"], next(iter(policy.metadata.values())))
        evaluate(policy, suite, tmp_path / out, seeds=1, weights="w")
        return policy.generated

    assert len(evaluated(CODE, "results/a")) == 1
    assert len(evaluated(CODE, "results/b")) == 0  # taken over
    changed = CODE.replace("[weight for", "[-weight for")
    with pytest.raises(RunError, match="reward is 'bright of source"):
        evaluated(changed, "results/a")
    assert len(evaluated(changed, "results/c")) == 1
    with pytest.raises(RunError, match=r"judged differently: reward is 'bright of source"):
        compare(tmp_path / "results/a", tmp_path / "results/c")


def test_a_plug_in_suite_is_known_by_its_code(tmp_path: Path) -> None:
    builder = tmp_path / "my_suite.py"
    builder.write_text(
        "from evals.suites import Metric, SampleScore, Suite\n"
        "def build(weights='none'):\n"
        "    record = {'prompt': 'a', 'prompt_id': 'a', 'metadata': {'tag': 't'}}\n"
        "    score = lambda image, record: SampleScore({'m': 1.0}, '')\n"
        "    return Suite('mine', 'Mine', 1, (record,), score, {'m': Metric('M')}, None)\n"
    )
    spec = spec_from_file_location("my_suite", builder)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    register_suite("my-suite-of-a-test")(module.build)
    assert "no docstring" in suite_summary("my-suite-of-a-test")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "part").write_bytes(b"1")
    options = {"weights": str(weights)}
    first = load_suite("my-suite-of-a-test", options=options).settings
    assert first.keys() == {"weights", "source"}
    assert load_suite("my-suite-of-a-test", options=options).settings == first
    (weights / "part").write_bytes(b"2")
    second = load_suite("my-suite-of-a-test", options=options).settings
    assert second["weights"] != first["weights"]
    builder.write_text(builder.read_text().replace("1.0", "0.0"))
    assert load_suite("my-suite-of-a-test", options=options).settings["source"] != first["source"]
