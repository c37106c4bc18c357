"""The registry of benchmark suites. A suite's module is imported when the suite is first loaded."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

from common.errors import DataError
from common.registry import Registry
from evals.suites.identity import option_content, source_hash
from evals.suites.options import check_options
from evals.suites.suite import Metric, Record, SampleScore, Suite, checked, in_turn, task_of

__all__ = [
    "Metric",
    "Record",
    "SampleScore",
    "Suite",
    "checked",
    "in_turn",
    "list_suites",
    "load_suite",
    "register_suite",
    "suite_summary",
    "task_of",
]

SuiteBuilder = Callable[..., Suite]
"""Builds a suite; its parameters are the suite's options (texts, as typed on a command line)."""

_BUILT_IN = {
    "dpg-bench": (
        "dpg_bench:dpg_bench",
        "long prompts, a judge answers yes or no (1065 x 4)",
        "with mPLUG, by the official script",
    ),
    "edit-scenes": (
        "edit_scenes:edit_scenes",
        "edited scenes, by exact rules",
        "no, the scene world",
    ),
    "gedit": (
        "gedit:gedit",
        "GEdit-Bench: edits in eleven groups, a judge's marks (606)",
        "no, asked in our own words",
    ),
    "geneval": (
        "geneval:geneval_official",
        "objects, counts, colours, positions, by a detector (553 x 4)",
        "yes, with the published detector",
    ),
    "geneval-scenes": (
        "geneval_scenes:geneval_scenes",
        "GenEval's six tasks in the scene world (92)",
        "no, the scene world",
    ),
    "hps-v2": (
        "hps_v2:hps_v2",
        "HPS v2.1 in four styles (3200)",
        "not checked: no checksum is published",
    ),
    "image-reward": (
        "image_reward:image_reward",
        "ImageReward (100 x 10, or DrawBench's 200)",
        "not checked: no checksum is published",
    ),
    "imgedit": (
        "imgedit:imgedit",
        "ImgEdit-Bench: edits of nine types, a judge's marks (737)",
        "not checked: no checksum is published",
    ),
    "mmbench": (
        "mmbench:mmbench",
        "questions, choices in every order",
        "no, unclear answers are wrong",
    ),
    "mmmu": (
        "mmmu:mmmu",
        "college questions of thirty subjects (900)",
        "no, asked in our own words",
    ),
    "ocr-scenes": (
        "ocr_scenes:ocr_scenes",
        "words on signs, read by RapidOCR",
        "no, the scene world",
    ),
    "pick-score": (
        "pick_score:pick_score",
        "PickScore over a file of prompts",
        "no, there is no common list",
    ),
    "prompt-file": (
        "prompt_file:prompt_file",
        "any reward over a file of prompts",
        "no, the prompts are yours",
    ),
    "seed-bench": (
        "seed_bench:seed_bench",
        "questions about pictures, four choices",
        "no, letters are read, not ranked",
    ),
    "textvqa": (
        "textvqa:textvqa",
        "questions about text in photographs (5000)",
        "no, asked in our own words",
    ),
    "wise": (
        "wise:wise",
        "prompts that take knowledge, a judge's marks (1000)",
        "no, asked in our own words",
    ),
}
"""Name -> where it is built, what it is (prompts x pictures), and whether beside a leaderboard."""

_suites = Registry("suite", group="atelier.suites")
for _name, (_place, *_) in _BUILT_IN.items():
    _suites.add(_name, f"evals.suites.{_place}")


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


def suite_summary(name: str) -> str:
    """Return a suite in a line: what it asks, how many prompts, whether beside a leaderboard.

    Of one that is not our own it is the first line of what its builder says about itself.
    """
    if name in _BUILT_IN:
        _, what, leaderboard = _BUILT_IN[name]
        return f"{what}; leaderboard: {leaderboard}"
    return (inspect.getdoc(_suites.get(name)) or "its builder has no docstring").split("\n")[0]


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
