# SPDX-License-Identifier: MIT
"""The first step, which needs memory for the moments, against a later step.

In a fresh process, the operating system has to allocate and clear that memory ("fresh"). Then a
second optimizer in the same process reuses the freed memory of the first ("recycled").

A virtual machine may have returned free memory to its host. To get it back takes longer than
everything that is measured here, so the parent process touches and frees that much memory before
each measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from lines import WorkerError
from peers import PEERS
from processes import Worker
from rounds import chosen

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "First step"

NAMES = ("fusedadam", "torch fused")
SIZE, QUICK_SIZE = 1 << 26, 1 << 20
# Each repetition takes a few seconds, since it starts a process and fills its arrays.
MOST_ROUNDS = 7
# Per element: twice the size of the arrays.
MACHINE_BYTES = 32
PARTS = ("build", "first", "later")


def repetitions(settings: Settings) -> int:
    """Return the number of processes per contender."""
    return min(settings.rounds, MOST_ROUNDS)


def ticks(settings: Settings) -> int:
    """One per process."""
    return repetitions(settings) * len(chosen(NAMES))


def run(settings: Settings, tick: Tick) -> Results:
    """Time making the optimizer, its first step and the median of some later steps."""
    size = QUICK_SIZE if settings.quick else SIZE
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    not_run: dict[str, str] = {}
    for _ in range(repetitions(settings)):
        for name in chosen(NAMES):
            tick(name)
            with Worker(PEERS[name], settings.threads) as worker:
                try:
                    worker.receive()
                    wrong = worker.ask("error", name=name, dtype="float32", tail=False)
                    back_memory(MACHINE_BYTES * size)
                    work = [1, size, "float32", False]
                    timings = worker.ask("first_steps", work=work, times=2)
                except WorkerError as error:
                    not_run[name] = str(error)
                    continue
            if wrong:
                not_run[name] = f"wrong result: {wrong}"
                continue
            for memory, seconds in zip(("fresh", "recycled"), timings, strict=True):
                row = rows.setdefault((name, memory), new_row(name, memory, size))
                for part, value in zip(PARTS, seconds, strict=True):
                    row[part].append(value)
    return {"rows": list(rows.values()), "not_run": not_run}


def back_memory(size: int) -> None:
    """Touch and free this much memory, so that the host backs it."""
    np.ones(size, np.uint8)


def new_row(name: str, memory: str, size: int) -> dict[str, Any]:
    """Return a row without times."""
    row: dict[str, Any] = dict.fromkeys(PARTS)
    return {
        "case": f"{size / 2**20:.0f}M",
        "elements": size,
        "memory": memory,
        "contender": name,
        **{part: [] for part in row},
    }
