"""What the command line draws and says, and what the doctor finds."""

import sys

import pytest
from rich.console import Console

from cli import console, doctor
from cli.main import main
from common.errors import RunError


@pytest.fixture(autouse=True)
def without_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")


# --- doctor ------------------------------------------------------------------------------------


def test_doctor_says_what_to_do_and_fails_when_something_is_missing(monkeypatch, capsys):
    findings = [
        ("a", lambda: doctor.Check("a", "ok", "1")),
        ("b", lambda: doctor.Check("b", "warn", "2", "do this")),
    ]
    monkeypatch.setattr(doctor, "checks", lambda: findings)
    assert main(["doctor"]) == 0
    findings.append(("c", lambda: doctor.Check("c", "fail", "3", "do that")))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "Fix: do this" in out
    assert "Fix: do that" in out
    assert out.splitlines()[-1] == "1 ok, 1 warn, 1 fail"


def test_doctor_compares_versions_with_the_constraints(tmp_path):
    (tmp_path / "constraints.txt").write_text("# pins\nPyYAML==0.1  # old\nno_such.Lib==2\nx>=3\n")
    assert doctor.constraints(tmp_path) == {"pyyaml": "0.1", "no-such-lib": "2"}
    check = doctor.library("pyyaml", "0.1")
    assert (check.status, check.fix) == ("warn", "pip install pyyaml==0.1")
    assert doctor.library("no-such-lib", "2").status == "fail"
    import yaml

    assert doctor.library("pyyaml", yaml.__version__).status == "ok"


def test_doctor_tries_imports_in_another_process():
    assert doctor.importable("wave", "x").status == "ok"
    check = doctor.importable("no_such_module", "pip install it")
    assert (check.status, check.fix) == ("warn", "pip install it")
    assert "wave" not in sys.modules


# --- console -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.6, "1m 00s"), (80, "1m 20s"), (7500, "2h 05m")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_piped_progress_is_one_plain_line_a_step(tmp_path):
    with open(tmp_path / "log", "w+") as file:
        with console.progress(Console(file=file)) as progress:
            progress.start("train", 3)
            progress.start("eval", 100)
            for _ in range(100):
                progress.advance("eval")
            progress.finish("eval")
            for step in range(3):
                progress.advance("train", reward=0.5, kl=None, note="[x]" * 60 if step else "ok")
            progress.finish("train")
            progress.line("[red]not markup[/red]")
        file.seek(0)
        lines = file.read().splitlines()
    assert lines[0] == "train 1/3  reward 0.5  kl -  note ok  eta 0s"
    assert lines[1].startswith("train 2/3")
    assert lines[2].startswith("train 3/3")
    assert "eta" not in lines[2]
    assert lines[3:] == ["[red]not markup[/red]"]


def test_bars_show_facts_and_are_taken_away_when_an_error_comes(tmp_path):
    def failing(terminal):
        with console.progress(terminal) as progress:
            progress.start("train", 4)
            progress.advance("train", 2, reward=0.5)
            raise RunError("stop")

    with open(tmp_path / "screen", "w+") as file:
        terminal = Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"})
        with pytest.raises(RunError):
            failing(terminal)
        file.seek(0)
        screen = file.read()
    assert "2/4" in screen
    assert "reward 0.5" in screen
    assert screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l")  # the cursor is back


def test_color_is_left_out_on_request_and_when_piped(capsys):
    console.error("x.yaml is wrong\n    Fix: do this")
    assert capsys.readouterr().err == "error: x.yaml is wrong\n    Fix: do this\n"


def test_a_task_without_a_count_ends_without_a_number(monkeypatch, capsys):
    times = iter([0.0, 9.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    lines = console.LineProgress(Console(file=sys.stdout))
    lines.start("load", None)
    lines.finish("load")
    assert capsys.readouterr().out == "load  done in 9s\n"
