# SPDX-License-Identifier: MIT
"""Run code in a separate interpreter: imports, environment variables, hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# An interpreter that hangs is killed, so a deadlock fails the test and does not block the run. The
# failure shows where its threads were.
TIME_LIMIT_S = 120

# Environment of a process whose coverage is not measured, though that of its parent is.
NO_COVERAGE = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}


def run_python(
    code: str, *, environment: dict[str, str] | None = None, time_limit: float = TIME_LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run `code` with the test helpers importable. Kill it after `time_limit` seconds."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDADAM_", "OMP_"))}
    tests = Path(__file__).parents[1]
    folders = [str(tests / name) for name in ("support", "process", "checkpoint")]
    paths = [*folders, inherited.get("PYTHONPATH", "")]
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-X", "faulthandler", "-W", "error", "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command,
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = _output_or_stacks(process, time_limit)
        except BaseException:
            if process.returncode is None:
                _signal(process, "SIGKILL")
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _output_or_stacks(process: subprocess.Popen[str], time_limit: float) -> tuple[str, str]:
    try:
        return process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        # faulthandler then writes the stacks of all threads.
        _signal(process, "SIGABRT")
        stacks = process.communicate(timeout=10)[1]
        pytest.fail(f"no end after {time_limit} s:\n{stacks}")


def _signal(process: subprocess.Popen[str], name: str) -> None:
    """Signal the process and its children, which may be what hangs."""
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, getattr(signal, name))


def output_of(code: str, *, environment: dict[str, str] | None = None) -> str:
    """Return the output of `code`. Fails with its stderr if the exit status is not 0."""
    done = run_python(code, environment=environment)
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stderr}"
    return done.stdout.strip()
