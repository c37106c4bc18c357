"""The registry of benchmark suites. A suite's module is imported when the suite is first loaded."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from common.errors import DataError
from common.registry import Registry
from evals.suites.identity import option_content, source_hash
from evals.suites.options import check_options
from evals.suites.suite import Metric, Record, SampleScore, Suite, checked, task_of

__all__ = [
    "Metric",
    "Record",
    "SampleScore",
    "Suite",
    "checked",
    "list_suites",
    "load_suite",
    "register_suite",
    "task_of",
]

SuiteBuilder = Callable[..., Suite]
"""Builds a suite; its parameters are the suite's options (texts, as typed on a command line)."""

_suites = Registry("suite", group="atelier.suites")
_suites.add("dpg-bench", "evals.suites.dpg_bench:dpg_bench")
_suites.add("edit-scenes", "evals.suites.edit_scenes:edit_scenes")
_suites.add("gedit", "evals.suites.gedit:gedit")
_suites.add("geneval", "evals.suites.geneval:geneval_official")
_suites.add("geneval-scenes", "evals.suites.geneval_scenes:geneval_scenes")
_suites.add("hps-v2", "evals.suites.hps_v2:hps_v2")
_suites.add("image-reward", "evals.suites.image_reward:image_reward")
_suites.add("imgedit", "evals.suites.imgedit:imgedit")
_suites.add("mmbench", "evals.suites.mmbench:mmbench")
_suites.add("mmmu", "evals.suites.mmmu:mmmu")
_suites.add("ocr-scenes", "evals.suites.ocr_scenes:ocr_scenes")
_suites.add("pick-score", "evals.suites.pick_score:pick_score")
_suites.add("prompt-file", "evals.suites.prompt_file:prompt_file")
_suites.add("seed-bench", "evals.suites.seed_bench:seed_bench")
_suites.add("textvqa", "evals.suites.textvqa:textvqa")
_suites.add("wise", "evals.suites.wise:wise")


def register_suite(name: str) -> Callable[[SuiteBuilder], SuiteBuilder]:
    """Make a function that builds a suite known under `name` (decorator).

    Packages offer theirs through the entry-point group `atelier.suites` instead. Raises
    AtelierError if the name is taken.
    """

    def register(builder: SuiteBuilder) -> SuiteBuilder:
        _suites.add(name, builder)
        return builder

    return register


def list_suites() -> list[str]:
    """Return the names of all suites that can be loaded, sorted."""
    return _suites.names()


def load_suite(
    name: str, limit: int | None = None, options: Mapping[str, str] | None = None
) -> Suite:
    """Build a suite with its options, with at most `limit` prompts (tasks take turns).

    Its `settings` are completed by the options (files by their content) and, for a suite that is
    not our own, by a hash of the file that builds it: they decide what is scored, and a change must
    not go unnoticed. Raises AtelierError for an unknown name, naming the nearest one, UsageError
    for an option that the suite lacks or needs, and DataError for two prompts under one id.
    """
    builder: SuiteBuilder = _suites.get(name)
    chosen = dict(options or {})
    check_options(f"suite `{name}`", builder, chosen)
    suite = builder(**chosen)
    _check_ids(suite)
    facts = {option: option_content(value) for option, value in chosen.items()}
    if not builder.__module__.startswith(f"{__name__}."):
        facts["source"] = source_hash(builder)
    return replace(suite, settings={**facts, **suite.settings}).limited(limit)


def _check_ids(suite: Suite) -> None:
    """Raise DataError for two prompts under one id: their pictures would overwrite each other."""
    prompts: dict[str, str] = {}
    for record in suite.records:
        name = record["prompt_id"]
        if name in prompts:
            raise DataError(
                f"suite `{suite.name}` has two prompts with the id {name!r}: {prompts[name]!r} and "
                f"{record['prompt']!r}.\n    Fix: give each prompt an id of its own; of files that "
                "rewrite the same prompts, keep one set."
            )
        prompts[name] = record["prompt"]
