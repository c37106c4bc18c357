"""Suites that a vision-language model judges: their formulas by hand, their requests over HTTP."""

import base64
import io
import json
from math import sqrt
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from judge_server import Server
from PIL import Image
from pyarrow import parquet

from common.errors import DataError, UsageError
from evals.results import load_results
from evals.run import evaluate
from evals.suites import load_suite, task_of
from evals.suites.gedit import viescore
from evals.suites.imgedit import parse_marks
from evals.suites.wise import wiscore


class Painter:
    """An editor that paints everything grey."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(steps=1, guidance=1.0, edit_template="{prompt}{references}")
        self.sizes: list[tuple[int, ...]] = []

    def generate(self, prompts, *, steps, guidance, temperature, seeds, references=None):
        if references is not None:
            self.sizes += [tuple(picture.shape[-2:]) for picture in references]
        return [Image.new("RGB", (16, 16), "grey") for _ in prompts]


@pytest.fixture
def server():
    with Server() as running:
        yield running
        running.shutdown()


def judge(server: Server, answer, model: str = "judge-7b") -> dict[str, str]:
    """Let the server answer each request by its text; return the judge's options."""
    server.say = lambda number: (200, answer(said(server.requests[number - 1])))
    return {"base_url": server.url, "model": model, "retries": "0"}


def said(request: dict) -> str:
    return request["messages"][0]["content"][0]["text"]


# --- ImgEdit ------------------------------------------------------------------------------------


@pytest.fixture
def imgedit(tmp_path: Path) -> dict[str, str]:
    pictures = tmp_path / "pictures"
    for number, size in enumerate([(20, 30), (30, 20), (20, 30)]):
        (pictures / "animal").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(pictures / "animal" / f"{number}.jpg")
    rows = {
        "1082": {"id": "animal/0.jpg", "prompt": "Smooth the shell.", "edit_type": "adjust"},
        "1068": {"id": "animal/1.jpg", "prompt": "Darken the fur.", "edit_type": "adjust"},
        "673": {"id": "animal/2.jpg", "prompt": "Make it ukiyo-e.", "edit_type": "style"},
    }
    texts = {kind: f"Mark this {kind}: <edit_prompt>" for kind in ("adjust", "style")}
    (tmp_path / "basic_edit.json").write_text(json.dumps(rows))
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    return {
        "edits": str(tmp_path / "basic_edit.json"),
        "images": str(pictures),
        "questions": str(tmp_path / "prompts.json"),
    }


ANSWERS = {  # the published examples of answers and their averages
    "Smooth the shell.": "Brief reasoning: none.\nPrompt Compliance: 1\nVisual Seamlessness: 1\n"
    "Physical & Detail Fidelity: 1",
    "Darken the fur.": "Brief reasoning: wrong.\nPrompt Compliance: 1\nVisual Seamlessness: 4\n"
    "Physical & Detail Fidelity: 4",
    "Make it ukiyo-e.": "Brief reasoning: a.\nStyle Fidelity: 1\nContent Preservation: 5\n"
    "Rendering Quality: 5",
}


def test_imgedit_means_over_marks_then_types(imgedit, server: Server, tmp_path: Path) -> None:
    options = judge(server, lambda text: ANSWERS[text.partition(": ")[2]], "gpt-4o")
    suite = load_suite("imgedit", options=imgedit | options)
    painter = Painter()
    results = evaluate(painter, suite, tmp_path / "r", seeds=1, weights="w")
    scores = {r["prompt"]: r["values"]["score"] for r in load_results(tmp_path / "r").samples}
    assert scores == {"Smooth the shell.": 1, "Darken the fur.": 3, "Make it ukiyo-e.": 3.67}
    assert results["published"] == {"overall": pytest.approx(2.835), "adjust": 2, "style": 3.67}
    assert results["overall"]["score"]["mean"] == pytest.approx(2.835)
    assert sorted(painter.sizes) == [(20, 30), (30, 20), (30, 20)]  # height, width
    [asked] = [r for r in server.requests if said(r) == "Mark this adjust: Smooth the shell."]
    assert len(asked["messages"][0]["content"]) == 3  # the question, before, after
    assert "response_format" not in asked
    reason = results["suite"]["not_comparable"]
    assert "3 prompts instead of 737" in reason
    assert "no published checksum" in reason
    assert "judged by" not in reason  # gpt-4o is the published judge
    kept = load_suite("imgedit", options=imgedit | options | {"cache": str(tmp_path / "c")})
    assert (kept.settings["judge_model"], kept.settings["cache"]) == ("gpt-4o", "any")
    other = load_suite("imgedit", options=imgedit | options | {"model": "judge-7b"})
    assert "judged by judge-7b, not by gpt-4o or gpt-4.1" in other.not_comparable


@pytest.mark.parametrize(
    "text", ["", "A: 1\nB: 2", "A: 1\nB: 2\nC: 6", "A: 1\nB: 2\nC: 3\nD: 4", "A: 0\nB: 2\nC: 3"]
)
def test_an_imgedit_answer_without_three_marks_is_no_score(text: str) -> None:
    assert parse_marks(text) is None


def test_a_judge_that_gives_no_marks_leaves_the_edit_unscored(imgedit, server: Server) -> None:
    suite = load_suite("imgedit", options=imgedit | judge(server, lambda text: "I like it."))
    told = suite.score(Image.new("RGB", (4, 4)), suite.records[0])
    assert told.values == {"score": None}
    assert "not of the form asked for: 'I like it.'" in told.reason


def test_imgedit_files_that_do_not_fit_are_named(imgedit, server: Server) -> None:
    options = imgedit | judge(server, str)
    Path(imgedit["questions"]).write_text('{"style": "x"}')
    with pytest.raises(DataError, match="no question for edits of type 'adjust'"):
        load_suite("imgedit", options=options)
    with pytest.raises(UsageError, match="the judge needs the option `model`"):
        load_suite("imgedit", options={k: v for k, v in options.items() if k != "model"})


# --- GEdit --------------------------------------------------------------------------------------


@pytest.fixture
def gedit(tmp_path: Path) -> dict[str, str]:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(buffer, "PNG")
    rows = [
        # (group, instruction, language, intersection)
        ("color_alter", "make it blue", "en", True),
        ("color_alter", "make it green", "en", False),
        ("ps_human", "slim the face", "en", True),
        ("ps_human", "瘦脸", "cn", True),
    ]
    table = [
        {
            "key": f"k{number}",
            "task_type": group,
            "instruction": text,
            "instruction_language": language,
            "input_image_raw": {"bytes": buffer.getvalue(), "path": None},
            "Intersection_exist": shared,
        }
        for number, (group, text, language, shared) in enumerate(rows)
    ]
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "data" / "train-0.parquet")
    return {"data": str(tmp_path / "data")}


MARKS = {"make it blue": [8, 9], "make it green": [2, 10], "slim the face": [0, 7]}


def test_gedit_is_the_root_of_the_lower_marks_meaned_over_groups(
    gedit, server: Server, tmp_path: Path
) -> None:
    def answer(text: str) -> str:
        found = [marks for instruction, marks in MARKS.items() if instruction in text]
        return json.dumps({"score": found[0] if found else [5, 4], "reason": "so"})

    suite = load_suite("gedit", options=gedit | judge(server, answer))
    assert [task_of(r) for r in suite.records] == ["color_alter", "color_alter", "ps_human"]
    results = evaluate(Painter(), suite, tmp_path / "r", seeds=1, weights="w")
    # semantic: 8, 2 and 0; quality 4 throughout
    blue, green, face = sqrt(8 * 4), sqrt(2 * 4), 0.0
    assert results["published"] == pytest.approx(
        {
            "G_SC": ((8 + 2) / 2 + 0) / 2,
            "G_PQ": 4,
            "G_O": ((blue + green) / 2 + face) / 2,
            "G_SC, intersection": (8 + 0) / 2,
            "G_PQ, intersection": 4,
            "G_O, intersection": (blue + face) / 2,
        },
        abs=1e-5,
    )
    assert results["overall"]["overall"]["mean"] == pytest.approx(
        ((blue + green) / 2 + face) / 2, abs=1e-5
    )
    # both pictures as wide as high as the one to edit, at 512 x 512 pixels' area
    sent = [part["image_url"]["url"] for part in server.requests[0]["messages"][0]["content"][1:]]
    sizes = {Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size for url in sent}
    assert sizes == {(627, 418)}  # 512 sqrt(3/2), 512 / sqrt(3/2)
    # two questions for each edit: both pictures with the instruction, the edited one alone
    assert sorted(len(r["messages"][0]["content"]) for r in server.requests) == [2] * 3 + [3] * 3
    chinese = load_suite("gedit", options=gedit | judge(server, answer) | {"language": "cn"})
    assert [r["prompt"] for r in chinese.records] == ["瘦脸"]
    assert chinese.name == "gedit-cn"  # its own suite: the languages are never compared
    with pytest.raises(UsageError, match="language=en or language=cn"):
        load_suite("gedit", options=gedit | judge(server, answer) | {"language": "de"})


@pytest.mark.parametrize("marks", [[5], [5, 11], [5, "4"], [5, True], 5, None, [1, 2, 3]])
def test_a_gedit_answer_without_two_marks_is_no_score(marks) -> None:
    told = viescore([{"score": [5, 5]}, {"score": marks}], "")
    assert set(told.values.values()) == {None}


def test_a_damaged_parquet_file_is_named(gedit, server: Server) -> None:
    (Path(gedit["data"]) / "train-0.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match=r"train-0\.parquet cannot be read"):
        load_suite("gedit", options=gedit | judge(server, str))


# --- WISE ---------------------------------------------------------------------------------------


def test_wise_weighs_its_marks_and_means_over_prompts(server: Server, tmp_path: Path) -> None:
    rows = [
        {"prompt_id": 1, "Prompt": "A", "Explanation": "what A means"},
        {"prompt_id": 400, "Prompt": "B", "Explanation": "e"},
        {"prompt_id": 401, "Prompt": "C", "Explanation": "e"},
        {"prompt_id": 1000, "Prompt": "D", "Explanation": "e"},
    ]
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "one.json").write_text(json.dumps(rows))
    marks = {"A": (2, 2, 2), "B": (0, 1, 2), "C": (1, 0, 0), "D": (2, 0, 1)}

    def answer(text: str) -> str:
        [given] = [m for name, m in marks.items() if f"Prompt: {name}\n" in text]
        return json.dumps(dict(zip(("consistency", "realism", "aesthetic_quality"), given,
                                   strict=True)))  # fmt: skip

    options = {"prompts": str(tmp_path / "w"), **judge(server, answer)}
    suite = load_suite("wise", options=options)
    results = evaluate(Painter(), suite, tmp_path / "r", seeds=1, weights="w")
    # (0.7 c + 0.2 r + 0.1 a) / 2
    scores = {"A": 1.0, "B": 0.2, "C": 0.35, "D": 0.75}
    found = {r["prompt"]: r["values"]["wiscore"] for r in load_results(tmp_path / "r").samples}
    assert found == pytest.approx(scores)
    assert results["published"] == pytest.approx(
        {"overall": sum(scores.values()) / 4, "culture": 0.6, "time": 0.35, "chemistry": 0.75}
    )
    assert any("what A means" in said(r) for r in server.requests)
    assert "own words" in suite.not_comparable
    (tmp_path / "w" / "two.json").write_text('[{"prompt_id": 1001, "Prompt": "x"}]')
    with pytest.raises(DataError, match=r"two\.json: an entry is no prompt of WISE"):
        load_suite("wise", options=options)


@pytest.mark.parametrize("mark", [3, -1, "2", None, [1, 1]])
def test_a_wise_answer_with_a_wrong_mark_is_no_score(mark) -> None:
    told = wiscore([{"consistency": 1, "realism": mark, "aesthetic_quality": 0}], "")
    assert set(told.values.values()) == {None}
    assert "realism" in told.reason


def test_requests_of_all_threads_and_batches_count_together(
    gedit, server: Server, tmp_path
) -> None:
    marks = json.dumps({"score": [5, 5], "reason": "so"})
    options = gedit | judge(server, lambda text: marks) | {"concurrency": "2", "timeout_s": "10"}
    server.pause = 0.1
    suite = load_suite("gedit", options=options)
    results = evaluate(Painter(), suite, tmp_path / "r", seeds=2, weights="w", batch_size=3)
    assert results["unscored"]["overall"] == 0
    assert len(server.requests) == 2 * 6
    assert server.most_under_way == 2
