"""Evaluate a policy on a suite: make pictures, score them, write a result folder.

Every picture has its own seed, made of the suite, the prompt and the sample's index alone, so two
policies draw the same random numbers, and a run that was cut off goes on where it stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image

from common.atomic import write_text
from common.errors import AtelierError
from common.journal import Journal
from common.lock import folder_lock
from common.progress import Progress, SilentProgress
from common.seeds import counter_seed
from evals.environment import environment
from evals.making import ImagePolicy, check_policy, make, not_supported
from evals.policy_hash import policy_hash
from evals.results import (
    IMAGES,
    PROMPTS,
    RESULTS,
    SAMPLES,
    SCHEMA,
    THUMBNAILS,
    Sample,
    append_samples,
    count_unscored,
    file_name,
    finished_samples,
    store_references,
    summarise,
    thumbnail,
    unscored,
    webp,
)
from evals.suites import Metric, Record, SampleScore, Suite, checked, load_suite, task_of
from evals.taking_over import claim, take_over

_NOT_SETTINGS = ("policy_hash", "suite", "suite_version", "prompts", "suite_settings")


def sample_seed(suite: str, prompt_id: str, index: int) -> int:
    """Return the seed of one picture; it does not depend on the policy or on how it is sampled."""
    return counter_seed(0, "evaluation", suite, prompt_id, index)


def evaluate(
    policy: ImagePolicy,
    suite: Suite | str,
    out_dir: Path | str,
    *,
    seeds: int = 4,
    temperature: float = 1.0,
    steps: int | None = None,
    guidance: float | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    name: str | None = None,
    weights: str | None = None,
    recipe: str | None = None,
    command: str | None = None,
    setup: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Make and score `seeds` pictures for each prompt, and return what results.json holds.

    `limit` is a number of prompts (tasks take turns). `name` is shown in reports and is the
    folder's name by default; `weights` is the policy's hash if it is already known; `recipe` (the
    YAML that the policy was trained with) and `command` are recorded; `setup` says how the policy
    was set up where that can change a picture (engine, type, device). An existing folder of the
    same evaluation is continued, picture by picture, or returned as it is when complete; a folder
    of another one (other policy hash, suite, prompts or settings) raises RunError naming what
    differs, and one that another process writes UsageError.
    Pictures that folders beside it hold of the same policy, prompt and settings are taken over, so
    that nothing is made twice.
    A sample whose scorer fails has None values and the reason, and is counted as unscored; the
    same call again scores it again from its stored picture, and no other folder takes it over.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    whole, suite = suite, suite.limited(limit)
    check_policy(policy, suite)
    progress = progress or SilentProgress()
    out = Path(out_dir)
    identity = {
        "policy_hash": weights or policy_hash(policy),  # type: ignore[arg-type]
        "suite": suite.name,
        "suite_version": suite.version,
        "prompts": _prompts_hash(suite.records),
        "limit": limit,
        "seeds": seeds,
        "temperature": temperature,
        "steps": policy.config.steps if steps is None else steps,
        "guidance": policy.config.guidance if guidance is None else guidance,
        **(setup or {}),
        "suite_settings": dict(suite.settings),
    }
    claim(out, identity)
    with folder_lock(out):
        if not (out / PROMPTS).is_file():
            records = (json.dumps(dict(r), ensure_ascii=False) + "\n" for r in suite.records)
            write_text(out / PROMPTS, "".join(records))
        store_references(out, suite)
        wanted = [(record, index) for record in suite.records for index in range(seeds)]
        done = finished_samples(out)
        lacking = not_supported(policy, suite)
        failed = [] if lacking else [key for key, row in done.items() if unscored(row, suite)]
        if suite.answers:  # their answers are not stored, so they are asked for again
            done = {key: row for key, row in done.items() if key not in failed}
            failed = []
        if len(done) == len(wanted) and not failed and (out / RESULTS).is_file():
            progress.line(f"{out} is complete: nothing to generate")
            return dict(json.loads((out / RESULTS).read_text(encoding="utf-8")))
        (out / RESULTS).unlink(missing_ok=True)  # a run cut off now must not leave an old summary
        Journal(out / SAMPLES)  # cuts off a row torn by a kill, before rows are added
        missing = {(r["prompt_id"], i) for r, i in wanted} - done.keys()
        done |= take_over(out, identity, missing, suite, progress)
        pending = [(r, i) for r, i in wanted if (r["prompt_id"], i) not in done]
        task = f"eval {suite.name}"
        progress.start(task, len(wanted))
        progress.advance(task, len(done) - len(failed))
        by_id = {record["prompt_id"]: record for record in suite.records}
        for start in range(0, len(failed), batch_size):
            before = [done[key] for key in failed[start : start + batch_size]]
            rows = _score_again(suite, before, [by_id[row["prompt_id"]] for row in before], out)
            append_samples(out, rows)
            done |= {(row["prompt_id"], row["index"]): row for row in rows}
            progress.advance(task, len(rows))
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            rows = _sample_batch(policy, suite, batch, identity, out)
            append_samples(out, rows)
            done |= {(row["prompt_id"], row["index"]): row for row in rows}
            progress.advance(task, len(batch))
        progress.finish(task)
        samples = [done[record["prompt_id"], i] for record, i in wanted]
        not_comparable = comparability(whole, seeds, limit, samples)
        facts: dict[str, Any] = {
            "policy": {
                "name": name or out.name,
                "hash": identity["policy_hash"],
                "recipe": recipe,
            },
            "suite": suite_facts(suite) | {"not_comparable": not_comparable},
            "settings": {key: v for key, v in identity.items() if key not in _NOT_SETTINGS},
            "command": command,
        }
        if lacking:
            facts["not_supported"] = lacking
        return write_results(out, samples, facts | published_numbers(suite, samples))


def comparability(
    suite: Suite, seeds: int, limit: int | None, samples: Sequence[Sample]
) -> str | None:
    """Return why finished scores must not stand beside a published leaderboard; None if they may.

    Besides what the suite says beforehand: pictures without a score, and what the scorer itself
    said about a picture (`not_comparable` among its details).
    """
    before = suite.comparability(seeds, limit)
    reasons = [before] if before else []
    if count := count_unscored(samples, suite.headline):
        reasons.append(f"{count} of {len(samples)} pictures could not be scored")
    told = {str(note) for s in samples if (note := s["details"].get("not_comparable"))}
    reasons += [note for note in sorted(told) if note not in (before or "")]
    return "; ".join(reasons) or None


def suite_facts(suite: Suite) -> dict[str, Any]:
    """Return what results.json says about a suite."""
    return {
        "name": suite.name,
        "title": suite.title,
        "version": suite.version,
        "not_comparable": suite.not_comparable,
        "settings": dict(suite.settings),
        "metrics": {key: asdict(metric) for key, metric in suite.metrics.items()},
    }


def published_numbers(suite: Suite, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return {"published": numbers} where the suite's publication aggregates in its own way."""
    scored = [sample for sample in samples if sample["values"][suite.headline] is not None]
    if suite.published is None or not scored:
        return {}
    return {"published": {key: round(x, 6) for key, x in suite.published(scored).items()}}


def write_results(out: Path, samples: Sequence[Sample], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise an evaluation's samples, write results.json and return what it holds.

    `facts` holds policy, suite, settings and command.
    """
    metrics = {name: Metric(**entry) for name, entry in facts["suite"]["metrics"].items()}
    results = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "prompts": len({sample["prompt_id"] for sample in samples}),
        "images": len(samples),
        **summarise(samples, metrics),
        "seconds": {
            stage: round(sum(sample["seconds"][stage] for sample in samples), 3)
            for stage in ("generate", "score")
        },
        "environment": environment(),
    }
    write_text(out / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _prompts_hash(records: Sequence[Record]) -> str:
    text = json.dumps([dict(record) for record in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sample_batch(
    policy: ImagePolicy,
    suite: Suite,
    batch: Sequence[tuple[Record, int]],
    identity: dict[str, Any],
    out: Path,
) -> list[Sample]:
    seeds = [sample_seed(suite.name, record["prompt_id"], index) for record, index in batch]
    started = time.perf_counter()
    images, made = make(policy, suite, [record for record, _ in batch], seeds, identity)
    generating = (time.perf_counter() - started) / len(batch)
    scores = _score_all(suite, made, [record for record, _ in batch])
    rows = []
    for (record, index), seed, image, (score, scoring) in zip(
        batch, seeds, images, scores, strict=True
    ):
        path = f"{IMAGES}/{file_name(record['prompt_id'], index)}"
        origin = {"prompt": record["prompt"], "prompt_id": record["prompt_id"], "index": index}
        data = webp(image, origin | {"seed": seed} | identity)
        # Not flushed: a picture cut short by a power cut has another size than its row says.
        (out / path).write_bytes(data)
        if (small := thumbnail(image)) is not None:
            (out / THUMBNAILS).mkdir(exist_ok=True)
            (out / THUMBNAILS / Path(path).name).write_bytes(small)
        rows.append(
            {
                "prompt_id": record["prompt_id"],
                "index": index,
                "prompt": record["prompt"],
                "task": task_of(record),
                "cluster": record.get("cluster", record["prompt_id"]),
                "seed": seed,
                "image": path,
                "bytes": len(data),
                **asdict(score),
                "seconds": {
                    "generate": round(generating, 6),
                    "score": round(scoring, 6),
                },
            }
        )
    return rows


def _score_again(
    suite: Suite, before: Sequence[Sample], records: Sequence[Record], out: Path
) -> list[Sample]:
    """Return the rows of samples that had no score, scored from their stored pictures."""
    pictures = []
    for row in before:
        with Image.open(out / row["image"]) as stored:
            pictures.append(stored.convert("RGB"))
    return [
        {**row, **asdict(score), "seconds": {**row["seconds"], "score": round(seconds, 6)}}
        for row, (score, seconds) in zip(before, _score_all(suite, pictures, records), strict=True)
    ]


def _score_all(
    suite: Suite, made: Sequence[Any], records: Sequence[Record]
) -> list[tuple[SampleScore, float]]:
    score = partial(_score, suite)
    if suite.workers == 1:  # in this thread, which Ctrl-C reaches
        return list(map(score, made, records))
    futures = [Future[tuple[SampleScore, float]]() for _ in records]
    rest = iter(list(zip(futures, made, records, strict=True)))
    try:
        for _ in range(suite.workers):
            # A daemon: neither Ctrl-C nor the interpreter's end waits for a judge that hangs.
            Thread(target=_take_jobs, args=(rest, score), daemon=True).start()
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _take_jobs(rest: Iterable[tuple[Future[Any], Any, Record]], score: Callable[..., Any]) -> None:
    """Score what is left, beside other threads that do the same, until it is done or cancelled."""
    for future, made, record in rest:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(score(made, record))
        except BaseException as error:  # raised where the scores are collected
            future.set_exception(error)


def _score(suite: Suite, made: Any, record: Record) -> tuple[SampleScore, float]:
    """Return what the scorer says of a picture or of answers, and the seconds that it took."""
    started = time.perf_counter()
    if isinstance(made, str):
        return SampleScore(dict.fromkeys(suite.metrics), f"not supported: {made}"), 0.0
    try:
        score = checked(suite.score(made, record), suite)
    except AtelierError as error:
        score = SampleScore(dict.fromkeys(suite.metrics), f"could not be scored: {error}")
    return score, time.perf_counter() - started
