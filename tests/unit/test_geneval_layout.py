"""The official GenEval script's folders and output: written as it reads, read as it writes."""

import json
import re
from pathlib import Path

import pytest
from eval_stand_in import StandInPolicy, toy_suite
from PIL import Image

from cli.main import main
from common.errors import DataError, RunError
from evals.compare import compare
from evals.geneval_layout import export_geneval, import_geneval, suite_judged_by_the_script
from evals.results import load_results
from evals.run import evaluate

OFFICIAL = Path(__file__).parents[3] / "shared" / "geneval" / "evaluation_metadata.jsonl"


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    suite = toy_suite(6)
    folder = tmp_path / "a"
    evaluate(StandInPolicy(suite.records, 0.4), suite, folder, seeds=2, weights="w")
    return folder


def judge_like_the_script(layout: Path, out: Path, right: bool = True) -> None:
    """Write rows as evaluate_images.py does, in the order in which a disk may list folders."""
    rows = []
    for folder in sorted(layout.iterdir(), reverse=True):
        assert folder.name.isdigit()
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        for picture in (folder / "samples").iterdir():
            assert re.match(r"\d+\.png", picture.name)
            rows.append(
                {
                    "filename": str(picture),
                    "tag": metadata["tag"],
                    "prompt": metadata["prompt"],
                    "correct": right,
                    "reason": "" if right else "expected circle>=1, found 0",
                    "metadata": json.dumps(metadata),
                    "details": json.dumps({"circle": [[1.0, 2.0, 11.0, 12.0, 0.97]]}),
                }
            )
    out.write_text("\n".join(map(json.dumps, rows)))  # without a last newline


def test_the_layout_is_the_official_one(evaluated: Path, tmp_path: Path) -> None:
    result = load_results(evaluated)
    assert export_geneval(result, tmp_path / "layout") == 12
    records = toy_suite(6).records
    folders = sorted(path.name for path in (tmp_path / "layout").iterdir())
    assert folders == [f"{i:05d}" for i in range(6)]
    for number, record in enumerate(records):
        folder = tmp_path / "layout" / f"{number:05d}"
        [line] = (folder / "metadata.jsonl").read_text().splitlines()
        assert json.loads(line) == record["metadata"] | {"prompt": record["prompt"]}
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png"]
    for sample in result.samples:
        number = [r["prompt_id"] for r in records].index(sample["prompt_id"])
        png = tmp_path / "layout" / f"{number:05d}" / "samples" / f"{sample['index']:04d}.png"
        with Image.open(png) as exported, Image.open(evaluated / sample["image"]) as own:
            assert exported.convert("RGB").tobytes() == own.convert("RGB").tobytes()


def test_verdicts_come_back_to_their_pictures(evaluated: Path, tmp_path: Path) -> None:
    export_geneval(load_results(evaluated), tmp_path / "layout")
    judge_like_the_script(tmp_path / "layout", tmp_path / "verdicts.jsonl")
    results = import_geneval(tmp_path / "verdicts.jsonl", tmp_path / "back")
    # made for another suite, so not GenEval, and judged by another judge than its own results
    assert results["suite"]["name"] == "toy-scenes"
    assert results["suite"]["title"] == "toy-scenes, judged by GenEval's own script"
    with pytest.raises(RunError, match="judged differently: judge is None there and 'evaluate_im"):
        compare(evaluated, tmp_path / "back")
    assert results["policy"] == {"name": "back", "hash": "w"}
    assert results["overall"]["strict"]["mean"] == 1.0
    assert results["suite"]["not_comparable"] == "these are not the prompts of GenEval"
    ours = {(s["prompt_id"], s["index"]): s for s in load_results(evaluated).samples}
    back = load_results(tmp_path / "back").samples
    assert len(back) == 12
    for sample in back:
        own = ours[sample["prompt_id"], sample["index"]]
        assert sample["seed"] == own["seed"]
        assert sample["prompt"] == own["prompt"]
        [found] = sample["details"]["objects"]
        assert found == {"label": "circle", "color": None, "score": 0.97, "box": [1, 2, 11, 12]}
        assert sample["details"]["size"] == [48, 48]


def test_two_imports_can_be_compared_and_reported(evaluated: Path, tmp_path: Path) -> None:
    export_geneval(load_results(evaluated), tmp_path / "layout")
    for name, right in (("x", False), ("y", True)):
        judge_like_the_script(tmp_path / "layout", tmp_path / f"{name}.jsonl", right)
        import_geneval(tmp_path / f"{name}.jsonl", tmp_path / name)
    found = compare(tmp_path / "x", tmp_path / "y")
    assert found["overall"]["mean"] == 1.0
    words = ["report", str(tmp_path / "x"), str(tmp_path / "y"), "--out", str(tmp_path / "page")]
    assert main(words) == 0


def test_pictures_of_others_have_no_seed(tmp_path: Path) -> None:
    folder = tmp_path / "theirs" / "00003"
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "samples" / "0002.png")
    metadata = {"tag": "single_object", "prompt": "a photo of a cow"}
    metadata["include"] = [{"class": "cow", "count": 1}]
    (folder / "metadata.jsonl").write_text(json.dumps(metadata))
    judge_like_the_script(tmp_path / "theirs", tmp_path / "out.jsonl", right=False)
    (tmp_path / "theirs").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="--images"):
        import_geneval(tmp_path / "out.jsonl", tmp_path / "lost")
    results = import_geneval(tmp_path / "out.jsonl", tmp_path / "b", images=tmp_path / "moved")
    assert results["policy"]["hash"] == "unknown"
    [sample] = load_results(tmp_path / "b").samples
    assert (sample["prompt_id"], sample["index"], sample["seed"]) == ("00003", 2, None)
    assert sample["values"] == {"strict": 0.0}
    assert sample["reason"] == "expected circle>=1, found 0"


@pytest.mark.parametrize(
    "line", ["not json", '{"filename": "x.png"}', '{"filename": "a/b/c.png", "tag": "t"}', "[]"]
)
def test_other_files_are_refused_with_their_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "out.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"out\.jsonl:1"):
        import_geneval(tmp_path / "out.jsonl", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_used_folders_are_left_alone(evaluated: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        export_geneval(load_results(evaluated), tmp_path / "used")


def test_the_verb_goes_both_ways(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, out = str(tmp_path / "layout"), str(tmp_path / "back")
    assert main(["geneval", "export", str(evaluated), layout]) == 0
    judge_like_the_script(tmp_path / "layout", tmp_path / "v.jsonl")
    assert main(["geneval", "import", str(tmp_path / "v.jsonl"), "--out", out]) == 0
    shown = capsys.readouterr().out
    assert "wrote 12 pictures" in shown
    assert "comparable with the leaderboard: no, these are not the prompts of GenEval" in shown


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the official file is not here")
def test_the_official_prompts_are_known_as_genevals() -> None:
    rows = [json.loads(line) for line in OFFICIAL.read_text().splitlines()]
    suite = suite_judged_by_the_script([{}], rows)
    assert (suite["name"], suite["title"]) == ("geneval", "GenEval")
    assert suite["not_comparable"].startswith("judged elsewhere")
    rows[5]["prompt"] += "!"
    assert suite_judged_by_the_script([{}], rows)["name"] == "geneval-format"
    made = [{"suite": "geneval", "suite_version": 2}]  # by the pictures themselves
    assert suite_judged_by_the_script(made, rows[:3])["name"] == "geneval"


def test_an_import_that_fails_leaves_nothing_behind(evaluated: Path, tmp_path: Path) -> None:
    export_geneval(load_results(evaluated), tmp_path / "layout")
    judge_like_the_script(tmp_path / "layout", tmp_path / "v.jsonl")
    next((tmp_path / "layout" / "00003").rglob("*.png")).write_bytes(b"no picture")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="cannot identify"):
        import_geneval(tmp_path / "v.jsonl", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
