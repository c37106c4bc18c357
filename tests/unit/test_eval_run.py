"""Evaluation runs: seeds, resuming, caching, unscored samples, the summary's arithmetic."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_stand_in import StandInPolicy, toy_suite, without_first
from PIL import Image

from common.errors import RunError, UsageError
from common.lock import folder_lock
from common.progress import SilentProgress
from evals.policy_hash import policy_hash
from evals.report import build_report
from evals.results import held_out_row, load_results, read_origin, read_samples
from evals.run import evaluate
from evals.suites import Record, SampleScore, task_of


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


def test_a_picture_says_where_it_comes_from(tmp_path: Path) -> None:
    suite = toy_suite(1)
    policy = StandInPolicy(suite.records, 0.0)
    setup = {"engine": "transformers", "dtype": "float32"}
    evaluate(policy, suite, tmp_path / "a", seeds=1, temperature=0.7, weights="w", setup=setup)
    row = load_results(tmp_path / "a").samples[0]
    origin = read_origin(tmp_path / "a" / row["image"])
    expected = {"prompt": row["prompt"], "prompt_id": row["prompt_id"], "seed": row["seed"]}
    expected |= {"index": 0, "policy_hash": "w", "temperature": 0.7, "suite": suite.name}
    expected |= {"steps": 6, "guidance": 1.5, "engine": "transformers", "dtype": "float32"}
    assert expected.items() <= origin.items()
    Image.new("RGB", (8, 8)).save(tmp_path / "other.webp")
    assert read_origin(tmp_path / "other.webp") == {}


def test_the_folder_holds_its_prompts(tmp_path: Path) -> None:
    suite = toy_suite(3)
    evaluate(StandInPolicy(suite.records, 0.0), suite, tmp_path / "a", seeds=1, weights="w")
    lines = (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dict(record) for record in suite.records]


def test_a_new_folder_takes_over_the_same_evaluation(tmp_path: Path) -> None:
    suite = toy_suite(3)
    first = evaluate(StandInPolicy(suite.records, 0.3), suite, tmp_path / "a", seeds=2, weights="w")
    policy = StandInPolicy(suite.records, 0.3)
    second = evaluate(policy, suite, tmp_path / "b", seeds=2, weights="w")
    assert policy.generated == []
    assert second["policy"]["name"] == "b"
    assert second["overall"] == first["overall"]
    for row in load_results(tmp_path / "b").samples:
        assert (tmp_path / "b" / row["image"]).read_bytes() == (
            tmp_path / "a" / row["image"]
        ).read_bytes()
    # another temperature or policy is another evaluation
    for name, options in (("t", {"temperature": 0.5}), ("w", {"weights": "x"})):
        policy = StandInPolicy(suite.records, 0.3)
        evaluate(policy, suite, tmp_path / name, **({"seeds": 2, "weights": "w"} | options))
        assert len(policy.generated) == 6


def test_more_prompts_or_seeds_make_only_what_is_new(tmp_path: Path) -> None:
    suite = toy_suite(12)
    made = []
    for name, limit, seeds in (("a", 6, 2), ("b", 12, 2), ("c", 12, 3), ("d", 6, 1)):
        policy = StandInPolicy(suite.records, 0.3)
        evaluate(policy, suite, tmp_path / name, limit=limit, seeds=seeds, weights="w")
        made.append(len(policy.generated))
    assert made == [12, 12, 12, 0]
    fresh = StandInPolicy(suite.records, 0.3)
    evaluate(fresh, suite, tmp_path / "elsewhere" / "c", limit=12, seeds=3, weights="w")
    for key, row in read_samples(tmp_path / "elsewhere" / "c").items():
        other = read_samples(tmp_path / "c")[key]
        assert row["values"] == other["values"]
        assert row["seed"] == other["seed"]


def test_pictures_of_other_prompts_under_one_id_are_not_taken_over(tmp_path: Path) -> None:
    suite = toy_suite(2)
    evaluate(StandInPolicy(suite.records, 0.3), suite, tmp_path / "a", seeds=1, weights="w")
    first = dict(suite.records[0], metadata={**suite.records[0]["metadata"], "note": "changed"})
    policy = StandInPolicy(suite.records, 0.3)
    changed = replace(suite, records=(first, suite.records[1]))
    evaluate(policy, changed, tmp_path / "b", seeds=1, weights="w")
    assert [prompt for prompt, _ in policy.generated] == [first["prompt"]]


def test_all_neighbours_are_asked_and_broken_ones_passed_over(tmp_path: Path) -> None:
    suite = toy_suite(6)
    cut = CutOff(suite.records, 0.4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(cut, suite, tmp_path / "b", seeds=2, batch_size=4, weights="w")
    for name, text in (("a", "{"), ("c", (tmp_path / "b" / "settings.json").read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(text)
    (tmp_path / "c" / "samples.jsonl").write_text("damaged\n{}\n")
    rest = StandInPolicy(suite.records, 0.4)
    lines: list[str] = []
    told = SilentProgress()
    told.line = lines.append  # type: ignore[method-assign]
    evaluate(rest, suite, tmp_path / "d", seeds=2, weights="w", progress=told)
    assert len(rest.generated) == 4
    assert sum(line.startswith(f"passed over {tmp_path}") for line in lines) == 2
    # What was cut off while it took pictures over takes the rest when it is started again.
    whole = (tmp_path / "d" / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "images").mkdir()
    (tmp_path / "e" / "settings.json").write_text((tmp_path / "d" / "settings.json").read_text())
    (tmp_path / "e" / "samples.jsonl").write_text(whole[0][:20])
    again = StandInPolicy(suite.records, 0.4)
    assert evaluate(again, suite, tmp_path / "e", seeds=2, weights="w")["images"] == 12
    assert again.generated == []


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    suite = toy_suite(1)
    policy = StandInPolicy(suite.records, 0.0)
    with folder_lock(tmp_path / "a"), pytest.raises(UsageError, match="another process"):
        evaluate(policy, suite, tmp_path / "a", seeds=1, weights="w")
    assert evaluate(policy, suite, tmp_path / "a", seeds=1, weights="w")["images"] == 1


ODD = [3, [3], [{"label": "x"}], [{"box": [1, 2, "a", 4], "label": "x"}], None]


def test_details_of_any_shape_do_not_stop_an_evaluation(tmp_path: Path) -> None:
    suite = toy_suite(len(ODD))
    shapes = dict(zip([r["prompt_id"] for r in suite.records], ODD, strict=True))

    def score(image: Image.Image, record: Record) -> SampleScore:
        details = {"objects": shapes[record["prompt_id"]], "size": [48, 48]}
        return SampleScore({"strict": 1.0, "extra_objects": 0.0}, "", details)

    policy = StandInPolicy(suite.records, 0.0)
    odd = replace(suite, score=score)
    results = evaluate(policy, odd, tmp_path / "a", seeds=2, weights="w")
    assert results["layout_diversity"] is None
    assert build_report([tmp_path / "a"], tmp_path / "page").is_file()


def test_comparability_is_decided_by_what_was_scored(tmp_path: Path) -> None:
    suite = replace(toy_suite(3), not_comparable=None, pictures=2)

    def score(image: Image.Image, record: Record) -> SampleScore:
        told = suite.score(image, record)
        return replace(told, details={**told.details, "not_comparable": "another detector"})

    policy = StandInPolicy(suite.records, 0.0)
    judged = without_first(replace(suite, score=score))
    results = evaluate(policy, judged, tmp_path / "a", seeds=2, weights="w")
    assert results["suite"]["not_comparable"] == (
        "2 of 6 pictures could not be scored; another detector"
    )


def test_the_training_curve_follows_the_rule_of_results(tmp_path: Path) -> None:
    suite = toy_suite(8)  # tasks of one and two prompts
    wrong = suite.records[0]["prompt_id"]
    values = [float(record["prompt_id"] != wrong) for record in suite.records]
    scores = [SampleScore({"strict": v, "extra_objects": 0.0}, "") for v in values]
    by_id = dict(zip([r["prompt_id"] for r in suite.records], scores, strict=True))
    judged = replace(suite, score=lambda image, record: by_id[record["prompt_id"]])
    evaluate(StandInPolicy(suite.records, 0.0), judged, tmp_path / "a", seeds=1, weights="w")
    results = load_results(tmp_path / "a").results
    row = held_out_row(suite, scores)
    # one of six tasks is half right; over pictures it would be 7 / 8
    assert row["strict"] == results["overall"]["strict"]["mean"] == pytest.approx(5.5 / 6, abs=1e-6)
    assert next(iter(row)) == suite.headline
    tasks = results["tasks"]
    assert row["per_task"] == {t: facts["metrics"]["strict"]["mean"] for t, facts in tasks.items()}
    scores[1] = SampleScore({"strict": None, "extra_objects": None}, "")
    few = replace(suite, records=suite.records[:6])
    assert held_out_row(few, scores[:6])["strict"] is None


def test_the_training_curve_has_a_standard_error() -> None:
    suite = toy_suite(60)
    scores = [
        SampleScore({"strict": float(i % 3 > 0), "extra_objects": 0.0}, "") for i in range(60)
    ]
    rows = [(task_of(r), float(i % 3 > 0)) for i, r in enumerate(suite.records)]
    variances = []
    for task in dict.fromkeys(task for task, _ in rows):
        values = [value for name, value in rows if name == task]
        variances.append(float(np.var(values, ddof=1)) / len(values))
    expected = sum(variances) ** 0.5 / len(variances)
    assert held_out_row(suite, scores)["standard_error"] == pytest.approx(expected, abs=1e-6)


def test_an_unfinished_evaluation_is_taken_over_as_far_as_it_went(tmp_path: Path) -> None:
    suite = toy_suite(6)
    cut = CutOff(suite.records, 0.4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(cut, suite, tmp_path / "a", seeds=2, batch_size=4, weights="w")
    rest = StandInPolicy(suite.records, 0.4)
    results = evaluate(rest, suite, tmp_path / "b", seeds=2, weights="w")
    assert len(rest.generated) == 4
    assert results["images"] == 12


KILLED = """
import sys, time
from pathlib import Path
from eval_stand_in import StandInPolicy, toy_suite
from evals.run import evaluate

class Slow(StandInPolicy):
    def generate(self, prompts, **options):
        with open("made", "a") as file:
            file.writelines(f"{seed}\\n" for seed in options["seeds"])
        time.sleep(float(sys.argv[1]))
        return super().generate(prompts, **options)

suite = toy_suite(8)
evaluate(Slow(suite.records, 0.4), suite, Path("out"), seeds=2, batch_size=4, weights="w")
"""


def test_a_killed_run_loses_at_most_one_batch(tmp_path: Path) -> None:
    places = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", KILLED]
    process = subprocess.Popen([*command, "0.2"], cwd=tmp_path, env=environment)
    samples = tmp_path / "out" / "samples.jsonl"
    deadline = time.monotonic() + 60
    while not samples.exists() or samples.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = samples.read_bytes().count(b"\n")
    started = len((tmp_path / "made").read_text().split())
    assert started - kept <= 4
    subprocess.run([*command, "0"], cwd=tmp_path, env=environment, check=True)
    made = (tmp_path / "made").read_text().split()
    assert len(made) == started + 16 - kept
    assert len(set(made)) == 16
    assert load_results(tmp_path / "out").results["images"] == 16


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
    away, policy = without_first(suite), StandInPolicy(suite.records, 0.0)
    results = evaluate(policy, away, tmp_path / "a", seeds=2, weights="w")
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


@pytest.mark.parametrize(
    ("seeds", "limit", "reason"),
    [
        (4, None, None),
        (4, 12, None),
        (2, None, "2 pictures per prompt instead of 4"),
        (2, 6, "6 of 12 prompts were used; 2 pictures per prompt instead of 4"),
    ],
)
def test_only_the_whole_protocol_may_stand_beside_the_leaderboard(
    tmp_path: Path, seeds: int, limit: int | None, reason: str | None
) -> None:
    suite = replace(toy_suite(12), not_comparable=None, pictures=4)
    policy = StandInPolicy(suite.records, 0.0)
    results = evaluate(policy, suite, tmp_path / "a", seeds=seeds, limit=limit, weights="w")
    assert results["suite"]["not_comparable"] == reason


def test_prompts_of_one_cluster_are_resampled_together(tmp_path: Path) -> None:
    suite = toy_suite(12)
    one = [
        {**record, "cluster": f"fact {i // 2}", "metadata": {**record["metadata"], "tag": "one"}}
        for i, record in enumerate(suite.records)
    ]
    policy = StandInPolicy(suite.records, 0.5)
    grouped = evaluate(
        policy, replace(suite, records=tuple(one)), tmp_path / "a", seeds=2, weights="w"
    )["overall"]["strict"]
    assert grouped["clusters"] == 6
    assert grouped["samples"] == 24
    rows = load_results(tmp_path / "a").samples
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["cluster"], []).append(row["values"]["strict"])
    means = [sum(v) / len(v) for v in values.values()]
    centre = sum(means) / 6
    error = (sum((m - centre) ** 2 for m in means) / 5 / 6) ** 0.5  # of six equal clusters
    assert grouped["standard_error"] == pytest.approx(error, abs=1e-6)


def test_policy_hash_sees_every_weight(policy) -> None:
    before = policy_hash(policy)
    assert policy_hash(policy) == before
    with torch.no_grad():
        next(policy.vae.parameters()).view(-1)[-1] += 1
    assert policy_hash(policy) != before
