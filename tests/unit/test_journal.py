"""The journal survives being cut off anywhere."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import RunError
from common.journal import Journal, read_journal


def test_rows_come_back_in_order(tmp_path):
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    journal.write({"step": 1, "seconds": {"rollout": 0.5}, "prompt": "één"})
    journal.write({"step": 2, "parts": [1, None]})
    assert read_journal(journal.path) == [
        {"step": 1, "seconds": {"rollout": 0.5}, "prompt": "één"},
        {"step": 2, "parts": [1, None]},
    ]


def test_a_missing_journal_has_no_rows(tmp_path):
    assert read_journal(tmp_path / "none.jsonl") == []


def test_what_json_cannot_hold(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    journal.write({"loss": math.nan, "kl": [math.inf], "lr": np.float32(0.5), "n": np.int64(3)})

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(journal.path.read_text(), parse_constant=refuse)
    assert row == {"loss": None, "kl": [None], "lr": 0.5, "n": 3}


@given(cut=st.integers(0, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_journal_cut_off_anywhere_goes_on(tmp_path, cut):
    file = tmp_path / "m.jsonl"
    file.unlink(missing_ok=True)
    rows = [{"step": step, "reward": step / 7} for step in range(4)]
    journal = Journal(file)
    for row in rows:
        journal.write(row)
    whole = file.read_bytes()
    cut = min(cut, len(whole))
    file.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert read_journal(file) == rows[:complete]
    Journal(file).write({"step": 9})
    assert read_journal(file) == [*rows[:complete], {"step": 9}]


def test_rewind_drops_the_rows_of_later_steps(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    for row in ({"event": "start"}, {"step": 1}, {"step": 2}, {"event": "eval", "step": 3}):
        journal.write(row)
    journal.rewind(2)
    assert read_journal(journal.path) == [{"event": "start"}, {"step": 1}, {"step": 2}]


def test_damage_in_the_middle_is_named(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"m\.jsonl:2"):
        read_journal(file)
