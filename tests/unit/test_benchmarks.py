"""What the benchmarks compute around their measurements, and that pages show what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import published, tables
from benchmarks.perf import BASELINES, lost
from benchmarks.timing import Ratio, Times, peak_memory, scatter

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(1.79, 0.0, True), (1.81, 0.0, False), (1.7, 0.06, False), (1.7, 0.04, True), (9.0, 0, False)],
)
def test_a_ratio_is_lost_ten_percent_below_its_baseline_and_beyond_noise(value, error, expected):
    assert lost(Ratio("", value, error), baseline=2.0) is expected


def test_the_scatter_is_the_standard_error_of_a_median():
    rng = np.random.default_rng(0)
    draws = rng.normal(5, 2, size=(2000, 25))
    assert np.mean([scatter(row) for row in draws]) == pytest.approx(
        np.median(draws, axis=1).std(), rel=0.1
    )


def test_ratios_are_paired_by_turn():
    """A slow spell of the machine hits neighbours alike and leaves the ratio as it is."""
    times = Times({"other": [2.0, 20.0, 4.0], "ours": [1.0, 10.0, 2.0]})
    ratio = times.ratio("x", "other", "ours")
    assert (ratio.value, ratio.scatter) == (2.0, 0.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_sees_what_is_freed_again():
    assert 300 < peak_memory(lambda: torch.ones(100_000_000).sum()) < 500  # 400 MB


def test_the_published_way_draws_what_ours_draws(policy):
    """Equal tokens and noise give equal pictures, so that the comparison is of speed alone."""
    prompts = ["a photo of a red circle"] * 2  # of one length: the published pass has no mask
    torch.manual_seed(0)
    ids, _, width = published.generate(policy, prompts)
    assert ids.shape[1] - width <= policy.config.num_tokens
    count, known = policy.config.num_tokens, policy.config.num_image_tokens
    codes = policy.config.image_start_id + torch.arange(2 * count).view(2, -1) * 7 % known
    whole = torch.cat([ids[:, :width], codes], 1)
    prompt_ids = policy.prompt_ids(prompts)
    hidden = published.hidden_states(policy, whole)
    torch.testing.assert_close(hidden, policy.condition_rows(prompt_ids, codes))
    noise = policy.noise([1, 2])
    torch.testing.assert_close(
        published.decode(policy, hidden, noise, 3, 2.0),
        policy.render(hidden, noise=noise, steps=3, guidance=2.0),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("page", tables.PAGES, ids=str)
def test_the_pages_show_the_results_files(page):
    text = (ROOT / page).read_text()
    assert "<!-- begin" in text
    assert tables.filled(text) == text, "run python -m benchmarks.tables"


def test_every_baseline_is_a_ratio_of_the_results():
    measured = {
        row["name"] for row in json.loads((tables.RESULTS / "perf.json").read_text())["ratios"]
    }
    assert set(json.loads(BASELINES.read_text())) == measured
