# SPDX-License-Identifier: MIT
"""The peak memory of a process, which should be that of parameters, gradients and moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lines import WorkerError
from machine import available_bytes
from peers import PEERS, TEMPORARIES
from processes import Worker
from rounds import SPARE_BYTES, chosen

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "Memory at peak"

NAMES = ("fusedadam", "torch fused", "torch foreach", "deepspeed", "optax", "numpy")
SIZES = (1 << 26, 1 << 28)
QUICK_SIZES = (1 << 20,)
ITEM = 4  # bytes of a float32
ARRAYS = 4  # parameter, gradient and two moments


def ticks(settings: Settings) -> int:
    """One per process."""
    return len(QUICK_SIZES if settings.quick else SIZES) * len(chosen(NAMES))


def run(settings: Settings, tick: Tick) -> Results:
    """Measure each contender in its own process, from the first array to the third step."""
    rows = []
    not_run = []
    for size in QUICK_SIZES if settings.quick else SIZES:
        for name in chosen(NAMES):
            tick(f"{name}, {size:,}")
            try:
                baseline, peak = measured(name, size, settings.threads)
            except WorkerError as error:
                not_run.append({"contender": name, "elements": size, "reason": str(error)})
                continue
            rows.append(
                {
                    "contender": name,
                    "elements": size,
                    "peak_bytes": peak,
                    "baseline_bytes": baseline,
                    "expected_bytes": ARRAYS * ITEM * size,
                }
            )
    return {"rows": rows, "not_run": not_run}


def measured(name: str, size: int, threads: int) -> tuple[int, int]:
    """Return the bytes before the first array is made, and the peak after that."""
    most = (ARRAYS + TEMPORARIES.get(name, 0)) * ITEM * size + SPARE_BYTES
    if most > available_bytes():
        raise WorkerError(f"memory: may need {most / 2**30:.1f} GiB")
    with Worker(PEERS[name], threads) as worker:
        worker.receive()
        baseline, peak = worker.ask("memory", name=name, work=[1, size, "float32", False])
    return baseline, peak
