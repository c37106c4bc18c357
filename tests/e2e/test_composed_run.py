"""A GRPO run with several rewards: in a process, gated, scheduled, normalised each by itself."""

import json

import pytest
from tiny_policy import write_recipe

from cli.main import main
from common.journal import read_journal

CODE = """
import numpy as np
import os

def redness(images, prompts):
    return [float(np.asarray(image, dtype=float)[..., 0].mean()) for image in images]

def blueness(images, prompts):
    return [float(np.asarray(image, dtype=float)[..., 2].mean()) for image in images]

def pid(images):
    return [float(os.getpid())] * len(images)
"""


def test_a_run_with_composed_rewards(policy_folder, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "recipe", policy_folder, code=CODE)
    functions = [
        {"use": "redness.py:redness", "range": [0, 100]},
        {
            "use": "redness.py:blueness", "name": "blue", "weight": 2.0, "range": [0, 50],
            "schedule": [[0, 0.0], [2, 1.0]], "only_if": {"reward": "redness", "at_least": 0.0},
        },
        {"use": "redness.py:pid", "weight": 0.0, "workers": 1},
    ]  # fmt: skip
    overrides = [
        f"rewards.functions={json.dumps(functions)}",
        "rewards.multi_objective_aggregation=normalize_then_sum",
        "rewards.cache=true",
        "train.steps=3",
    ]
    out = tmp_path / "run"
    assert main(["train", str(path), *overrides, "--out", str(out)]) == 0
    rows = [row for row in read_journal(out / "metrics.jsonl") if "event" not in row]
    assert len(rows) == 3
    for step, row in enumerate(rows):
        parts = row["rewards"]
        assert parts.keys() == {"redness", "blue", "pid"}
        total = parts["redness"] / 100 + 2 * min(step / 2, 1) * parts["blue"] / 50
        assert row["reward"] == pytest.approx(total, rel=1e-4)
        assert row["grad_norm"] > 0
        assert row["missing_rewards"] == 0
