# SPDX-License-Identifier: MIT
"""Contention for memory between processes, as between the ranks of a distributed training.

In the baseline, one process with all threads steps all parameters. Otherwise several processes
divide the threads and CPUs. Each steps all parameters (plain data parallelism) or an equal share of
them (ZeRO, FSDP2). The gradients already exist, and the processes do not communicate.
"""

from __future__ import annotations

import contextlib
import time

from lines import PAUSE
from machine import available_bytes
from peers import PEERS
from processes import Worker
from rounds import SPARE_BYTES
from settings import Results, Settings, Tick

TITLE = "Several processes on one machine"

CONTENDER = "fusedadam"
RANKS = 2
SIZE = 1 << 26
QUICK_SIZE = 1 << 16
STEPS = 3
ARRAY_BYTES = 16  # per element: parameter, gradient and two moments


def ticks(settings: Settings) -> int:
    """One per round."""
    return settings.rounds


def run(settings: Settings, tick: Tick) -> Results:
    """Interleave the arrangements. The time of an arrangement is that of its slowest process."""
    size = QUICK_SIZE if settings.quick else SIZE
    case = f"{size:,}"
    # All arrangements keep their arrays: one set, one for each process, and one in shares.
    needed = (RANKS + 2) * ARRAY_BYTES * size + SPARE_BYTES
    if needed > available_bytes():
        for _ in range(settings.rounds):
            tick("no memory")
        return {"rows": [], "not_run": {case: f"memory: needs {needed / 2**30:.1f} GiB"}}
    alone, each = settings.threads, max(1, settings.threads // RANKS)
    arrangements = {
        "one process": [(size, alone, 0)],
        f"{RANKS} processes, all each": [(size, each, each * rank) for rank in range(RANKS)],
        f"{RANKS} processes, a share each": [
            (size // RANKS, each, each * rank) for rank in range(RANKS)
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in arrangements}
    with contextlib.ExitStack() as stack:
        workers = {
            name: [stack.enter_context(ready(*process)) for process in processes]
            for name, processes in arrangements.items()
        }
        for members in workers.values():
            slowest(members)  # warm-up
        for i in range(settings.rounds):
            for name, members in workers.items():
                time.sleep(PAUSE)
                seconds[name].append(slowest(members))
            tick(f"round {i + 1}")
    row = {
        "case": case,
        "dtype": "float32",
        "threads": settings.threads,
        "tensors": 1,
        "elements": size,
        "seconds": seconds,
    }
    return {"rows": [row], "not_run": {}}


def ready(elements: int, threads: int, first_cpu: int) -> Worker:
    """Return a worker with an optimizer of one tensor."""
    worker = Worker(PEERS[CONTENDER], threads, first_cpu)
    worker.receive()
    worker.ask("make", names=[CONTENDER], work=[1, elements, "float32", False])
    return worker


def slowest(workers: list[Worker]) -> float:
    """Let workers step at the same time, and return the seconds per step of the slowest."""
    for worker in workers:
        worker.send("time", name=CONTENDER, steps=STEPS, warm=True)
    return max([float(worker.receive()) for worker in workers])
