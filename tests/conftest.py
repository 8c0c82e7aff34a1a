# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusedadam
import fuzz_runs
import hypothesis
import numpy as np
import pytest
import threadpoolctl
from at_once import Ticks
from helpers import running
from training import Training

# Derandomized where a result gates a change, so that a failure can be reproduced.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)


def pytest_report_header() -> list[str]:
    """Report what determines speed and bits, so that a pasted report shows where it ran."""
    openmp = [
        f"{Path(info['filepath']).name} ({info['num_threads']} threads)"
        for info in threadpoolctl.threadpool_info()
        if info["user_api"] == "openmp"
    ]
    isas = ", ".join(fusedadam.supported_isas())
    return [
        f"fusedadam {fusedadam.__version__}, NumPy {np.__version__}, CPU: {_cpu()}",
        f"instruction sets: {isas} (active: {fusedadam.active_isa()})",
        f"threads: {fusedadam.get_num_threads()}, OpenMP: {', '.join(openmp) or 'none'}",
    ]


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = cpuinfo.exists() and re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text("utf-8"))
    return model[1] if model else platform.processor() or platform.machine()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Print the seed before any test runs, because a fault at a guard page ends the process."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and fuzz_runs.TALLIES:
        reporter.write_line(f"FUSEDADAM_FUZZ_SEED={fuzz_runs.SEED}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report what the fuzz tests tried, so that a document can quote it."""
    tried = {name: counts for name, counts in fuzz_runs.TALLIES.items() if counts}
    if not tried:
        return
    terminalreporter.section(f"fuzzing, FUSEDADAM_FUZZ_SEED={fuzz_runs.SEED}")
    for name, counts in tried.items():
        said = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
        terminalreporter.write_line(f"{name}: {said}")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260801)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a checkpoint in an otherwise empty directory."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    return directory / "adam.safetensors"


@pytest.fixture
def training() -> Training:
    """An optimizer in the middle of a training, with its oracle."""
    made = Training(lr=0.01, amsgrad=True)
    made.step(3)
    return made


@pytest.fixture(params=fusedadam.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with running(isa=name):
        yield name


@pytest.fixture(params=[1, 2, 3], ids="threads={}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    count: int = request.param
    with running(threads=count):
        yield count


@pytest.fixture
def ticks() -> Iterator[Ticks]:
    with Ticks.running() as ticks:
        yield ticks
