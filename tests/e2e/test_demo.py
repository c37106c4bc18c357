"""The demo's own path, shortened: two steps, twelve prompts, one picture each."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cli import demo
from common.progress import SilentProgress
from evals.suites import load_suite, register_suite

SHORT = (
    "train.steps=2",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "evals.every=2",
    "evals.limit=6",
    "save.every=2",
)


def test_the_demo_trains_compares_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_suite("demo-short")(
        lambda: replace(load_suite("geneval-scenes", 12), name="demo-short")
    )
    monkeypatch.setattr(demo, "SUITE", "demo-short")
    monkeypatch.setattr(demo, "SEEDS", 1)
    monkeypatch.setattr(demo, "TEMPERATURES", (1.0, 0.4))
    monkeypatch.setattr(demo, "TUNE_PROMPTS", 6)
    monkeypatch.setattr(demo, "TUNE_SEEDS", 1)

    lines = demo.run(tmp_path / "demo", SilentProgress(), SHORT)

    number = r"[+-]?\d\.\d\d"
    shape = (
        rf"suite=demo-short base={number} trained={number} delta={number} "
        rf"ci95=\[{number}, {number}\] prompts=12 images=24"
    )
    assert len(lines) == 2
    assert re.fullmatch(f"AT TEMPERATURE 1 {shape}", lines[0])
    last = re.fullmatch(f"DEMO RESULT {shape} report=(.+)", lines[1])
    assert last
    page = Path(last[1])
    assert page.is_file()
    assert len(list((page.parent / "images").rglob("*.webp"))) == 24
    assert (tmp_path / "demo" / "run" / "policy" / "policy.json").is_file()
