# SPDX-License-Identifier: MIT
"""A pytest plugin (`-p no_skips`) that fails a run with skipped tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if tests or modules were skipped."""
    reporter: TerminalReporter | None = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Report why the run failed."""
    if skipped := terminalreporter.stats.get("skipped"):
        terminalreporter.write_line(f"no_skips: {len(skipped)} skipped, none allowed", red=True)
