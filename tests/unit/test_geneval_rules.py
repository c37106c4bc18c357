"""GenEval's rules against an independent, plain reading of the specification, and by hand."""

import hashlib
import inspect
import json
import math
import random
from pathlib import Path

import pytest

from common.errors import RewardError
from rewards.detector import Detection
from rewards.geneval import (
    check_metadata,
    evaluate_detections,
    evaluate_like_flow_grpo,
    extra_objects,
)

LABELS = ["bench", "dog", "cup"]
PALETTE = ["red", "blue", "white"]
RELATIONS = ["left of", "right of", "above", "below"]


# --- the specification, written down without looking at the code under test ---------------------


def kept_by_class(tag, detections):
    limit = 0.9 if tag == "counting" else 0.3
    kept = {}
    for label in {d.label for d in detections}:
        mine = [d for d in detections if d.label == label and d.score > limit]
        mine.sort(key=lambda d: d.score, reverse=True)
        if mine:
            kept[label] = mine[:16]
    return kept


def stands(a, relation, b):
    """Is box a `relation` box b?"""
    ax, ay = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2
    bx, by = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    length = math.sqrt((ax - bx) ** 2 + (ay - by) ** 2)
    margin_x = 0.1 * (abs(a[2] - a[0]) + abs(b[2] - b[0]))
    margin_y = 0.1 * (abs(a[3] - a[1]) + abs(b[3] - b[1]))
    right = max(ax - bx - margin_x, 0)
    left = max(bx - ax - margin_x, 0)
    down = max(ay - by - margin_y, 0)
    up = max(by - ay - margin_y, 0)
    if max(right, left, down, up) < 1e-3:
        return False
    amount = {"left of": left, "right of": right, "above": up, "below": down}[relation]
    return amount / length > 0.5


def official(metadata, detections, color_of):
    kept = kept_by_class(metadata["tag"], detections)
    correct = True
    groups = []
    for clause in metadata["include"]:
        n = clause["count"]
        top = kept.get(clause["class"], [])[:n]
        good = len(top) == n
        if good and "color" in clause:
            good = sum(color_of(d) == clause["color"] for d in top) >= n
        if good and "position" in clause:
            relation, index = clause["position"]
            good = groups[index] is not None and all(
                stands(d.box_xyxy, relation, t.box_xyxy) for d in top for t in groups[index]
            )
        groups.append(top if good else None)
        correct = correct and good
    for clause in metadata.get("exclude", []):
        if len(kept.get(clause["class"], [])) >= clause["count"]:
            correct = False
    return correct


def server(metadata, detections, color_of, quirk):
    """The reward server: (strict, soft); `quirk` keeps the extra 1.0 of a wrong position."""
    kept = kept_by_class(metadata["tag"], detections)
    strict, parts, groups = True, [], []
    for clause in metadata["include"]:
        n = clause["count"]
        all_found = kept.get(clause["class"], [])
        parts.append(1 - abs(n - len(all_found)) / n)
        good = len(all_found) == n
        if not good and ("color" in clause or "position" in clause):
            parts.append(0)
        if good and "color" in clause:
            right = sum(color_of(d) == clause["color"] for d in all_found)
            parts.append(1 - abs(n - right) / n)
            good = right == n
        if good and "position" in clause:
            relation, index = clause["position"]
            if groups[index] is None:
                good = False
                parts.append(0)
            else:
                good = all(
                    stands(d.box_xyxy, relation, t.box_xyxy)
                    for d in all_found
                    for t in groups[index]
                )
                parts += [1] if good else ([0, 1] if quirk else [0])
        groups.append(all_found if good else None)
        strict = strict and good
    return strict, sum(parts) / len(parts)


# --- generated cases ----------------------------------------------------------------------------


def random_case(rng):
    """Metadata and detections that are right, wrong and nearly right in about equal parts."""
    tag = rng.choice(["single_object", "two_object", "counting", "colors", "position"])
    include = []
    for index in range(rng.choice([1, 1, 2, 2, 3])):
        clause = {"class": rng.choice(LABELS), "count": rng.choice([1, 1, 1, 2, 3])}
        if rng.random() < 0.4:
            clause["color"] = rng.choice(PALETTE)
        if index and rng.random() < 0.6:
            clause["position"] = [rng.choice(RELATIONS), rng.randrange(index)]
        include.append(clause)
    metadata = {"tag": tag, "include": include}
    if rng.random() < 0.4:
        clause = rng.choice(include)
        metadata["exclude"] = [{"class": clause["class"], "count": clause["count"] + 1}]
    detections = []
    for clause in include:  # mostly what was asked for, so that deep rules are reached
        for _ in range(clause["count"] + rng.choice([0, 0, 0, 0, -1, 1])):
            detections.append(random_detection(rng, clause["class"], clause.get("color"), tag))
    for _ in range(rng.choice([0, 0, 1, 2, 30])):
        detections.append(random_detection(rng, rng.choice([*LABELS, "vase"]), None, tag))
    rng.shuffle(detections)
    return metadata, detections


def random_detection(rng, label, color, tag):
    good = rng.uniform(0.91, 1) if tag == "counting" else rng.uniform(0.31, 1)
    score = good if rng.random() < 0.85 else rng.uniform(0, 1)
    # Quarter steps make equal centres, exact margins and exact diagonals common.
    x, y = rng.randrange(0, 33) / 4, rng.randrange(0, 33) / 4
    w, h = rng.randrange(1, 9) / 4, rng.randrange(1, 9) / 4
    colored = color if color and rng.random() < 0.85 else rng.choice(PALETTE)
    detection = Detection(label, score, (x, y, x + w, y + h))
    COLOR_OF[id(detection)] = colored
    ALIVE.append(detection)
    return detection


COLOR_OF: dict[int, str] = {}
ALIVE: list[Detection] = []


def classify(detections):
    return [COLOR_OF[id(d)] for d in detections]


def test_2000_generated_sets_agree_with_the_specification():
    rng = random.Random(7)
    verdicts = {True: 0, False: 0}
    strict_verdicts = {True: 0, False: 0}
    quirks = 0
    for number in range(2000):
        metadata, detections = random_case(rng)

        def color_of(d):
            return COLOR_OF[id(d)]

        result = evaluate_detections(metadata, detections, classify)
        expected = official(metadata, detections, color_of)
        assert result.correct == expected, (number, metadata, detections)
        assert bool(result.reason) == (not expected)
        _, soft = server(metadata, detections, color_of, quirk=False)
        assert result.soft == pytest.approx(soft, abs=1e-12), (number, metadata, detections)
        same = evaluate_like_flow_grpo(metadata, detections, classify)
        strict, quirky = server(metadata, detections, color_of, quirk=True)
        assert same.correct == strict, (number, metadata, detections)
        assert same.soft == pytest.approx(quirky, abs=1e-12), (number, metadata, detections)
        verdicts[expected] += 1
        strict_verdicts[strict] += 1
        quirks += quirky != soft
    # The comparison means nothing unless the generator reaches all of it.
    assert min(*verdicts.values(), *strict_verdicts.values()) > 400, (verdicts, strict_verdicts)
    assert quirks > 50


OFFICIAL = Path(__file__).parents[2].parent / "shared" / "geneval"


def test_the_553_official_prompts_are_accepted_and_judged_as_the_specification_says():
    """Each official prompt with pictures that are right, and ones made wrong at random."""
    if not OFFICIAL.exists():
        pytest.skip("the official GenEval metadata is not beside this repository")
    raw = (OFFICIAL / "evaluation_metadata.jsonl").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == (
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    )
    prompts = [json.loads(line) for line in raw.splitlines()]
    assert len(prompts) == 553
    names = (OFFICIAL / "object_names.txt").read_text().split("\n")
    rng = random.Random(11)
    verdicts = {}
    for metadata in prompts:
        check_metadata({"prompt": metadata["prompt"], "metadata": metadata}, "mask2former")
        for _ in range(3):
            detections = official_case(rng, metadata, names[:80])

            def color_of(d):
                return COLOR_OF[id(d)]

            result = evaluate_detections(metadata, detections, classify)
            expected = official(metadata, detections, color_of)
            assert result.correct == expected, (metadata, detections)
            _, soft = server(metadata, detections, color_of, quirk=False)
            assert result.soft == pytest.approx(soft, abs=1e-12)
            verdicts.setdefault(metadata["tag"], []).append(expected)
    assert len(verdicts) == 6
    for tag, seen in verdicts.items():
        assert 0.15 < sum(seen) / len(seen) < 0.95, (tag, sum(seen) / len(seen))


def official_case(rng, metadata, names):
    """Detections that mostly satisfy the prompt: objects on a line, in the direction it asks for.

    Boxes are 100 pixels wide and 60 apart at least, so that a relation holds if not spoilt.
    """
    steps = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    detections = []
    for index, clause in enumerate(metadata["include"]):
        x, y = 500.0, 500.0
        if "position" in clause:
            dx, dy = steps[clause["position"][0]]
            far = rng.choice([260, 260, 260, 30, -260])
            x, y = x + far * dx, y + far * dy
        for n in range(clause["count"] + rng.choice([0, 0, 0, 0, 0, 1, -1])):
            score = rng.uniform(0.91, 1) if rng.random() < 0.9 else rng.uniform(0, 0.9)
            place = box(x + 7 * n, y + 3 * index, 100, 100)
            detection = Detection(clause["class"], score, place)
            right = rng.random() < 0.85
            COLOR_OF[id(detection)] = clause.get("color", "red") if right else "brown"
            detections.append(detection)
    for _ in range(rng.choice([0, 1, 20])):
        detection = Detection(rng.choice(names), rng.uniform(0, 0.3), box(1, 1))
        COLOR_OF[id(detection)] = "white"
        detections.append(detection)
    ALIVE.extend(detections)
    rng.shuffle(detections)
    return detections


def test_the_public_signature():
    assert list(inspect.signature(evaluate_detections).parameters) == [
        "metadata",
        "detections",
        "classify_colors",
    ]


# --- by hand ------------------------------------------------------------------------------------


def box(center_x, center_y, width=2.0, height=2.0):
    return (
        center_x - width / 2,
        center_y - height / 2,
        center_x + width / 2,
        center_y + height / 2,
    )


def red(detections):
    return ["red"] * len(detections)


def no_color(detections):
    raise AssertionError("the rules asked for a colour that no clause names")


def one(label, **more):
    return {"class": label, "count": 1, **more}


@pytest.mark.parametrize(
    ("tag", "score", "correct"),
    [
        ("single_object", 0.3, False),
        ("single_object", 0.3001, True),
        ("counting", 0.9, False),
        ("counting", 0.9001, True),
        ("counting", 0.5, False),
    ],
)
def test_a_score_must_exceed_the_threshold(tag, score, correct):
    metadata = {"tag": tag, "include": [one("dog")]}
    result = evaluate_detections(metadata, [Detection("dog", score, box(0, 0))], no_color)
    assert result.correct is correct


def test_at_most_16_of_a_class_are_looked_at():
    dogs = [Detection("dog", 0.95, box(i, 0)) for i in range(30)]
    metadata = {"tag": "counting", "include": [{"class": "dog", "count": 17}]}
    result = evaluate_detections(metadata, dogs, no_color)
    assert not result.correct
    assert "16" in result.reason
    assert result.soft == pytest.approx(16 / 17)
    metadata = {
        "tag": "counting",
        "include": [{"class": "dog", "count": 16}],
        "exclude": [{"class": "dog", "count": 17}],
    }
    assert evaluate_detections(metadata, dogs, no_color).correct


def test_only_the_best_detections_are_asked_for_their_color():
    best = Detection("dog", 0.9, box(0, 0))
    second = Detection("dog", 0.8, box(5, 0))
    metadata = {"tag": "colors", "include": [one("dog", color="red")]}

    def classify_by_place(detections):
        return ["red" if d is best else "blue" for d in detections]

    assert evaluate_detections(metadata, [second, best], classify_by_place).correct
    metadata = {"tag": "colors", "include": [one("dog", color="blue")]}
    result = evaluate_detections(metadata, [second, best], classify_by_place)
    assert not result.correct
    assert "blue" in result.reason
    assert "red" in result.reason


def test_of_equal_scores_the_later_one_comes_first_as_in_the_official_script():
    # argsort()[::-1] turns equal elements round.
    first, later = Detection("dog", 0.5, box(0, 0)), Detection("dog", 0.5, box(10, 0))
    metadata = {"tag": "colors", "include": [one("dog", color="red")]}

    def classify_by_place(detections):
        return ["red" if d is later else "blue" for d in detections]

    assert evaluate_detections(metadata, [first, later], classify_by_place).correct
    assert not evaluate_detections(metadata, [later, first], classify_by_place).correct


@pytest.mark.parametrize(("found", "correct"), [(2, False), (3, True), (4, False)])
def test_exclude_makes_more_objects_than_asked_wrong(found, correct):
    metadata = {
        "tag": "counting",
        "include": [{"class": "dog", "count": 3}],
        "exclude": [{"class": "dog", "count": 4}],
    }
    dogs = [Detection("dog", 0.95, box(3 * i, 0)) for i in range(found)]
    assert evaluate_detections(metadata, dogs, no_color).correct is correct


def test_without_exclude_more_objects_than_asked_are_right_but_not_for_the_server():
    metadata = {"tag": "single_object", "include": [one("dog")]}
    dogs = [Detection("dog", 0.95, box(3 * i, 0)) for i in range(3)]
    assert evaluate_detections(metadata, dogs, no_color).correct
    assert not evaluate_like_flow_grpo(metadata, dogs, no_color).correct
    assert evaluate_detections(metadata, dogs, no_color).soft == pytest.approx(1 - 2 / 1)


def test_the_server_does_not_look_at_exclude():
    metadata = {"tag": "two_object", "include": [one("dog")], "exclude": [one("cup")]}
    found = [Detection("dog", 0.9, box(0, 0)), Detection("cup", 0.9, box(5, 0))]
    assert not evaluate_detections(metadata, found, no_color).correct
    assert evaluate_like_flow_grpo(metadata, found, no_color).correct


POSITION = {"tag": "position", "include": [one("bench"), one("dog", position=["left of", 0])]}


@pytest.mark.parametrize(
    ("dog", "relation", "correct"),
    [
        # Boxes 2 wide: the margin is 0.1 * (2 + 2) = 0.4; benches stand at the origin.
        ((-1, 0), "left of", True),  # 0.6 of 1.0 is left over
        ((-0.8, 0), "left of", False),  # 0.4 of 0.8 = 0.5 does not exceed 0.5
        ((-0.81, 0), "left of", True),
        ((-0.3, 0), "left of", False),  # nothing is left over
        ((1, 0), "left of", False),
        ((1, 0), "right of", True),
        ((0, -1), "above", True),  # y grows downward
        ((0, 1), "below", True),
        ((0, 1), "above", False),
        ((-10, -10), "left of", True),  # 9.6 / 14.14 = 0.68 along both axes
        ((-10, -10), "above", True),
        ((-5, -10), "left of", False),  # 4.6 / 11.2 = 0.41
        ((-5, -10), "above", True),
        ((0, 0), "left of", False),  # the same place: no relation at all
    ],
)
def test_position(dog, relation, correct):
    metadata = {"tag": "position", "include": [one("bench"), one("dog", position=[relation, 0])]}
    found = [Detection("bench", 0.9, box(0, 0)), Detection("dog", 0.9, box(*dog))]
    result = evaluate_detections(metadata, found, no_color)
    assert result.correct is correct
    assert result.soft == pytest.approx(1.0 if correct else 2 / 3)
    quirky = evaluate_like_flow_grpo(metadata, found, no_color)
    assert quirky.soft == pytest.approx(1.0 if correct else 3 / 4)


def test_position_with_the_target_missing():
    result = evaluate_detections(POSITION, [Detection("dog", 0.9, box(-5, 0))], no_color)
    assert not result.correct
    assert "no target for dog" in result.reason
    assert result.soft == pytest.approx((0 + 1 + 0) / 3)
    # Here the server has no quirk: it appends one 0.
    quirky = evaluate_like_flow_grpo(POSITION, [Detection("dog", 0.9, box(-5, 0))], no_color)
    assert quirky.soft == pytest.approx(1 / 3)


def test_position_is_measured_from_a_target_of_the_right_color_only():
    metadata = {
        "tag": "position",
        "include": [one("bench", color="blue"), one("dog", position=["left of", 0])],
    }
    found = [Detection("bench", 0.9, box(0, 0)), Detection("dog", 0.9, box(-5, 0))]
    result = evaluate_detections(metadata, found, red)
    assert not result.correct
    assert "no target" in result.reason
    assert result.soft == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_position_is_not_looked_at_when_the_color_is_wrong():
    metadata = {
        "tag": "position",
        "include": [one("bench"), one("dog", color="blue", position=["left of", 0])],
    }
    found = [Detection("bench", 0.9, box(0, 0)), Detection("dog", 0.9, box(5, 0))]
    result = evaluate_detections(metadata, found, red)
    assert "left of" not in result.reason
    assert result.soft == pytest.approx((1 + 1 + 0) / 3)


def test_every_pair_must_stand_in_the_relation():
    metadata = {
        "tag": "position",
        "include": [
            {"class": "bench", "count": 2},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
    }
    bench = [Detection("bench", 0.9, box(0, 0)), Detection("bench", 0.8, box(-20, 0))]
    between, outside = Detection("dog", 0.9, box(-10, 0)), Detection("dog", 0.9, box(-40, 0))
    assert not evaluate_detections(metadata, [*bench, between], no_color).correct
    assert evaluate_detections(metadata, [*bench, outside], no_color).correct


def test_two_clauses_of_one_class_both_look_at_the_same_best_detection():
    # The official script's clauses are independent of one another.
    metadata = {"tag": "color_attr", "include": [one("dog", color="red"), one("dog", color="red")]}
    assert evaluate_detections(metadata, [Detection("dog", 0.9, box(0, 0))], red).correct


def test_nothing_found_and_a_class_nobody_asked_for():
    metadata = {"tag": "two_object", "include": [one("dog"), {"class": "cup", "count": 2}]}
    result = evaluate_detections(metadata, [Detection("vase", 1.0, box(0, 0))], no_color)
    assert (result.correct, result.soft) == (False, 0.0)
    assert len(result.reason.splitlines()) == 2


def test_colors_are_asked_for_once_per_set_of_detections():
    calls = []

    def counted(detections):
        calls.append(len(detections))
        return ["red"] * len(detections)

    metadata = {"tag": "colors", "include": [one("dog", color="red")]}
    evaluate_detections(metadata, [Detection("dog", 0.9, box(0, 0))], counted)
    assert calls == [1]


def test_a_classifier_that_loses_a_detection_is_refused():
    metadata = {"tag": "colors", "include": [one("dog", color="red")]}
    with pytest.raises(RewardError, match="0 colours for 1"):
        evaluate_detections(metadata, [Detection("dog", 0.9, box(0, 0))], lambda found: [])


def test_extra_objects():
    include = [{"class": "dog", "count": 2}, one("cup", color="red"), one("cup", color="blue")]
    metadata = {"tag": "two_object", "include": include}

    def found(**counts):
        return [Detection(k, 0.8, box(3 * i, 0)) for k, n in counts.items() for i in range(n)]

    assert extra_objects(metadata, found(dog=2, cup=2)) == 0
    assert extra_objects(metadata, found(dog=1)) == 0  # what is missing makes up for nothing
    assert extra_objects(metadata, found(dog=1, cup=3)) == 1
    assert extra_objects(metadata, found(dog=3, cup=4, vase=2)) == 5
    assert extra_objects(metadata, [Detection("vase", 0.3, box(0, 0))]) == 0
    # The counting task trusts only scores above 0.9.
    assert extra_objects({**metadata, "tag": "counting"}, found(vase=2)) == 0
