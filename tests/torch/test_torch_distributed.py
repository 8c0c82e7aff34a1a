# SPDX-License-Identifier: MIT
"""torch.distributed: AdamW under ZeRO, FSDP2 and distributed checkpoints, in real processes.

The checks are in distributed_checks.py. This file starts the processes once for all checks and
reports the outcome of each check separately.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch: Any = pytest.importorskip("torch")

# torch deprecates what its own functional optimizers use. ZeRO imports them.
TORCHS_OWN = "`torch.jit."
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", TORCHS_OWN, DeprecationWarning)
    import distributed_worker
    from distributed_checks import CHECKS
    from distributed_worker import RANKS, TIME_LIMIT_S

WORKER = Path(distributed_worker.__file__)


class Rank(NamedTuple):
    """What a process left: the outcomes of its checks, and its stderr."""

    outcomes: dict[str, str | None]
    status: int
    errors: str


def start(rank: int, directory: Path) -> subprocess.Popen[bytes]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("FUSEDADAM_", "OMP_"))},
        "OMP_NUM_THREADS": "1",
    }
    filters = ["-W", "error", "-W", f"ignore:{TORCHS_OWN}:DeprecationWarning"]
    with (directory / f"errors-{rank}.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, *filters, str(WORKER), str(rank), str(directory)],
            env=environment,
            stderr=errors,
        )


def left_by(rank: int, process: subprocess.Popen[bytes], directory: Path) -> Rank:
    # A rank that hangs exits by itself and prints its stack.
    status = process.wait(TIME_LIMIT_S + 30)
    outcomes = directory / f"outcomes-{rank}.json"
    return Rank(
        json.loads(outcomes.read_text("utf-8")) if outcomes.exists() else {},
        status,
        (directory / f"errors-{rank}.txt").read_text("utf-8"),
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    directory = tmp_path_factory.mktemp("ranks")
    processes = [start(rank, directory) for rank in range(RANKS)]
    try:
        yield [left_by(rank, process, directory) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(name: str, ranks: list[Rank]) -> None:
    problems = []
    for number, rank in enumerate(ranks[: CHECKS[name].ranks]):
        if name not in rank.outcomes:
            problems.append(f"rank {number} did not get to it:\n{rank.errors}")
        elif rank.outcomes[name] is not None:
            problems.append(f"rank {number}:\n{rank.outcomes[name]}")
    assert not problems, "\n".join(problems)


def test_processes_end_well(ranks: list[Rank]) -> None:
    assert [(rank.status, rank.errors) for rank in ranks] == [(0, "")] * RANKS
