"""Build a report: one self-contained folder that says whether a policy got better, and shows it."""

import base64
import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from common.atomic import write_text
from common.errors import RunError
from evals.compare import DIVERSITY, compare_all
from evals.pages import TEMPLATES, environment
from evals.recipe_diff import recipe_diff
from evals.report_pictures import gallery
from evals.results import ResultFolder, load_results
from evals.suites import Metric
from evals.training_curves import load_training

_OWN = {"report.html", "report.md", "images"}
"""What a report folder holds."""


@dataclass(frozen=True)
class SuitePart:
    """Everything the templates need about the results of one suite, the baseline first."""

    number: int
    results: list[ResultFolder]
    comparisons: list[dict[str, Any]]
    pictures: dict[str, Any]

    @property
    def suite(self) -> dict[str, Any]:
        """The suite's facts as recorded in the baseline."""
        return dict(self.results[0].results["suite"])

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics, headline first."""
        return self.results[0].metrics

    @property
    def headline(self) -> str:
        """The name of the metric that decides."""
        return next(iter(self.metrics))

    @property
    def recipes(self) -> list[tuple[str, str, list[tuple[str, str, str]] | None]]:
        """For each comparison the two names, and in what the recipes differ (None: not known)."""
        first = self.results[0]
        return [
            (first.name, other.name, recipe_diff(_recipe(first), _recipe(other)))
            for other in self.results[1:]
        ]

    @property
    def tasks(self) -> list[str]:
        """The tasks of all results in order of appearance."""
        return list(dict.fromkeys(task for r in self.results for task in r.results["tasks"]))


def gpu_hours(results: Mapping[str, Any]) -> float | None:
    """Return the GPU-hours of an evaluation on one GPU; None where it used none or did not say."""
    if not str(results["settings"].get("device", "")).startswith("cuda"):
        return None
    return float(sum(results["seconds"].values())) / 3600


def _recipe(result: ResultFolder) -> str | None:
    recipe = result.results["policy"].get("recipe")
    return None if recipe is None else str(recipe)


def build_report(
    result_dirs: Sequence[Path | str],
    out_dir: Path | str,
    run_dir: Path | str | None = None,
    *,
    command: str | None = None,
    refresh_seconds: int | None = None,
) -> Path:
    """Write `out_dir`/report.html, report.md and images/, and return the path of report.html.

    Results of one suite are compared with the first of that suite (the baseline). `run_dir` is a
    training run whose metrics.jsonl is drawn; without results the page is about that run alone.
    `refresh_seconds` makes browsers load the page again that often. The folder opens without a
    network. An existing report is replaced; a folder with anything else raises RunError, as do
    unreadable results.
    """
    if not result_dirs and run_dir is None:
        raise RunError(
            "a report needs at least one result folder.\n    Fix: atelier report results/NAME"
        )
    out = Path(out_dir)
    for found in out.iterdir() if out.is_dir() else ():
        if found.name not in _OWN:
            raise RunError(
                f"{out} holds {found.name}, which is no part of a report.\n"
                "    Fix: give --out a new or an empty folder."
            )
    groups: dict[str, list[ResultFolder]] = {}
    for result in map(load_results, result_dirs):
        groups.setdefault(result.suite, []).append(result)
    training = load_training(Path(run_dir)) if run_dir is not None else None
    out.parent.mkdir(parents=True, exist_ok=True)
    # Not `atomic_dir`: flushing ten thousand pictures takes a minute; a report can be rebuilt.
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        temporary = Path(folder) / out.name
        temporary.mkdir()
        parts = [
            SuitePart(
                i, results, compare_all(results[0], results[1:]), gallery(results, i, temporary)
            )
            for i, results in enumerate(groups.values())
        ]
        facts = {
            "parts": parts,
            "training": training,
            "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": command,
            "refresh_seconds": refresh_seconds,
            "diversity": DIVERSITY,
        }
        write_text(temporary / "report.html", render_html(facts))
        write_text(temporary / "report.md", render_markdown(facts))
        if out.is_dir():
            shutil.rmtree(out)
        temporary.replace(out)
    return out / "report.html"


def render_html(facts: Mapping[str, Any]) -> str:
    """Return the page. Every value is escaped, and only the script of our own may run (CSP)."""
    environment = _environment(autoescape=True)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        **facts,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
    )


def render_markdown(facts: Mapping[str, Any]) -> str:
    """Return the same numbers as Markdown, without pictures."""
    return _environment(autoescape=False).get_template("report.md.j2").render(**facts)


def _environment(*, autoescape: bool) -> Environment:
    return environment(
        autoescape=autoescape,
        value=format_value,
        signed=format_signed,
        points=format_points,
        range=format_range,
        could=format_could,
        interval=format_interval,
        p=format_p,
        title_of=lambda task: str(task).replace("_", " "),
        packed=packed_block,
        md=markdown_text,
        duration=format_duration,
        gpu_hours=gpu_hours,
    )


def format_value(number: float | None, metric: Metric) -> str:
    """Return a rate as "62.5 %" and an amount as "0.43"; a missing number as "not scored"."""
    if number is None:
        return "not scored"
    return f"{100 * number:.1f}\u2009%" if metric.kind == "rate" else f"{number:.3f}"


def format_signed(number: float, metric: Metric) -> str:
    """Return a difference with its sign, a rate's in percentage points, with a true minus."""
    text = f"{100 * number:+.1f}" if metric.kind == "rate" else f"{number:+.3f}"
    return text.replace("-", "\u2212")


def format_points(size: float, metric: Metric) -> str:
    """Return the size of a difference without its sign, in the unit of `format_signed`."""
    return f"{100 * size:.1f}" if metric.kind == "rate" else f"{size:.3f}"


def format_interval(entry: Mapping[str, Any], metric: Metric) -> str:
    """Return "[low, high]" in the unit of `format_signed`, or that there is none."""
    if entry["low"] is None:
        return "no interval"
    return f"[{format_signed(entry['low'], metric)}, {format_signed(entry['high'], metric)}]"


def format_range(estimate: Mapping[str, Any] | None, metric: Metric) -> str:
    """Return "LOW to HIGH" in the unit of `format_value`, or that there is no interval."""
    if estimate is None or estimate["low"] is None:
        return "no interval"
    return f"{format_value(estimate['low'], metric)} to {format_value(estimate['high'], metric)}"


def format_could(entry: Mapping[str, Any], metric: Metric) -> str:
    """Return which difference would have been found, in the unit of `format_signed`."""
    if entry["minimum_detectable"] is None:
        return ""
    size = format_points(entry["minimum_detectable"], metric)
    points = " points" if metric.kind == "rate" else ""
    return f"A true difference of {size}{points} would be told from 0 four times in five."


def format_p(p_value: float) -> str:
    """Return a p-value with three digits, "< 0.001" below that."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def format_duration(seconds: float) -> str:
    """Return seconds as "850 ms", "4.2 s" or "3 min 20 s"."""
    if seconds < 0.001:
        return "under 1 ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def packed_block(value: object) -> str:
    """Return JSON, compressed (zlib) and in base64: ten thousand pictures' data in some 100 kB."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def markdown_text(value: object) -> str:
    """Return text that stays text in a Markdown table cell."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#~" else c for c in text)
