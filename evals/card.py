"""A model card in the Hugging Face format: what a policy is, its numbers and how it was made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.atomic import write_text
from common.errors import RunError, UsageError
from evals.pages import environment
from evals.report import format_range, format_value, markdown_text
from evals.results import ResultFolder

CARD = "README.md"
LIBRARY = "atelier"
"""The card's `library_name`, by which a card of ours is known."""
_UNKNOWN = ("unknown", "mixed")
"""Policy hashes of imported evaluations."""


@dataclass(frozen=True)
class PolicyFacts:
    """What a card says about a policy beside its numbers."""

    name: str
    image_size: int
    """Side of a picture, in pixels."""
    num_tokens: int
    edits: bool
    parameters: Mapping[str, int]
    """Part -> number of values."""
    provenance: Mapping[str, Any]
    license: str | None = None
    base_model: str | None = None
    """Name on the hub of the policy that it was trained from."""


def model_card(
    policy: PolicyFacts, results: Sequence[ResultFolder], recipe: str | None = None
) -> str:
    """Return the card: YAML metadata with a model index, and a page in Markdown.

    Every task of every result, and the overall score, is an entry of the index; its 95 % interval
    stands under the metric's `args`. `recipe` is the text of the recipe that trained the policy.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-to-image" if policy.edits else "text-to-image"
    found = [EvalResult(**entry) for result in results for entry in _entries(result, task)]
    data = ModelCardData(
        license=policy.license,
        library_name=LIBRARY,
        pipeline_tag=task,
        tags=["reinforcement-learning", "autoregressive", "diffusion"],
        base_model=policy.base_model,
        model_name=policy.name,
        eval_results=found or None,
    )
    templates = environment(
        autoescape=False, md=markdown_text, value=format_value, range=format_range
    )
    page = templates.get_template("card.md.j2").render(
        policy=policy,
        results=[(r, r.results, r.metrics) for r in results],
        recipe=recipe,
        fence=_fence(recipe or ""),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{page.strip()}\n"


def check_hashes(results: Sequence[ResultFolder], hashes: Mapping[str, str]) -> None:
    """Raise RunError for a result of another policy; `hashes` has the policy's for each type.

    An imported evaluation does not say whose pictures it judged: it cannot stand in a card.
    """
    for result in results:
        found = result.results["policy"]["hash"]
        if found in _UNKNOWN:
            raise RunError(
                f"{result.path} does not say which policy it judged.\n"
                "    Fix: leave it out, or import pictures that `atelier geneval export` wrote."
            )
        if found != hashes[number_format(result)]:
            raise RunError(
                f"{result.path} is an evaluation of another policy (hash {found[:12]}...).\n"
                "    Fix: evaluate this policy, and give that result folder."
            )


def number_format(result: ResultFolder) -> str:
    """Return the type in which the evaluated policy was loaded: its hash depends on it."""
    return str(result.results["settings"].get("dtype", "float32"))


def write_card(file: Path, text: str) -> None:
    """Write the card. Raises UsageError where the file holds another text than a card of ours."""
    if file.is_file() and not is_card(file):
        raise UsageError(
            f"{file} was not written by `atelier card`.\n"
            "    Fix: rename it, or write the card elsewhere with --out."
        )
    write_text(file, text)


def is_card(file: Path) -> bool:
    """Return whether the file is a card that `write_card` wrote."""
    text = file.read_text(encoding="utf-8", errors="replace")
    head = text.partition("\n---\n")[0]
    ours = re.search(rf"^library_name: {LIBRARY}$", head, re.MULTILINE)
    return text.startswith("---\n") and ours is not None


def _entries(result: ResultFolder, task: str) -> list[dict[str, Any]]:
    """Return the arguments of an EvalResult for each metric that has a value."""
    facts = result.results
    suite = facts["suite"]
    about = {
        "task_type": task,
        "dataset_type": suite["name"],
        "dataset_name": suite["title"],
        "dataset_revision": f"version {suite['version']}",
    }
    parts = {"overall": facts["overall"]}
    parts |= {name: entry["metrics"] for name, entry in facts["tasks"].items()}
    entries = [
        about
        | {
            "dataset_config": part,
            "metric_type": metric,
            "metric_name": result.metrics[metric].label,
            "metric_value": estimate["mean"],
            "metric_args": _spread(estimate)
            | {"prompts": estimate["clusters"], "pictures": estimate["samples"]},
        }
        for part, metrics in parts.items()
        for metric, estimate in metrics.items()
        if estimate is not None
    ]
    return entries + [
        about
        | {
            "dataset_config": "as published",
            "metric_type": name,
            "metric_name": name,
            "metric_value": value,
        }
        for name, value in facts.get("published", {}).items()
    ]


def _spread(estimate: Mapping[str, Any]) -> dict[str, list[float]]:
    known = estimate["low"] is not None
    return {"interval_95": [estimate["low"], estimate["high"]]} if known else {}


def _fence(text: str) -> str:
    """Return a code fence that is longer than any row of backticks in the text."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
