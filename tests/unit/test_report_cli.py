"""The verbs `eval` and `report` as a user types them."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from eval_stand_in import StandInPolicy

import policy
from cli.main import main
from evals.results import load_results
from evals.suites import load_suite


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy folder whose loading gives the stand-in policy instead of a network."""
    folder = tmp_path / "some-policy"
    folder.mkdir()
    (folder / "policy.json").write_text("{}")
    painter = StandInPolicy(load_suite("geneval-scenes").records, 0.3)
    painter.state_dict = painter.settings = dict  # type: ignore[attr-defined]
    loader = SimpleNamespace(from_pretrained=lambda path, dtype, device: painter)
    monkeypatch.setattr(policy, "Policy", loader, raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def test_eval_then_report(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("results/a", "results/b"):
        words = ["eval", str(stand_in), "--seeds", "2", "--limit", "12", "--out", out]
        monkeypatch.setattr(sys, "argv", ["atelier", *words])
        assert main(words) == 0
    shown = capsys.readouterr().out
    assert "overall" in shown
    assert "atelier report results/b" in shown
    result = load_results("results/a")
    assert result.results["images"] == 24
    assert result.results["command"].startswith("atelier eval ")
    assert main(["report", "results/a", "results/b", "--out", "page"]) == 0
    assert Path("page/report.html").is_file()
    assert Path("page/report.md").is_file()


def test_the_recipe_of_a_run_s_policy_is_recorded(stand_in: Path) -> None:
    run = stand_in.parent / "runs" / "x"
    run.mkdir(parents=True)
    stand_in.rename(run / "policy")
    (run / "recipe.yaml").write_text("seed: 7\n")
    words = ["eval", str(run), "--seeds", "1", "--limit", "2", "--out"]
    assert main([*words, "results/a"]) == 0
    assert load_results("results/a").results["policy"]["recipe"] == "seed: 7\n"
    (run / "policy").rename(run / "copy")  # a policy beside some recipe is not that recipe's
    assert main(["eval", str(run / "copy"), *words[2:], "results/b"]) == 0
    assert load_results("results/b").results["policy"]["recipe"] is None


def test_unknown_suite_fails_before_the_policy_is_loaded(
    stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(stand_in), "--suite", "geneval-scene"]) != 0
    assert "geneval-scenes" in capsys.readouterr().err


HANGS = """
import signal
import threading

from rewards import reward


@reward(name="hangs")
def hangs(images, prompts):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    threading.Event().wait(30)
    return [1.0] * len(images)
"""


def test_ctrl_c_does_not_wait_for_a_judge_that_hangs(stand_in: Path) -> None:
    Path("judge.py").write_text(HANGS)
    prompt = load_suite("geneval-scenes").records[0]["prompt"]
    Path("prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    options = ["prompts=prompts.jsonl", "reward=judge.py:hangs"]
    threads = set(threading.enumerate())
    started = time.monotonic()
    assert main(["eval", str(stand_in), *options, "--suite", "prompt-file"]) == 130
    assert time.monotonic() - started < 20
    # Of these the interpreter would wait at its end. One that was only just being started when
    # Ctrl-C came is not waited for by its pool: it ends a moment later by itself.
    ending = time.monotonic() + 5
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("reward_"):
            thread.join(max(0.0, ending - time.monotonic()))
            assert not thread.is_alive()


def test_report_of_nothing_names_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "none" in error
    assert "atelier eval" in error
    assert not (tmp_path / "out").exists()
