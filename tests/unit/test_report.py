"""The report folder: what it contains, that it is self-contained, and that text stays text."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eval_stand_in import StandInPolicy, toy_suite
from PIL import Image

from benchmarks.report import write_folder
from common.errors import RunError
from evals.compare import compare
from evals.pages import TEMPLATES
from evals.recipe_diff import recipe_diff
from evals.report import build_report, format_signed, gpu_hours, markdown_text
from evals.results import load_results
from evals.run import evaluate
from evals.suites import Metric
from evals.training_curves import line_chart, load_training, nice_ticks

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects what a browser would load, run or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.elements[-1] if self.elements else ("", {})
        (self.scripts if inside[0] == "script" else self.texts).append(data)


def results(folder: Path, error: float = 0.5, **options: object) -> Path:
    """An evaluation whose prompts, reasons and names try to break out of the page."""
    suite = toy_suite(6)
    records = [dict(record, prompt=f"{EVIL} & {record['prompt']}") for record in suite.records]
    for record in records:
        record["metadata"] = {**record["metadata"], "tag": f"{record['metadata']['tag']}{EVIL}"}
    suite = replace(
        suite,
        records=tuple(records),
        title=f"Suite {EVIL}",
        score=lambda image, record: replace(
            toy_suite(1).score(image, record), reason=f"</script>{EVIL}"
        ),
    )
    policy = StandInPolicy(toy_suite(6).records, error)
    clean = {r["prompt"]: m["metadata"] for r, m in zip(records, toy_suite(6).records, strict=True)}
    policy.metadata = clean
    facts = {"seeds": 2, "weights": f"hash-{folder.name}", "name": f"{folder.name}{EVIL}"}
    evaluate(policy, suite, folder, **(facts | {"command": f"atelier eval {EVIL}"} | options))
    return folder


def training_run(folder: Path) -> Path:
    folder.mkdir()
    seconds = {"rollout": 1.0, "update": 3.0}
    rows = [
        {"step": s, "reward": 0.3 + 0.01 * s, "kl": 0.001 * s, "seconds": seconds}
        for s in range(1, 41)
    ]
    held_out = [
        {"event": "eval", "step": s, "strict": v} for s, v in ((1, 0.5), (20, 0.6), (40, 0.4))
    ]
    lines = [json.dumps(row) for row in [*rows, *held_out]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(f"name: {EVIL}\n")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    before, after = results(folder / "a", 0.9), results(folder / "b", 0.2)
    run = training_run(folder / "run")
    return build_report(
        [before, after], folder / "out", run, command=f"atelier report {EVIL}"
    ).parent


def test_nothing_untrusted_becomes_markup(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert "<script>alert" not in text
    page = Page(text)
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    # our own script and the gallery's JSON, and no more
    assert [s.get("type") for s in scripts] == ["application/octet-stream", None]
    assert any(EVIL in shown for shown in page.texts)


def test_gallery_data_survives_and_holds_the_prompts(report: Path) -> None:
    page = Page((report / "report.html").read_text())
    data = json.loads(zlib.decompress(base64.b64decode(page.scripts[0])))
    assert len(data["prompts"]) == 6
    assert all(prompt["prompt"].startswith(EVIL) for prompt in data["prompts"])
    assert all(len(prompt["seeds"]) == 2 for prompt in data["prompts"])
    assert f"</script>{EVIL}" in data["strings"]


def test_page_loads_nothing_from_elsewhere(report: Path) -> None:
    text = (report / "report.html").read_text()
    for _, attributes in Page(text).elements:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\(", text)
    assert "default-src 'none'" in text


def test_every_picture_is_in_the_folder_untouched(report: Path) -> None:
    for column, name in enumerate(("a", "b")):
        samples = load_results(report.parent / name).samples
        for position, sample in enumerate(samples):
            copied = report / "images" / f"0-{column}" / f"{position // 2}-{position % 2}.webp"
            assert copied.read_bytes() == (report.parent / name / sample["image"]).read_bytes()


def test_both_forms_state_the_numbers_of_the_results(report: Path) -> None:
    for name in ("a", "b"):
        facts = json.loads((report.parent / name / "results.json").read_text())
        percent = f"{100 * facts['overall']['strict']['mean']:.1f}\u2009%"
        for file in ("report.html", "report.md"):
            text = (report / file).read_text()
            assert percent in text
            assert f"hash-{name}" in text.replace("\\", "")


def test_markdown_has_no_markup_of_strangers(report: Path) -> None:
    text = (report / "report.md").read_text()
    blocks = re.findall(r"^    .*$", text, flags=re.M)  # commands stand in code blocks
    for block in blocks:
        text = text.replace(block, "")
    assert "<script>" not in text


def test_curves_that_part_ways_are_pointed_out(report: Path) -> None:
    assert "part ways" in (report / "report.html").read_text()


def test_stage_shares(tmp_path: Path) -> None:
    training = load_training(training_run(tmp_path / "run"))
    assert training.stages == [("rollout", 1.0, 25.0), ("update", 3.0, 75.0)]
    assert training.steps == 40


def test_hours_of_each_device_that_a_run_was_on(tmp_path: Path) -> None:
    """A run that moved from one GPU to two, whose steps took half an hour each."""
    gpu = {"event": "devices", "kind": "GPU", "device": "H100", "count": 1, "step": 0}
    step = {"reward": 0.5, "seconds": {"update": 1800.0}}
    rows = [gpu, {"step": 1, **step}, {**gpu, "count": 2, "step": 1}, {"step": 2, **step}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_training(tmp_path).device_hours == [("GPU-hours on H100", pytest.approx(1.5))]
    page = build_report([], tmp_path / "report", tmp_path)
    assert "1.5 GPU-hours on H100" in page.read_text()
    assert "The steps took 1.5 GPU-hours on H100." in (page.parent / "report.md").read_text()


def test_hours_are_not_told_of_the_later_steps_alone(tmp_path: Path) -> None:
    gpu = {"event": "devices", "kind": "GPU", "device": "H100", "count": 1, "step": 1}
    step = {"reward": 0.5, "seconds": {"update": 1800.0}}
    rows = [{"step": 1, **step}, gpu, {"step": 2, **step}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_training(tmp_path).device_hours == []


def test_one_result_alone(tmp_path: Path) -> None:
    suite = toy_suite(60)
    evaluate(StandInPolicy(suite.records, 0.5), suite, tmp_path / "a", seeds=1, weights="a")
    page = build_report([tmp_path / "a"], tmp_path / "out").read_text()
    facts = json.loads((tmp_path / "a" / "results.json").read_text())["overall"]["strict"]
    interval = f"{100 * facts['low']:.1f}\u2009% to {100 * facts['high']:.1f}\u2009%"
    assert interval in page
    assert interval in (tmp_path / "out" / "report.md").read_text()
    assert "side by side" not in page
    assert "Improved" not in page
    assert "Failed" in page


def test_markdown_of_a_suite_of_one_task_shows_it_once(tmp_path: Path) -> None:
    suite = toy_suite(36)
    lone = tuple(r for r in suite.records if r["metadata"]["tag"] == "counting")
    for name, error in (("a", 0.0), ("b", 0.5)):
        policy = StandInPolicy(lone, error)
        evaluate(policy, replace(suite, records=lone), tmp_path / name, seeds=1, weights=name)
    page = build_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    text = page.with_suffix(".md").read_text()
    assert "| overall |" in text
    assert "ounting |" not in text
    assert "limit all" in text
    assert "limit None" not in text


def test_a_difference_and_what_could_be_found_have_one_unit(tmp_path: Path) -> None:
    suite = toy_suite(60)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        policy = StandInPolicy(suite.records, 0.45 if folder.name == "a" else 0.5)
        evaluate(policy, suite, folder, seeds=1, weights=folder.name)
    page = build_report(folders, tmp_path / "out")
    overall = compare(*folders)["overall"]
    assert overall["verdict"] == "not shown"
    told = f"A true difference of {100 * overall['minimum_detectable']:.1f} points would be told"
    assert told in page.read_text()
    assert told in page.with_suffix(".md").read_text()


def test_a_difference_without_an_interval_says_so_once(tmp_path: Path) -> None:
    for name, error in (("a", 0.0), ("b", 0.5)):
        policy = StandInPolicy(toy_suite(2).records, error)
        evaluate(policy, toy_suite(2), tmp_path / name, seeds=1, weights=name)
    page = build_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    for file in (page, page.with_suffix(".md")):
        shown = " ".join(re.sub("<[^>]*>", "", file.read_text()).split())
        assert "interval no interval" not in shown
        assert "points, no interval." in shown


def test_a_replay_s_reward_is_called_that_of_the_replayed_rollouts(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run")
    assert load_training(run).sentence.startswith("The training reward went from")
    for replay, whose in (("null", "training"), ("saved", "replayed rollouts'")):
        (run / "recipe.yaml").write_text(f"rollout:\n  replay: {replay}\n")
        assert load_training(run).sentence.startswith(f"The {whose} reward went from")


def test_every_result_says_whether_it_is_comparable_and_what_is_published(tmp_path: Path) -> None:
    suite = replace(toy_suite(4), not_comparable=None, published=lambda rows: {"As a paper": 12.25})
    for name, limit, judged in (
        ("whole", None, suite),
        ("part", 2, replace(suite, published=None)),
    ):
        policy = StandInPolicy(suite.records, 0.4)
        evaluate(policy, judged, tmp_path / name, seeds=1, limit=limit, weights=name)
    page = build_report([tmp_path / "whole", tmp_path / "part"], tmp_path / "out")
    text = " ".join("".join(Page(page.read_text()).texts).split())
    for form in (text, page.with_suffix(".md").read_text()):
        assert (
            "whole: comparable with the published leaderboard. As published: As a paper 12.25."
        ) in form
        assert (
            "part: not comparable with a published leaderboard: 2 of 4 prompts were used." in form
        )
        assert form.count("As published") == 1


def test_an_amount_is_shown_and_neither_right_nor_wrong(tmp_path: Path) -> None:
    suite = toy_suite(2)
    metrics = {"extra_objects": suite.metrics["extra_objects"]}
    policy = StandInPolicy(suite.records, 0.4)
    evaluate(policy, replace(suite, metrics=metrics), tmp_path / "a", seeds=1, weights="w")
    text = build_report([tmp_path / "a"], tmp_path / "out").read_text()
    assert json.loads(zlib.decompress(base64.b64decode(Page(text).scripts[0])))["kind"] == "amount"
    assert 'value="failed"' not in text


SHOWN = """
const script = require("fs").readFileSync(process.argv[1], "utf8");
const from = script.indexOf("const right ="), to = script.indexOf("const overlay =");
const shown = new Function(script.slice(from, to) + "; return [mark, outcomes];");
const [mark, outcomes] = shown();
const said = [];
for (const kind of ["amount", "rate"]) {
  const data = { kind, better: "higher" };
  for (const value of [0.27, 1, null]) {
    said.push([mark(data, value), outcomes(data, [[value]], 0)]);
  }
}
console.log(JSON.stringify(said));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_gallery_marks_rates_alone() -> None:
    script = TEMPLATES / "report.js"
    told = subprocess.run(["node", "-e", SHOWN, script], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == [
        ["0.27", ["all"]],
        ["1", ["all"]],
        ["not scored", ["all"]],
        ["✗", ["all", "failed"]],
        ["✓", ["all"]],
        ["not scored", ["all"]],
    ]


def test_a_button_that_the_page_hides_is_not_shown() -> None:
    style = (TEMPLATES / "report.css").read_text()
    shown, hidden = style.index(".more { display: block"), style.index(".more[hidden]")
    assert shown < hidden
    assert style[hidden:].startswith(".more[hidden] { display: none; }")


def test_a_report_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    folder = results(tmp_path / "a")
    build_report([folder], tmp_path / "out")
    (tmp_path / "out" / "images" / "stale.webp").write_bytes(b"old")
    build_report([folder], tmp_path / "out")
    assert not (tmp_path / "out" / "images" / "stale.webp").exists()
    with pytest.raises(RunError, match="which is no part of a report"):
        build_report([folder], folder)
    assert load_results(folder).samples


def test_a_report_beside_something_of_the_user_s_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "report"
    build_report([results(tmp_path / "a")], out)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        build_report([tmp_path / "a"], out)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_large_pictures_become_thumbnails(tmp_path: Path) -> None:
    folder = results(tmp_path / "a")
    first = folder / load_results(folder).samples[0]["image"]
    Image.new("RGB", (1024, 768), "red").save(first)
    build_report([folder], tmp_path / "out")
    with Image.open(tmp_path / "out" / "images" / "0-0" / "0-0.webp") as thumbnail:
        assert thumbnail.size == (512, 384)


def test_run_without_steps_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        load_training(tmp_path / "run")


def test_differences_of_rates_are_points_with_a_true_minus() -> None:
    assert format_signed(-0.125, Metric("x")) == "\u221212.5"
    assert format_signed(0.125, Metric("x", "amount")) == "+0.125"


def test_gpu_hours_are_told_only_where_a_gpu_was_used() -> None:
    facts = {"settings": {"device": "cuda"}, "seconds": {"generate": 3000.0, "score": 600.0}}
    assert gpu_hours(facts) == pytest.approx(1.0)
    assert gpu_hours(facts | {"settings": {"device": "cpu"}}) is None
    assert gpu_hours(facts | {"settings": {}}) is None


def test_recipes_differ_by_their_settings() -> None:
    before = "a: 1\nb:\n  c: [1, 2]\n  d: x\nf:\n- use: ocr\n"
    after = "a: 1\nb:\n  c: [1, 3]\ne: 1e-5\nf:\n- use: geneval\n"
    assert recipe_diff(before, after) == [
        ("b.c", "[1, 2]", "[1, 3]"),
        ("b.d", "x", "-"),
        ("f[0].use", "ocr", "geneval"),
        ("e", "-", "1e-05"),
    ]
    assert recipe_diff(before, before) == []
    assert recipe_diff(None, after) is None


def test_the_report_shows_in_what_the_recipes_differ(tmp_path: Path) -> None:
    old = results(tmp_path / "a", recipe=f"seed: 0\nname: {EVIL}\n")
    new = results(tmp_path / "b", recipe=f"seed: 41\nname: {EVIL}\n")
    page = build_report([old, new], tmp_path / "page")
    shown = Page(page.read_text()).texts
    place = shown.index("seed")
    assert [text for text in shown[place : place + 4] if text.strip()] == ["seed", "0", "41"]
    assert "| seed | 0 | 41 |" in page.with_name("report.md").read_text()
    assert "<script>alert" not in page.read_text()


def test_a_page_of_many_pictures_stays_small(tmp_path: Path) -> None:
    """The path of benchmarks/report.py, which is for 10,000 pictures, on a few hundred."""
    for name in ("before", "after"):
        write_folder(tmp_path / name, 40, 16, name == "after")
    small = build_report([tmp_path / "before"], tmp_path / "one").stat().st_size
    both = build_report([tmp_path / "before", tmp_path / "after"], tmp_path / "two")
    assert len(list((both.parent / "images").rglob("*.webp"))) == 2 * 160
    assert both.stat().st_size - small < 320 * 150  # so 10,000 pictures take less than 1.5 MB


def test_the_evaluation_leaves_thumbnails_that_the_report_copies(tmp_path: Path) -> None:
    class Large(StandInPolicy):
        def generate(self, prompts: Sequence[str], **options: object) -> list[Image.Image]:
            return [Image.new("RGB", (1024, 768), "red") for _ in prompts]

    suite = toy_suite(2)
    evaluate(Large(suite.records, 0.0), suite, tmp_path / "a", seeds=1, weights="w")
    made = sorted((tmp_path / "a" / "thumbnails").iterdir())
    assert len(made) == 2
    page = build_report([tmp_path / "a"], tmp_path / "page")
    shown = sorted((page.parent / "images").rglob("*.webp"))
    assert {path.read_bytes() for path in shown} == {path.read_bytes() for path in made}
    with Image.open(shown[0]) as image:
        assert image.size == (512, 384)


def test_markdown_text_keeps_the_table_whole() -> None:
    assert "\n" not in markdown_text("a\nb")
    assert markdown_text("a|b") == "a\\|b"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (1.0, 94.0, [0, 25, 50, 75, 100]),
        (0.38, 0.74, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_chart_puts_the_highest_value_on_top() -> None:
    chart = line_chart("t", {"a": ("s1", [(0.0, 0.0), (10.0, 1.0)], False)})
    assert chart.series[0].points == "0.0,100.0 100.0,0.0"
