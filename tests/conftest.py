"""Fixtures and rules for every test."""

import pytest

from common.heavy import prepare_torchvision

# Tests may import transformers and its relatives before any of our packages.
prepare_torchvision()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which no test was executed (all of them skipped, say) has proved nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != pytest.ExitCode.OK:
        return
    executed = any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "xfailed"))
    if not executed and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
