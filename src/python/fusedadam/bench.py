# SPDX-License-Identifier: MIT
"""`python -m fusedadam bench`: the speed of a step on this machine, beside that of its memory.

Exchanging parameters with their averages reads and writes two arrays and computes nothing, on the
same threads as a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import numpy as np

import fusedadam

SIZES: Final = {"small": 1_000, "in cache": 1 << 18, "in memory": 1 << 25}
SECONDS: Final = 2.5  # of each row and kind of call
# Bytes of an element that a call reads and writes.
STEP_BYTES, EXCHANGE_BYTES = 28, 16


def seconds_of(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, for `SECONDS`. The first calls warm up."""
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    count = 1
    while (begin := time.perf_counter()) < end or len(found) < 3:
        for _ in range(count):
            call()
        found.append((time.perf_counter() - begin) / count)
        count = max(1, round(1e-3 / found[-1]))  # 1 ms, so that the clock costs nothing
    return statistics.median(found[1:])


def bench() -> None:
    """Print a table of float32 steps of one tensor."""
    print(f"{fusedadam.active_isa()}, {fusedadam.get_num_threads()} threads, float32")
    print(f"{'':<10}{'elements':>12}{'step':>14}{'GB/s':>8}{'memory alone':>18}")
    for name, size in SIZES.items():
        param, grad = np.ones(size, np.float32), np.full(size, 1e-3, np.float32)
        step, exchange = fusedadam.Adam(), fusedadam.Adam(use_ema=True)
        exchange.build([param])
        pairs = [(grad, param)]
        seconds = seconds_of(lambda: step.apply_gradients(pairs))  # noqa: B023 - called here
        moved = size * STEP_BYTES / seconds / 1e9
        line = f"{name:<10}{size:>12,}{seconds * 1e6:>11,.1f} us{moved:>8.1f}"
        if size > SIZES["small"]:  # which costs mostly the call
            alone = size * EXCHANGE_BYTES / seconds_of(exchange.swap_ema) / 1e9
            line += f"{alone:>13.1f} GB/s"
        print(line, flush=True)
