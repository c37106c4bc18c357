"""GenEval itself: the official 553 prompts, judged by the official rules.

Source: Ghosh et al., GenEval (2023); djghosh13/geneval, `prompts/evaluation_metadata.jsonl`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError
from evals.suites.options import check_options
from evals.suites.suite import Metric, Record, SampleScore, Suite
from rewards.detector import DETECTORS, Detector
from rewards.geneval import geneval

SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
TASK_SIZES = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
PICTURES = 4
_MIRROR = {"right of": "left of", "below": "above"}


def geneval_official(prompts: str, detector: str = "mask2former", **detector_options: str) -> Suite:
    """Build the suite from the official `evaluation_metadata.jsonl`, which the user supplies.

    `detector` is a registered detector, made with the further options (such as the place of its
    weights); only the published one with its published weights gives scores that may stand beside
    the leaderboard.
    """
    records = read_official(Path(prompts))
    make = DETECTORS.get(detector)
    check_options(f"detector `{detector}`", make, detector_options)
    judge = make(**detector_options)
    return geneval_suite("geneval", "GenEval", records, judge, pictures=PICTURES)


def read_official(file: Path) -> tuple[dict[str, Any], ...]:
    """Return the 553 prompt records; `prompt_id` is the line's number, as in the official folders.

    Raises DataError if the file is missing or is not, byte for byte, the official one.
    """
    if not file.is_file():
        raise DataError(
            f"{file}: no such file.\n"
            "    Fix: give prompts=FILE, the evaluation_metadata.jsonl of djghosh13/geneval."
        )
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise DataError(
            f"{file} is not the official prompt list: its sha256 is {digest[:12]}..., not "
            f"{SHA256[:12]}...\n"
            "    Fix: get prompts/evaluation_metadata.jsonl of djghosh13/geneval again."
        )
    rows = map(json.loads, data.decode("utf-8").splitlines())
    return tuple(
        {
            "prompt": row["prompt"],
            "prompt_id": f"{number:05d}",
            "cluster": asked_for(row),
            "metadata": row,
        }
        for number, row in enumerate(rows)
    )


def geneval_suite(
    name: str,
    title: str,
    records: Sequence[Record],
    detector: Detector,
    pictures: int | None = None,
) -> Suite:
    """Return a suite over records in GenEval's format, judged by its rules with that detector."""

    def score(image: Image.Image, record: Record) -> SampleScore:
        [judged] = geneval(
            [image],
            [record["metadata"]],
            detector=detector,
            strict_weight=1,
            soft_weight=0,
            extra_penalty=0,
        )
        details = judged.details
        return SampleScore(
            {
                "strict": details.get("strict"),
                "soft": details.get("soft"),
                "extra_objects": details.get("extra"),
            },
            judged.reason or "every clause holds",
            details,
        )

    return Suite(
        name=name,
        title=title,
        version=1,
        records=tuple(records),
        score=score,
        metrics={
            "strict": Metric("GenEval accuracy (strict)"),
            "soft": Metric("Soft score", "amount"),
            "extra_objects": Metric("Extra objects per picture", "amount", "lower"),
        },
        not_comparable=detector.not_comparable,
        settings={"detector": detector.name},
        pictures=pictures,
    )


def asked_for(metadata: Mapping[str, Any]) -> str:
    """Return one text for all prompts that ask for the same fact.

    "A left of B" and "B right of A", or "A and B" and "B and A", are the same: a policy that can
    draw the one mostly can draw the other. Suites give it as the `cluster` of a record, so that
    such prompts do not count as independent ones.
    """
    include = metadata["include"]
    names = [
        " ".join(filter(None, [str(clause["count"]), clause.get("color"), clause["class"]]))
        for clause in include
    ]
    facts = sorted(names)
    for name, clause in zip(names, include, strict=True):
        if "position" in clause:
            relation, target = clause["position"]
            pair = [name, names[target]]
            if relation in _MIRROR:
                relation = _MIRROR[relation]
                pair.reverse()
            facts.append(f"{pair[0]} {relation} {pair[1]}")
    facts += sorted(f"fewer than {c['count']} {c['class']}" for c in metadata.get("exclude", []))
    return "; ".join(facts)
