"""Fixtures and rules for every test."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from common.heavy import prepare_torchvision

# An example is given 0.2 s by default, which a test that loses its core for a moment exceeds.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Tests may import transformers and its relatives before any of our packages.
prepare_torchvision()

if TYPE_CHECKING:
    from policy import Policy


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with random weights, saved once; nobody writes into it."""
    from tiny_policy import new_policy

    folder = tmp_path_factory.mktemp("policy") / "tiny"
    new_policy().save_pretrained(folder)
    return folder


@pytest.fixture
def policy(policy_folder: Path) -> "Policy":
    """The tiny policy, freshly loaded: a test may change it."""
    from policy import Policy

    return Policy.from_pretrained(policy_folder)


@pytest.fixture(scope="session", autouse=True)
def sigint_heard() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt, also where a shell started the tests in the background: Python
    finds it ignored there, and leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small CLIP with random weights: the arguments `model` and `weights` that load it."""
    from tiny_networks import save_tiny_clip

    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which no test was executed (all of them skipped, say) has proved nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != pytest.ExitCode.OK:
        return
    executed = any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "xfailed"))
    if not executed and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
