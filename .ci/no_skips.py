# SPDX-License-Identifier: MIT
"""A pytest plugin (`-p no_skips`) for environments that have all the tests need: a skip fails the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn a passed run with skipped tests or modules into a failed one."""
    reporter: TerminalReporter | None = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Say why the run failed."""
    if skipped := terminalreporter.stats.get("skipped"):
        terminalreporter.write_line(f"no_skips: {len(skipped)} skipped, none allowed", red=True)
