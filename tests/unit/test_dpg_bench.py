"""DPG-Bench: the official script's rules, by hand and against an independent reading of them."""

import asyncio
import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import Server
from PIL import Image

from cli.main import main
from common.errors import DataError, RunError
from evals.dpg_layout import export_dpg
from evals.results import load_results
from evals.run import evaluate
from evals.suites import load_suite
from evals.suites.dpg_bench import read_questions, zeroed
from rewards import load_reward

COLUMNS = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
    "category_detailed", "tuple", "question_natural_language",
)  # fmt: skip
ROWS = [
    # (item, prompt, id, dependency, tuple, question); the official script never reads the first
    ("p1", "a red car", 1, "0", "entity - whole (car)", "Is there a car?"),
    ("p1", "a red car", 2, "1", "attribute - color (car, red)", "Is the car red?"),
    ("p1", "a red car", 3, "0", "global - (photo)", "Is it a photo?"),
    ("p2", "a cat on a mat", 1, "0", "entity - whole (cat)", "Is there a cat?"),
    ("p2", "a cat on a mat", 2, "0", "entity - whole (mat)", "Is there a mat?"),
    ("p2", "a cat on a mat", 3, "1,2", "relation - spatial (cat, mat, on)", "Is it on the mat?"),
    ("p2", "a cat on a mat", 4, "3", "other - text (cat, x)", "Does it say x?"),
]
# What the judge sees in pictures of four grey levels: the questions answered yes.
SEEN = {
    10: ["Is the car red?", "Is it a photo?", "Is there a cat?", "Is there a mat?",
         "Is it on the mat?", "Does it say x?"],
    20: ["Is it a photo?", "Is there a mat?", "Is it on the mat?", "Does it say x?"],
    30: ["Is there a cat?", "Is there a mat?"],
    40: ["Is the car red?", "Does it say x?"],
}  # fmt: skip
JUDGE = f"""
SEEN = {SEEN!r}

def seen(images, prompts):
    return [float(q in SEEN[i.getpixel((0, 0))[0]]) for i, q in zip(images, prompts)]

def moody(images, prompts):
    return [None if "cat" in q else 1.0 for q in prompts]
"""


class Painter:
    """Paints the grey levels 10, 20, 30, 40 in turn, the first pixel saying which."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(steps=1, guidance=1.0)
        self.made = 0

    def generate(self, prompts, *, steps, guidance, temperature, seeds):
        levels = [10 * (1 + (self.made + i) % 4) for i in range(len(prompts))]
        self.made += len(prompts)
        return [Image.new("RGB", (4, 4), (level,) * 3) for level in levels]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    file = tmp_path / "dpg_bench.csv"
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        for item, text, number, dependency, what, question in ROWS:
            table.writerow([item, text, "", number, dependency, "", "", what, question])
    (tmp_path / "judge.py").write_text(JUDGE)
    return file


def suite_of(official: Path, judge: str = "seen"):
    place = f"{official.parent / 'judge.py'}:{judge}"
    return load_suite("dpg-bench", options={"csv": str(official), "judge": place})


def test_scores_are_the_official_script_s(official: Path, tmp_path: Path) -> None:
    suite = suite_of(official)
    results = evaluate(Painter(), suite, tmp_path / "r", seeds=4, weights="w")
    # p1 (questions 2 and 3; 1 is not read): 2/2, 1/2, 0/2, 1/2
    # p2: 4/4; without the cat only "mat" of 4 counts: 1/4; cat and mat: 2/4; neither: 0/4
    scores = {}
    for row in load_results(tmp_path / "r").samples:
        scores.setdefault(row["prompt_id"], []).append(row["values"]["dpg"])
    assert scores == {"p1": [1.0, 0.5, 0.0, 0.5], "p2": [1.0, 0.25, 0.5, 0.0]}
    assert results["overall"]["dpg"]["mean"] == pytest.approx((2 / 4 + 1.75 / 4) / 2)
    # categories: answers about the last picture, not zeroed, over questions
    assert results["published"] == pytest.approx(
        {
            "DPG-Bench": 100 * (2 / 4 + 1.75 / 4) / 2,
            "attribute": 100.0,
            "entity": 0.0,
            "global": 0.0,
            "other": 100.0,
            "relation": 0.0,
        }
    )
    assert suite.pictures == 4
    reason = results["suite"]["not_comparable"]
    assert "mPLUG-large" in reason
    assert "2 prompts instead of 1065" in reason
    assert "no published checksum" in reason


def test_a_changed_judge_is_another_evaluation(official: Path, tmp_path: Path) -> None:
    evaluate(Painter(), suite_of(official), tmp_path / "r", seeds=1, weights="w")
    judge = official.parent / "judge.py"
    judge.write_text(judge.read_text() + "\n# stricter\n")
    with pytest.raises(RunError, match="judge_source is 'seen of source"):
        evaluate(Painter(), suite_of(official), tmp_path / "r", seeds=1, weights="w")


def test_a_missing_answer_is_no_score(official: Path) -> None:
    suite = suite_of(official, "moody")
    told = suite.score(Image.new("RGB", (4, 4)), suite.records[1])
    assert told.values == {"dpg": None, "yes": None}
    assert "no answer to 'Is there a cat?'" in told.reason


@settings(max_examples=40)
@given(st.data())
def test_zeros_reach_every_descendant(data: st.DataObject) -> None:
    """Parents before children, as in the file: a question counts if it and all above it are yes."""
    size = data.draw(st.integers(1, 8))
    answers = {i: data.draw(st.sampled_from([0.0, 1.0])) for i in range(1, size + 1)}
    parents = {
        i: data.draw(st.lists(st.integers(1, i - 1), unique=True) if i > 1 else st.just([]))
        for i in answers
    }

    def holds(question: int) -> bool:
        return answers[question] == 1 and all(holds(parent) for parent in parents[question])

    assert zeroed(answers, parents) == {i: float(holds(i)) for i in answers}


def test_a_parent_later_in_the_file_is_looked_at_before_it_is_zeroed() -> None:
    """In file order and in place: 1 looks at 2 while 2 still counts."""
    assert zeroed({1: 1.0, 2: 1.0, 3: 0.0}, {1: [2], 2: [3], 3: []}) == {1: 1.0, 2: 0.0, 3: 0.0}


def test_a_damaged_file_is_named(official: Path) -> None:
    lines = official.read_text().splitlines()
    official.write_text("\n".join([*lines[:3], lines[3].replace(",3,0,", ",3,none,")]) + "\n")
    with pytest.raises(DataError, match=r"dpg_bench.csv: row 4"):
        read_questions(official)
    official.write_text("item_id,text\na,b\n")
    with pytest.raises(DataError, match="no column `proposition_id`"):
        read_questions(official)
    with pytest.raises(DataError, match="no such file"):
        read_questions(official.with_name("no.csv"))


def test_sheets_are_those_of_the_official_script(official: Path, tmp_path: Path, capsys) -> None:
    evaluate(Painter(), suite_of(official), tmp_path / "r", seeds=4, weights="w")
    assert main(["dpg", "export", str(tmp_path / "r"), str(tmp_path / "sheets")]) == 0
    assert "--resolution 4 --pic-num 4" in " ".join(capsys.readouterr().out.split())
    with Image.open(tmp_path / "sheets" / "p2.png") as sheet:
        assert sheet.size == (8, 8)
        corners = [(0, 0), (4, 0), (0, 4), (4, 4)]  # the order in which the script crops
        assert [sheet.getpixel(corner)[0] for corner in corners] == [10, 20, 30, 40]
    evaluate(Painter(), suite_of(official), tmp_path / "two", seeds=2, weights="w")
    with pytest.raises(RunError, match="has not 4 pictures"):
        export_dpg(load_results(tmp_path / "two"), tmp_path / "other")


# --- the judge behind an endpoint ---------------------------------------------------------------


def test_yes_and_no_from_an_endpoint() -> None:
    with Server() as server:
        said = iter(['{"answer": "yes"}', '{"answer": "No."}', '{"answer": "perhaps"}'])
        server.say = lambda number: (200, next(said))
        judge = load_reward("yes_no", base_url=server.url, model="vqa", concurrency=1)
        picture = Image.new("RGB", (4, 4))
        scores = asyncio.run(judge([picture] * 3, ["Is {it} red?", "b", "c"]))
        server.shutdown()
    assert [score.value for score in scores] == [1.0, 0.0, None]
    assert "neither yes nor no" in scores[2].reason
    assert "Is {it} red?" in server.requests[0]["messages"][0]["content"][0]["text"]
