"""Evaluation runs: seeds, resuming, caching, unscored samples, the summary's arithmetic."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_stand_in import StandInPolicy, toy_suite
from PIL import Image

from common.errors import RewardError, RunError
from evals.policy_hash import policy_hash
from evals.results import load_results, read_samples
from evals.run import evaluate
from evals.suites import Record, SampleScore


def test_same_policy_gives_the_same_samples(tmp_path: Path) -> None:
    suite = toy_suite(6)
    for name, batch in (("a", 4), ("b", 64)):
        policy = StandInPolicy(suite.records, 0.4)
        evaluate(policy, suite, tmp_path / name, seeds=2, batch_size=batch, weights="w")
    first, second = read_samples(tmp_path / "a"), read_samples(tmp_path / "b")
    assert len(first) == 12
    for key, row in first.items():
        assert {**row, "seconds": 0} == {**second[key], "seconds": 0}
        images = [(tmp_path / name / row["image"]).read_bytes() for name in ("a", "b")]
        assert images[0] == images[1]


def test_seeds_differ_between_samples_and_not_between_policies(tmp_path: Path) -> None:
    suite = toy_suite(4)
    seeds = []
    for name, error in (("a", 0.0), ("b", 1.0)):
        policy = StandInPolicy(suite.records, error)
        evaluate(policy, suite, tmp_path / name, seeds=3, temperature=1 + error, weights=name)
        seeds.append([seed for _, seed in policy.generated])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 12


def test_pictures_are_stored_without_loss(tmp_path: Path) -> None:
    suite = toy_suite(1)
    policy = StandInPolicy(suite.records, 0.0)
    evaluate(policy, suite, tmp_path / "a", seeds=1, weights="w")
    row = load_results(tmp_path / "a").samples[0]
    painted = policy.generate(
        [row["prompt"]], steps=6, guidance=1.5, temperature=1.0, seeds=[row["seed"]]
    )[0]
    with Image.open(tmp_path / "a" / row["image"]) as stored:
        assert stored.convert("RGB").tobytes() == painted.tobytes()


class CutOff(StandInPolicy):
    """A policy whose machine goes away at the third batch."""

    def generate(self, prompts: Sequence[str], **options: object) -> list[Image.Image]:  # type: ignore[override]
        if len(self.generated) >= 8:
            raise KeyboardInterrupt
        return super().generate(prompts, **options)  # type: ignore[arg-type]


def test_an_interrupted_run_goes_on_and_makes_nothing_twice(tmp_path: Path) -> None:
    suite = toy_suite(6)
    out = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        evaluate(CutOff(suite.records, 0.4), suite, out, seeds=2, batch_size=4, weights="w")
    with pytest.raises(RunError, match="not finished"):
        load_results(out)
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"prompt_id": "torn')  # what a kill in the middle of a write leaves behind
    rest = StandInPolicy(suite.records, 0.4)
    resumed = evaluate(rest, suite, out, seeds=2, batch_size=4, weights="w")
    assert len(rest.generated) == 4
    whole = evaluate(StandInPolicy(suite.records, 0.4), suite, tmp_path / "b", seeds=2, weights="w")
    assert resumed["overall"] == whole["overall"]
    assert resumed["tasks"] == whole["tasks"]


def test_a_lost_or_cut_picture_is_made_again(tmp_path: Path) -> None:
    suite = toy_suite(3)
    out = tmp_path / "a"
    evaluate(StandInPolicy(suite.records, 0.0), suite, out, seeds=1, weights="w")
    images = sorted((out / "images").iterdir())
    whole = images[0].read_bytes()
    images[0].write_bytes(whole[:10])
    images[1].unlink()
    policy = StandInPolicy(suite.records, 0.0)
    evaluate(policy, suite, out, seeds=1, weights="w")
    assert len(policy.generated) == 2
    assert images[0].read_bytes() == whole
    assert len(load_results(out).samples) == 3


def test_a_complete_run_is_returned_from_the_folder(tmp_path: Path) -> None:
    suite = toy_suite(3)
    out = tmp_path / "a"
    first = evaluate(StandInPolicy(suite.records, 0.0), suite, out, seeds=1, weights="w")
    policy = StandInPolicy(suite.records, 0.0)
    assert evaluate(policy, suite, out, seeds=1, weights="w") == first
    assert policy.generated == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.7}, "temperature is 1.0 there and 0.7 now"),
        ({"seeds": 2}, "seeds is 1 there and 2 now"),
        ({"guidance": 2.0}, "guidance is 1.5 there and 2.0 now"),
        ({"weights": "other"}, "policy_hash"),
    ],
)
def test_another_evaluation_in_the_folder_is_an_error(
    tmp_path: Path, options: dict, named: str
) -> None:
    suite = toy_suite(3)
    policy = StandInPolicy(suite.records, 0.0)
    settings = {"seeds": 1, "weights": "w"}
    evaluate(policy, suite, tmp_path / "a", **settings)
    with pytest.raises(RunError, match=named):
        evaluate(policy, suite, tmp_path / "a", **(settings | options))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    suite = toy_suite(1)
    with pytest.raises(RunError, match="other files"):
        evaluate(StandInPolicy(suite.records, 0.0), suite, tmp_path, seeds=1, weights="w")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_unscored_sample_is_counted_and_never_zero(tmp_path: Path) -> None:
    suite = toy_suite(6)
    broken = suite.records[0]["prompt_id"]

    def score(image: Image.Image, record: Record) -> SampleScore:
        if record["prompt_id"] == broken:
            raise RewardError("the detector is away")
        return suite.score(image, record)

    results = evaluate(
        StandInPolicy(suite.records, 0.0),
        replace(suite, score=score),
        tmp_path / "a",
        seeds=2,
        weights="w",
    )
    task = suite.records[0]["metadata"]["tag"]
    assert results["unscored"]["strict"] == 2
    assert results["tasks"][task]["metrics"]["strict"] is None
    assert results["overall"]["strict"] is None  # a mean over tasks needs every task
    others = [facts for name, facts in results["tasks"].items() if name != task]
    assert all(facts["metrics"]["strict"]["mean"] == 1.0 for facts in others)
    row = load_results(tmp_path / "a").samples[0]
    assert row["values"]["strict"] is None
    assert "the detector is away" in row["reason"]


def test_summary_is_the_mean_over_tasks(tmp_path: Path) -> None:
    suite = toy_suite(20)
    results = evaluate(
        StandInPolicy(suite.records, 0.5), suite, tmp_path / "a", seeds=3, weights="w"
    )
    rows = [json.loads(line) for line in (tmp_path / "a/samples.jsonl").read_text().splitlines()]
    by_task: dict[str, list[float]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row["values"]["strict"])
    means = {task: sum(values) / len(values) for task, values in by_task.items()}
    for task, mean in means.items():
        assert results["tasks"][task]["metrics"]["strict"]["mean"] == pytest.approx(mean, abs=1e-6)
    expected = sum(means.values()) / len(means)
    assert results["overall"]["strict"]["mean"] == pytest.approx(expected, abs=1e-6)
    assert results["schema"] == "atelier.results/1"
    assert results["images"] == 60


def test_policy_hash_sees_every_weight() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).to(torch.bfloat16)
    before = policy_hash(module)
    assert policy_hash(module) == before
    with torch.no_grad():
        module[1].bias[1] += 1
    assert policy_hash(module) != before
