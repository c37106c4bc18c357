"""Suites that ask questions about pictures: rules by hand, and policies that cannot answer."""

import base64
import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from cli.eval import summary
from common.errors import DataError
from evals.report import build_report
from evals.results import load_results
from evals.run import evaluate
from evals.suites import load_suite, task_of
from evals.suites.mmbench import orders
from evals.suites.questions import mmmu_open, parse_choice, vqa_accuracy, vqa_normal


class Reader:
    """Answers by the colour of the picture and the question; draws nothing."""

    def __init__(self, answer) -> None:
        self.config = SimpleNamespace(steps=1, guidance=1.0)
        self.answer_with = answer
        self.asked: list[tuple[tuple[int, int], str]] = []

    def answer(self, image: Image.Image, question: str) -> str:
        self.asked.append((image.size, question))
        return self.answer_with(image.getpixel((0, 0)), question)


class Drawer:
    """A policy that only draws."""

    config = SimpleNamespace(steps=1, guidance=1.0)

    def generate(self, prompts, **how):
        raise AssertionError("nothing is to be drawn")


def png(color: str, size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


# --- the rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat.", "cat"),
        ("Two  dogs!", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),  # commas go before anything else
        ("3.5", "3.5"),  # a point between digits stays
        ("v. 2", "v 2"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # one apostrophe at a time
        ("couldnt've", "couldn't've"),
        ("Joe's", "joe 's"),
        ("red/blue", "red blue"),
        ("red /blue", "red blue"),
        ("rock - n - roll", "rock n roll"),
        ("A an THE", ""),
    ],
)
def test_answers_are_normalised_as_vqa_does(answer: str, normal: str) -> None:
    assert vqa_normal(answer) == normal


@pytest.mark.parametrize(
    ("said", "accuracy"),
    # One of ten agrees: 1/3 against nine sets of nine, 0 against the one without it: 0.3.
    # Two: 8 x 2/3 + 2 x 1/3 = 6 of 10. Three: 7 x 1 + 3 x 2/3 = 9 of 10. Four: all ten full.
    [("one", 0.3), ("two", 0.6), ("three", 0.9), ("four", 1.0), ("none of them", 0.0)],
)
def test_vqa_accuracy_of_ten_people(said: str, accuracy: float) -> None:
    people = ["one"] + ["two"] * 2 + ["three"] * 3 + ["four"] * 4
    assert vqa_accuracy(said, people) == pytest.approx(accuracy)
    assert vqa_accuracy(f"The {said.upper()}.", people) == pytest.approx(accuracy)


CHOICES = ["a red car", "two dogs", "the sea", "nothing"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is (A), not (D).", "D"),  # the last one counts
        ("I first thought A but it is B", "B"),
        ("(C) rather than B", "C"),  # brackets come before bare letters
        ("D. nothing at all", "D"),
        ("I can clearly see two dogs there", "B"),
        ("two dogs", None),  # the text of a choice counts in longer answers alone
        ("It is hard to say from here", None),
        ("", None),
    ],
)
def test_choices_are_read_as_mmmu_does(answer: str, letter: str | None) -> None:
    assert parse_choice(answer, CHOICES) == letter


@pytest.mark.parametrize(
    ("answer", "right", "holds"),
    [
        ("The answer is 4.17", ["4.17"], True),
        ("so x = 1,000.004", ["1000"], True),  # equal to two decimals
        ("x = 41.7", ["4.17"], False),
        ("It is the mitochondria", ["Mitochondria"], True),
        ("chloroplast", ["mitochondria"], False),
        ("Therefore 1/24 it is", ["1/24", "4.17%"], True),
        ("It is 3\nthus 7", ["7"], True),
        ("The answer is \n7", ["7"], False),  # the official script keeps "is" of the first line
        ("the result is banana", ["a"], False),  # a single letter has to stand at a space
        ("the result is vitamin a", ["a"], True),
    ],
)
def test_open_answers_are_judged_as_mmmu_does(answer: str, right: list[str], holds: bool) -> None:
    assert mmmu_open(answer, right) is holds


def test_mmbench_moves_every_choice_through_every_place() -> None:
    turned = orders(["w", "x", "y"], "B")
    assert turned == [(["w", "x", "y"], "B"), (["y", "w", "x"], "C"), (["x", "y", "w"], "A")]
    assert all(choices["ABC".index(letter)] == "x" for choices, letter in turned)


# --- the suites -----------------------------------------------------------------------------------


def test_textvqa(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name, color in (("x", "red"), ("y", "blue")):
        Image.new("RGB", (30, 20), color).save(tmp_path / "p" / f"{name}.jpg", quality=100)
    rows = [
        {"question": "what is written?", "question_id": n, "image_id": name,
         "answers": ["stop"] * 3 + ["go"] * 7}
        for n, name in ((34602, "x"), (34603, "y"))
    ]  # fmt: skip
    (tmp_path / "q.json").write_text(json.dumps({"data": rows}))
    suite = load_suite(
        "textvqa", options={"questions": str(tmp_path / "q.json"), "images": str(tmp_path / "p")}
    )
    reader = Reader(lambda pixel, question: "Stop." if pixel[0] > 200 else "north")
    results = evaluate(reader, suite, tmp_path / "r", seeds=1, weights="w")
    assert results["published"] == {"overall": 45.0, "textvqa": 45.0}  # 0.9 and 0
    assert all("what is written?" in text and size == (30, 20) for size, text in reader.asked)
    samples = load_results(tmp_path / "r").samples
    assert [s["details"]["answers"] for s in samples] == [["Stop."], ["north"]]
    with Image.open(tmp_path / "r" / samples[1]["image"]) as kept:
        assert kept.convert("RGB").getpixel((0, 0))[2] > 200  # the picture asked about
    assert "2 questions instead of 5000" in suite.not_comparable


@pytest.fixture
def mmbench(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "MMBench_DEV_EN.tsv"
    picture = base64.b64encode(png("red")).decode()
    with file.open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t")
        table.writerow(
            ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
        )
        table.writerow([7, "How many?", "nan", "one", "two", "three", "", "B", "count", picture])
        table.writerow([8, "Which?", "look left", "cat", "dog", "", "", "A", "name", picture])
        table.writerow([9, "Which?", "", "up", "down", "", "", "B", "name", "8"])  # 8's picture
        table.writerow([1000007, "How many?", "", "two", "three", "one", "", "A", "count", "7"])
    return {"data": str(file)}


def choice_of(question: str, text: str) -> str:
    """The letter in front of a choice."""
    return next(line[0] for line in question.splitlines() if line[3:] == text)


def test_mmbench_counts_a_question_that_is_right_in_every_order(
    mmbench: dict[str, str], tmp_path: Path
) -> None:
    suite = load_suite("mmbench", options=mmbench)
    assert [task_of(r) for r in suite.records] == ["count", "name", "name"]  # no turned copy
    assert suite.records[1]["questions"][0].startswith("look left\nWhich?\nA. cat\nB. dog")

    def knows(pixel, question: str) -> str:
        return choice_of(question, "two") if "How many" in question else "A"

    reader = Reader(knows)
    results = evaluate(reader, suite, tmp_path / "r", seeds=1, weights="w")
    assert len(reader.asked) == 3 + 2 + 2
    # the second says A whatever the order: right at first, but not in every order
    values = [s["values"] for s in load_results(tmp_path / "r").samples]
    assert values == [
        {"circular": 1, "vanilla": 1},
        {"circular": 0, "vanilla": 1},
        {"circular": 0, "vanilla": 0},
    ]
    assert results["published"] == pytest.approx(
        {"overall": 100 / 3, "count": 100, "name": 0}, abs=1e-4
    )
    assert "none of the published files" in suite.not_comparable


def test_seed_bench(tmp_path: Path) -> None:
    (tmp_path / "1454426_2591111986").write_bytes(png("green"))
    row = {"answer": "A", "choice_a": "One", "choice_b": "Two", "choice_c": "Three",
           "choice_d": "Four", "data_id": "1454426_2591111986", "data_type": "image",
           "question": "How many?", "question_id": "101669", "question_type_id": 5}  # fmt: skip
    rows = [row, row | {"question_id": "2", "answer": "C", "question_type_id": 1},
            row | {"question_id": "3", "data_type": "video"}]  # fmt: skip
    kinds = {"Scene Understanding": 1, "Instances Counting": 5}
    (tmp_path / "q.json").write_text(json.dumps({"question_type": kinds, "questions": rows}))
    options = {"questions": str(tmp_path / "q.json"), "images": str(tmp_path)}
    suite = load_suite("seed-bench", options=options)
    results = evaluate(Reader(lambda *_: "A"), suite, tmp_path / "r", seeds=1, weights="w")
    assert results["published"] == {
        "overall": 50.0, "Instances Counting": 100.0, "Scene Understanding": 0.0,
    }  # fmt: skip
    (tmp_path / "q.json").write_text("{}")
    with pytest.raises(DataError, match=r"not SEED-Bench\.json"):
        load_suite("seed-bench", options=options)


@pytest.fixture
def mmmu(tmp_path: Path) -> dict[str, str]:
    def row(name: str, kind: str, options: list, answer: str, *pictures: str):
        filled = {f"image_{n}": {"bytes": png(x), "path": ""} for n, x in enumerate(pictures, 1)}
        return {
            "id": f"validation_{name}",
            "question": "What is in <image 1>?",
            "options": str(options),
            "answer": answer,
            "question_type": kind,
            **dict.fromkeys(f"image_{n}" for n in range(1, 8)),
            **filled,
        }

    rows = [
        row("Art_Theory_1", "multiple-choice", ["a cat", "a dog"], "B", "red"),
        row("Art_Theory_2", "multiple-choice", ["a cat", "a dog"], "A", "red"),
        row("Math_3", "open", [], "['1/24', '4.17']", "red"),
        row("Math_4", "multiple-choice", ["<image 2>", "y"], "A", "red", "blue"),
    ]
    (tmp_path / "Math").mkdir()
    file = tmp_path / "Math" / "validation-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return {"data": str(tmp_path)}


def mmmu_answer(pixel, question: str) -> str:
    assert "<image" not in question
    return "(B)" if "A. a cat" in question else "The result is 4.17"


def test_mmmu_leaves_what_a_policy_cannot_be_asked_without_a_score(
    mmmu: dict[str, str], tmp_path: Path
) -> None:
    suite = load_suite("mmmu", options=mmmu)
    assert [task_of(r) for r in suite.records] == ["Art_Theory", "Art_Theory", "Math", "Math"]
    results = evaluate(Reader(mmmu_answer), suite, tmp_path / "r", seeds=1, weights="w")
    assert results["published"] == pytest.approx(
        {"overall": 200 / 3, "Art_Theory": 50, "Math": 100}, abs=1e-4
    )
    last = load_results(tmp_path / "r").samples[-1]
    assert last["values"] == {"accuracy": None}
    assert last["reason"] == (
        "not supported: asked about 2 pictures, and the policy answers about one"
    )
    assert results["unscored"] == {"accuracy": 1}
    # an answer that names no choice is a draw, the same one every time
    drawn = [suite.score(["no idea"], record).values["accuracy"] for record in suite.records[:2]]
    assert drawn == [suite.score(["?"], record).values["accuracy"] for record in suite.records[:2]]
    assert "4 questions instead of 900" in suite.not_comparable


def test_mmmu_asks_about_several_pictures_where_it_can(
    mmmu: dict[str, str], tmp_path: Path
) -> None:
    class Comparer(Reader):
        def answer_about(self, images, question: str) -> str:
            assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]
            assert "in picture 1?\nA. picture 2\nB. y" in question
            return "A"

    suite = load_suite("mmmu", options=mmmu)
    results = evaluate(Comparer(mmmu_answer), suite, tmp_path / "r", seeds=1, weights="w")
    assert results["published"] == {"overall": 75.0, "Art_Theory": 50.0, "Math": 100.0}


# --- a policy that cannot answer ------------------------------------------------------------------


def test_a_policy_that_answers_nothing_is_not_supported_and_never_zero(
    mmbench: dict[str, str], tmp_path: Path
) -> None:
    suite = load_suite("mmbench", options=mmbench)
    results = evaluate(Drawer(), suite, tmp_path / "r", seeds=1, weights="w")
    assert results["not_supported"] == "the policy answers no questions"
    assert results["overall"] == {"circular": None, "vanilla": None}
    assert results["unscored"] == {"circular": 3, "vanilla": 3}
    assert "published" not in results
    assert summary(results)[1:] == ["  not supported: the policy answers no questions"]
    page = build_report([tmp_path / "r"], tmp_path / "report")
    assert ">not supported<" in page.read_text()
    assert "| not supported |" in (page.parent / "report.md").read_text()


def test_our_policy_says_that_it_is_not_supported(policy, mmbench: dict, tmp_path: Path) -> None:
    """The published model has no template for questions, so `Policy` has no `answer`."""
    suite = load_suite("mmbench", options=mmbench)
    assert "not_supported" in evaluate(policy, suite, tmp_path / "r", seeds=1, weights="w")
