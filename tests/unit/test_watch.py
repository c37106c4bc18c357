"""`atelier watch`: what a run's folder says, its alarms, and the screens and lines they become."""

import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import cli.watch
from cli.chart import binned, line_chart, sparkline
from cli.main import main
from cli.watch_screen import frame
from common.errors import UsageError
from evals.alarms import alarms
from evals.run_state import RunState, read_run

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def row(step: int, **facts: object) -> dict:
    known = {"reward": 0.3 + 0.01 * step, "reward_std": 0.4, "entropy": 2.0, "grad_norm": 0.1}
    known |= {"clip_fraction": 0.0, "extra_objects": 0.1, "zero_variance_groups": 1.0}
    seconds = {"rollout": 1.0, "update": 3.0}
    return {"step": step, **known, "missing_rewards": 0.0, "seconds": seconds, **facts}


def held_out(step: int, strict: float) -> dict:
    return {
        "event": "eval",
        "step": step,
        "strict": strict,
        "soft": 0.5,
        "per_task": dict.fromkeys(TASKS, strict),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "extends: geneval-scenes\nname: one\ntrain: {steps: 40}\nrollout: {prompts_per_step: 12}\n"
    )
    return folder


def write(folder: Path, rows: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def finish(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "policy.json").write_text("{}")


# --- the state ---------------------------------------------------------------------------------


def test_a_run_goes_through_its_phases(run: Path) -> None:
    assert read_run(run, time.time()).phase == "starting"
    write(run, [held_out(0, 0.3), row(1), row(2)])
    state = read_run(run, time.time())
    assert (state.phase, state.name, state.step, state.total) == ("running", "one", 2, 40)
    assert state.step_seconds == 4.0
    assert state.stages == {"rollout": 1.0, "update": 3.0}
    assert len(state.held_out) == 1
    assert state.alarms == {}
    later = read_run(run, time.time() + 1000)
    assert later.phase == "quiet"
    assert f"atelier resume {run}" in later.alarms["quiet"]
    finish(run)
    assert read_run(run, time.time() + 1000).phase == "finished"


def test_slow_steps_are_waited_for(run: Path) -> None:
    write(run, [row(1, seconds={"rollout": 100.0})])
    assert read_run(run, time.time() + 900).phase == "running"
    assert read_run(run, time.time() + 1100).phase == "quiet"


def test_a_torn_last_row_is_no_news(run: Path) -> None:
    write(run, [row(1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert read_run(run, time.time()).step == 1


def test_a_folder_that_is_no_run_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe\.yaml"):
        read_run(tmp_path, 0.0)


# --- alarms ------------------------------------------------------------------------------------

HEALTHY = [row(step) for step in range(1, 31)]


def test_a_healthy_run_has_no_alarm() -> None:
    curve = [held_out(0, 0.35), held_out(10, 0.4), held_out(20, 0.5), held_out(30, 0.47)]
    assert alarms(HEALTHY, curve, groups=12) == {}
    assert alarms([], [], groups=12) == {}


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("unscored", {"reward": None}),
        ("unscored", {"missing_rewards": 3.0}),
        ("no signal", {"zero_variance_groups": 12.0}),
        ("engine", {"logprob_mismatch_max": 0.8}),
        ("engine", {"importance_ratio_mean": 0.7}),
        ("clipped", {"clip_fraction": 0.5}),
        ("gradient", {"grad_norm": 30.0}),
        ("entropy", {"entropy": 0.2}),
        ("extra objects", {"extra_objects": 0.9}),
    ],
)
def test_what_goes_wrong_raises_its_alarm_and_no_other(kind: str, changed: dict) -> None:
    steps = [*HEALTHY[:-5], *({**r, **changed} for r in HEALTHY[-5:])]
    if kind == "gradient":  # a spike is one step
        steps = [*HEALTHY[:-1], {**HEALTHY[-1], **changed}]
    assert set(alarms(steps, [], groups=12)) == {kind}


def test_the_alarm_for_missing_scores_says_the_most_common_reason() -> None:
    reasons = {"judge: nobody there": 3, "judge: HTTP 500": 1}
    for reward in (None, 0.5):
        newest = {"reward": reward, "missing_rewards": 4.0, "missing_reasons": reasons}
        assert "judge: nobody there" in alarms([*HEALTHY, row(31) | newest], [], 12)["unscored"]


def test_what_truncated_sampling_keeps_is_no_alarm() -> None:
    """Tokens of a softmax cut to a mass of 0.8 have a ratio of 0.8 to 1; top-k has no such end."""
    changed = {"importance_ratio_mean": 0.82, "logprob_mismatch_max": 0.7}
    steps = [*HEALTHY[:-1], {**HEALTHY[-1], **changed}]
    assert set(alarms(steps, [], groups=12)) == {"engine"}
    assert alarms(steps, [], groups=12, kept=0.8) == {}
    for wrong, kept in (
        ({"importance_ratio_mean": 0.65}, 0.8),
        ({"importance_ratio_mean": 1.2}, 0.8),
        ({"logprob_mismatch_max": 0.8}, 0.8),
        ({"importance_ratio_mean": 1.2}, 0.0),
    ):
        steps[-1] = {**HEALTHY[-1], **changed, **wrong}
        assert set(alarms(steps, [], groups=12, kept=kept)) == {"engine"}, wrong
    steps[-1] = {**HEALTHY[-1], "importance_ratio_mean": 0.3, "logprob_mismatch_max": 4.0}
    assert alarms(steps, [], groups=12, kept=0.0) == {}


def test_a_cache_in_8_bits_is_no_alarm_and_a_ratio_that_drifts_is(run: Path) -> None:
    write(run, [row(1, logprob_mismatch_max=0.9, importance_ratio_mean=1.01)])
    recipe = run / "recipe.yaml"
    plain = recipe.read_text()
    for vllm, kinds in (("auto", {"engine"}), ("fp8", set())):
        keys = f"engine: vllm, vllm: {{cache_dtype: {vllm}}}, "
        recipe.write_text(plain.replace("rollout: {", f"rollout: {{{keys}"))
        assert set(read_run(run, time.time()).alarms) == kinds
    write(run, [row(1, logprob_mismatch_max=0.9, importance_ratio_mean=1.2)])
    assert set(read_run(run, time.time()).alarms) == {"engine"}


@pytest.mark.parametrize("truncation", ["top_p: 0.8", "top_k: 8"])
def test_the_recipe_says_what_sampling_keeps(run: Path, truncation: str) -> None:
    write(run, [row(1, importance_ratio_mean=0.82)])
    assert set(read_run(run, time.time()).alarms) == {"engine"}
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rollout: {", f"rollout: {{{truncation}, "))
    assert read_run(run, time.time()).alarms == {}


def test_reward_up_and_held_out_down_is_called_out() -> None:
    falling = [held_out(0, 0.4), held_out(10, 0.6), held_out(30, 0.42)]
    found = alarms(HEALTHY, falling, groups=12)
    assert set(found) == {"reward hacking"}
    assert "from 0.600 (step 10) to 0.420" in found["reward hacking"]
    # The same fall is chance where a point's standard error is 0.06: 2.5 * 0.085 = 0.21.
    noisy = [{**row, "standard_error": 0.06} for row in falling]
    assert alarms(HEALTHY, noisy, groups=12) == {}
    sure = [held_out(0, 0.4), held_out(10, 0.6), held_out(30, 0.55)]
    assert alarms(HEALTHY, sure, groups=12) == {}
    sure = [{**row, "standard_error": 0.01} for row in sure]
    assert set(alarms(HEALTHY, sure, groups=12)) == {"reward hacking"}
    # With the reward falling too, it is not the reward that is gamed.
    worse = [row(step, reward=1 - 0.01 * step) for step in range(1, 31)]
    assert alarms(worse, falling, groups=12) == {}


# --- charts ------------------------------------------------------------------------------------


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5, 5], 8) == "▁▁▁"
    assert sparkline([], 8) == ""
    assert sparkline([0] * 50 + [1] * 50, 2) == "▁█"
    assert binned([1, 2, 3, 4, 5], 2) == [1.5, 4.0]


def test_line_chart_puts_the_ends_where_they_belong() -> None:
    rows = [t.plain for t in line_chart([(0, 0.0), (10, 1.0)], [(10, 0.0)], 24, 4, "magenta")]
    assert len(rows) == 5
    assert all(len(text) == 24 for text in rows)
    assert rows[0].lstrip().startswith("1│")
    assert rows[3].lstrip().startswith("0│")
    assert 0x2801 <= ord(rows[0][-1]) <= 0x28FF  # the line ends at the top right
    assert 0x2801 <= ord(rows[3][3]) <= 0x28FF  # and begins at the bottom left
    assert rows[3][-1] == "●"
    assert rows[4].split() == ["└step", "0", "10"]
    assert line_chart([], [], 24, 4, "") == []
    assert len(line_chart([(3, 0.5)], [], 24, 4, "")) == 5


# --- screens -----------------------------------------------------------------------------------


def state_of(run: Path, **changes: object) -> RunState:
    samples = [
        {"prompt": "a red circle\x1b[2J", "reward": -0.15, "reason": "expected 2,\nfound 0"},
        {"prompt": "two rings " * 30, "reward": None, "reason": "timed out"},
    ]
    steps = [row(step, reward_std=0.4 + 0.001 * step, kl=0.1 * step) for step in range(1, 21)]
    write(run, [held_out(0, 0.3), *steps[:-1], row(20, samples=samples), held_out(20, 0.41)])
    return replace(read_run(run, time.time()), **changes)


def drawn(state: RunState, width: int, height: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None)
    console.print(frame(state, width, height))
    return out.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (80, 60)])
def test_the_screen_fits_the_terminal(run: Path, width: int, height: int) -> None:
    alarm = {"x": "engine and trainer differ by 0.80 nats on a token: stop and check " * 2}
    for state in (state_of(run), state_of(run, alarms=alarm)):
        lines = drawn(state, width, height)
        assert len(lines) < height
        assert max(map(len, lines)) <= width


def test_the_screen_shows_curves_stages_samples_tasks_and_alarms(run: Path) -> None:
    lines = drawn(state_of(run, alarms={"clipped": "40% are clipped"}), 120, 40)
    text = "\n".join(lines)
    assert "running  step 20/40  4.0s a step  1m 20s left" in lines[0]
    assert "runs/one  running" in lines[0]
    assert lines[1] == "! 40% are clipped"
    assert "reward 0.310 to 0.500   ● held-out strict 0.300 to 0.410" in text
    [stage] = [line for line in lines if " 3.00s" in line]
    assert stage.split()[-4:-1] == ["update", "3.00s", "75%"]
    assert "kl" in text
    assert "position 0.41" in text
    assert "-0.150  a red circle [2J  expected 2,; found 0" in text  # no escape reaches the screen
    assert "unscored  two rings" in text


def test_a_run_without_rewards_shows_its_loss(run: Path) -> None:
    write(run, [{"step": s, "loss": 2.0 / s, "mse": 0.1 / s} for s in (10, 20, 30)])
    text = "\n".join(drawn(read_run(run, time.time()), 80, 24))
    assert "loss 0.200 to 0.067" in text
    assert "mse" in text


def test_a_run_that_has_not_begun(run: Path) -> None:
    assert "no step yet" in "\n".join(drawn(read_run(run, time.time()), 80, 24))


# --- the verb ----------------------------------------------------------------------------------


def test_piped_it_prints_plain_lines_as_they_come(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, [held_out(0, 0.3), row(1), row(2)])
    later = iter(
        [
            lambda: write(run, [held_out(0, 0.3), row(1), row(2), row(3, missing_rewards=2.0)]),
            lambda: write(run, [held_out(0, 0.3), *map(row, (1, 2, 3, 4)), held_out(4, 0.35)]),
            lambda: finish(run),
        ]
    )
    monkeypatch.setattr(cli.watch.time, "sleep", lambda seconds: next(later)())
    assert main(["watch", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].partition(": look at")[0] for line in lines] == [
        "step 2/40",
        "held-out at step 0",
        "step 3/40",
        "alarm: 2 pictures of the newest step could not be scored",
        "step 4/40",
        "held-out at step 4",
        f"finished: {run / 'policy'}",
    ]
    assert lines[0] == (
        "step 2/40  reward 0.32  reward_std 0.4  extra_objects 0.1  4.0s  eta 2m 32s"
    )
    assert lines[1] == "held-out at step 0  strict 0.3  soft 0.5"
    assert "\x1b" not in "".join(lines)


def test_ctrl_c_leaves_the_run_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.watch.time, "sleep", interrupt)
    assert main(["watch", str(run)]) == 0
    assert "the run goes on" in capsys.readouterr().out


def test_the_page_is_refreshed_until_the_run_is_finished(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = run.parent / "page"
    seen = []

    def sleep(seconds: float) -> None:
        seen.append((page / "report.html").read_text())
        finish(run)

    write(run, [held_out(0, 0.3), row(1), row(2), held_out(2, 0.4)])
    monkeypatch.setattr(cli.watch.time, "sleep", sleep)
    assert main(["watch", str(run), "--report", str(page)]) == 0
    assert '<meta http-equiv="refresh" content="30">' in seen[0]
    last = (page / "report.html").read_text()
    assert 'http-equiv="refresh"' not in last
    assert "held-out, strict" in last
    assert "<h1>one</h1>" in last


def test_a_terminal_gets_the_live_screen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run, [row(1), row(2)])
    out = io.StringIO()
    screen = Console(file=out, width=80, height=24, force_terminal=True)
    monkeypatch.setattr("cli.console.stdout", lambda: screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(cli.watch.time, "sleep", lambda seconds: finish(run))
    assert main(["watch", str(run)]) == 0
    shown = out.getvalue()
    assert "running" in shown
    assert "finished" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back
    assert os.path.exists(run / "metrics.jsonl")
