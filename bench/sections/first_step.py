# SPDX-License-Identifier: MIT
"""The first step, which needs memory for the moments, beside a later one.

In a fresh process the system has to find and clear that memory. Afterwards another optimizer is made
in the same process, where the first one's memory has become free: what was "fresh" is "recycled".
A virtual machine may have given free memory back to its host, which takes longer to return it than
all that is measured here; so the memory is touched, and freed, just before each process needs it.
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
# Each repetition starts a process and fills its arrays, some seconds.
MOST_ROUNDS = 7
# Twice what the arrays need.
MACHINE_BYTES = 32
PARTS = ("build", "first", "later")


def repetitions(settings: Settings) -> int:
    """Return how many processes each contender has."""
    return min(settings.rounds, MOST_ROUNDS)


def ticks(settings: Settings) -> int:
    """One a process."""
    return repetitions(settings) * len(chosen(NAMES))


def run(settings: Settings, tick: Tick) -> Results:
    """Time making the optimizer, the first step and the median of some later ones."""
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
    """Write to so many bytes of memory and free them: the machine has them then."""
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
