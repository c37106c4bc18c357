"""The geneval reward with a detector that says what the test tells it, and the check of records."""

import hashlib
import json

import pytest
from PIL import Image

from common.errors import RewardError
from rewards import load_reward
from rewards.detector import Detection, load_detector
from rewards.geneval import check_metadata, geneval
from rewards.geneval_metadata import CLASSES


class ToldDetector:
    name = "told"
    not_comparable = "made up"

    def __init__(self, *found):
        self.found = list(found)

    def detect(self, images):
        return self.found[: len(images)]

    def classify_colors(self, image, detections):
        return ["red"] * len(detections)


def circle(x, score=0.95, label="circle"):
    return Detection(label, score, (x, 0, x + 4, 4))


PICTURE = Image.new("RGB", (48, 48))
RED_CIRCLE = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}


@pytest.mark.parametrize(
    ("found", "options", "expected"),
    [
        ([circle(0)], {}, 1.0),
        ([], {}, 0.5 * 0 + 0.5 * (0 + 0) / 2),
        # Two circles: strict holds (one is enough), number 0, colour 0 as the number is wrong.
        ([circle(0), circle(9)], {}, 0.5 * 1 + 0.5 * 0 - 0.15 * 1),
        ([circle(0), circle(9, label="ring")], {}, 1.0 - 0.15),
        ([circle(0)] + [circle(9 + i, label="ring") for i in range(7)], {}, 1.0 - 0.15 * 3),
        ([circle(0)] + [circle(9 + i, label="ring") for i in range(7)], {"max_extra": 5}, 0.25),
        ([circle(0), circle(9, label="ring")], {"extra_penalty": 0}, 1.0),
        ([circle(0)], {"strict_weight": 2, "soft_weight": 0}, 2.0),
    ],
)
def test_the_formula(found, options, expected):
    [score] = geneval([PICTURE], [RED_CIRCLE], detector=ToldDetector(found), **options)
    assert score.value == pytest.approx(expected)


def test_details_explain_the_score():
    found = [circle(0), circle(9, label="ring"), circle(20, score=0.1)]
    [score] = geneval([PICTURE], [RED_CIRCLE], detector=ToldDetector(found))
    assert score.details == {
        "strict": 1.0,
        "soft": 1.0,
        "extra": 1,
        "detector": "told",
        "not_comparable": "made up; the score is a mixture, GenEval's is the strict verdict alone",
        "objects": [
            {"label": "circle", "color": "red", "score": 0.95, "box": [0, 0, 4, 4]},
            {"label": "ring", "color": None, "score": 0.95, "box": [9, 0, 13, 4]},
        ],
        "size": [48, 48],
    }
    json.dumps(score.details)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "mixture"),
        ({"soft_weight": 0, "extra_penalty": 0}, "mixture"),
        ({"strict_weight": 1, "soft_weight": 0}, "mixture"),
        ({"strict_weight": 1, "soft_weight": 0, "extra_penalty": 0}, None),
        ({"strict_weight": 1, "soft_weight": 0, "max_extra": 0}, None),
        ({"strict_weight": 1, "soft_weight": 0, "extra_penalty": 0, "compat": "flow_grpo"}, "flow"),
    ],
)
def test_only_the_strict_verdict_by_the_official_rules_is_comparable(options, word):
    detector = ToldDetector([circle(0)])
    detector.not_comparable = None
    [score] = geneval([PICTURE], [RED_CIRCLE], detector=detector, **options)
    reason = score.details["not_comparable"]
    assert reason is None if word is None else word in reason


def test_a_record_without_include_scores_none_and_spoils_no_other():
    sign = {"tag": "text", "text": "CAB"}
    detector = ToldDetector([circle(0)], [circle(0)])
    scores = geneval([PICTURE, PICTURE], [sign, RED_CIRCLE], detector=detector)
    assert scores[0].value is None
    assert "include" in scores[0].reason
    assert scores[1].value == 1.0


def test_compat_changes_the_score():
    metadata = {
        "tag": "position",
        "include": [
            {"class": "ring", "count": 1},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ],
    }
    detector = ToldDetector([circle(0, label="ring"), circle(30)])
    options = {"strict_weight": 0, "soft_weight": 1, "extra_penalty": 0}
    [ours] = geneval([PICTURE], [metadata], detector=detector, **options)
    [theirs] = geneval([PICTURE], [metadata], detector=detector, compat="flow_grpo", **options)
    assert (ours.value, theirs.value) == (pytest.approx(2 / 3), pytest.approx(3 / 4))


def test_compat_shows_the_mmdet_network_red_and_blue_exchanged_and_others_not():
    class Looking(ToldDetector):
        def detect(self, images):
            self.seen = [image.getpixel((0, 0)) for image in images]
            return super().detect(images)

    picture = Image.new("RGB", (4, 4), (10, 20, 30))
    for name, compat, seen in [
        ("mask2former", "flow_grpo", (30, 20, 10)),
        ("mask2former", None, (10, 20, 30)),
        ("scenes", "flow_grpo", (10, 20, 30)),
    ]:
        detector = Looking([circle(0)])
        detector.name = name
        geneval([picture], [RED_CIRCLE], detector=detector, compat=compat)
        assert detector.seen == [seen]
    with pytest.raises(RewardError, match="compat"):
        geneval([picture], [RED_CIRCLE], detector=detector, compat="flowgrpo")


def test_boxes_are_in_the_pixels_of_the_picture_whatever_its_size():
    from rewards.scene_detector import SceneDetector

    small = Image.new("RGB", (48, 48), (226, 226, 220))
    small.paste((214, 30, 36), (12, 20, 24, 32))
    large = small.resize((96, 192), Image.Resampling.NEAREST)
    [[one], [other]] = SceneDetector().detect([small, large])
    assert one.box_xyxy == (12, 20, 24, 32)
    assert other.box_xyxy == (24, 80, 48, 128)


def test_detector_arguments_are_checked():
    with pytest.raises(RewardError, match=r"no argument `wieghts`.*`weights`"):
        load_detector("mask2former", {"wieghts": "x"})
    with pytest.raises(RewardError, match="needs `weights`"):
        load_detector("mask2former")


def test_an_unknown_detector_names_the_nearest_one():
    with pytest.raises(RewardError, match="scenes"):
        load_detector("scene")


# --- records --------------------------------------------------------------------------------------


def record(**changes):
    metadata = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    metadata.update(changes)
    return {"prompt": "a photo", "prompt_id": "p-17", "metadata": metadata}


def clause(**changes):
    return {"include": [{"class": "circle", "count": 1, **changes}]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt_id": "p-17"}, ["no metadata"]),
        (record(tag=None), ["metadata.tag"]),
        (record(include=[]), ["metadata.include", "missing"]),
        ({"prompt_id": "p-17", "metadata": {"tag": "text", "text": "A"}}, ["include", "`text`"]),
        (record(**clause(**{"class": "cirlce"})), ["include[0].class", "`cirlce`", "`circle`"]),
        (record(**clause(color="crimson-ish")), ["include[0].color", "crimson-ish"]),
        (record(**clause(color="gren")), ["Did you mean `green`"]),
        (record(**clause(count=0)), ["include[0].count", "0"]),
        (record(**clause(count="2")), ["include[0].count"]),
        (record(**clause(count=True)), ["include[0].count"]),
        (record(include=["circle"]), ["include[0]", "not an object"]),
        (record(**clause(position=["left of", 0])), ["include[0].position", "first clause"]),
        (record(exclude=[{"class": "sqare", "count": 2}]), ["exclude[0].class", "`square`"]),
        (record(exclude={"class": "square", "count": 2}), ["exclude", "list"]),
        (
            record(include=[*clause()["include"], *clause(position=["left of", 1])["include"]]),
            ["include[1].position", "before"],
        ),
        (
            record(include=[*clause()["include"], *clause(position=["leftof", 0])["include"]]),
            ["include[1].position", "`left of`"],
        ),
        (
            record(include=[*clause()["include"], *clause(position="left of")["include"]]),
            ["include[1].position"],
        ),
    ],
)
def test_bad_metadata_is_refused_with_its_record_and_key(bad, words):
    with pytest.raises(RewardError) as caught:
        load_reward("geneval").check_record({"metadata": None, **bad})
    message = str(caught.value)
    assert [word for word in ["p-17", *words] if word not in message] == []
    assert "Fix: " in message or "Did you mean" in message


def test_the_vocabulary_is_the_detectors():
    bench = record(include=[{"class": "bench", "count": 1}])
    with pytest.raises(RewardError, match="bench"):
        check_metadata(bench)
    check_metadata(bench, detector="mask2former")
    robot = record(include=[{"class": "robot", "count": 1}])
    with pytest.raises(RewardError, match="robot"):
        check_metadata(robot, detector="owlv2")
    check_metadata(robot, detector="owlv2", detector_args={"classes": ["robot", "tree"]})


def test_the_class_names_are_the_official_ones():
    # sha256 of `evaluation/object_names.txt` in the official repository
    text = "".join(f"{name}\n" for name in CLASSES)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"
    )
