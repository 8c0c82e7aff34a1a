# SPDX-License-Identifier: MIT
"""Steps of up to a billion parameters, interleaved with steps of the first 64M of them.

The memory speed of a shared machine changes by as much as half from minute to minute. Only times of
the same round show how the time grows with the size.
"""

from __future__ import annotations

import time

import child
from machine import available_bytes
from settings import Results, Settings, Tick

TITLE = "Up to a billion parameters"

PART = 1 << 26
SIZES = (1 << 28, 1 << 29, 1_000_000_000)
QUICK_PART = 1 << 20
QUICK_SIZES = (1 << 21,)
MOST_ROUNDS = 9
# Per element: float32 parameter, gradient and two moments; two more moments for the part.
BYTES, BYTES_OF_PART = 16, 8
SPARE_BYTES = 1 << 30


def ticks(settings: Settings) -> int:
    """One per size."""
    return len(QUICK_SIZES if settings.quick else SIZES)


def run(settings: Settings, tick: Tick) -> Results:
    """Time each size in its own process."""
    part, sizes = (QUICK_PART, QUICK_SIZES) if settings.quick else (PART, SIZES)
    rows, not_run = [], {}
    for size in sizes:
        name = f"1 x {size:,}"
        needed = BYTES * size + BYTES_OF_PART * part + SPARE_BYTES
        if needed > available_bytes():
            not_run[name] = f"memory: needs {needed / 2**30:.1f} GiB"
        else:
            rounds = min(settings.rounds, MOST_ROUNDS)
            whole, piece = child.call(measure, size, part, rounds, settings.threads)
            rows.append(
                {
                    "case": name,
                    "dtype": "float32",
                    "threads": settings.threads,
                    "tensors": 1,
                    "elements": size,
                    "part": part,
                    "seconds": {"fusedadam": whole, "part": piece},
                }
            )
        tick(name)
    return {"rows": rows, "not_run": not_run}


def measure(size: int, part: int, rounds: int, threads: int) -> list[list[float]]:
    """Return the seconds of steps of all elements, and of interleaved steps of the first `part`."""
    import fusedadam
    import numpy as np

    fusedadam.set_num_threads(threads)
    param, grad = np.ones(size, np.float32), np.full(size, 1e-3, np.float32)
    whole, piece = fusedadam.Adam(), fusedadam.Adam()
    turns = [
        (whole, [(grad, param)], 1),
        # Several steps, so that both turns take equally long.
        (piece, [(grad[:part], param[:part])], size // part),
    ]
    times: list[list[float]] = [[], []]
    for adam, pairs, _ in turns:
        adam.apply_gradients(pairs)  # makes the moments
    for _ in range(rounds):
        for seconds, (adam, pairs, steps) in zip(times, turns, strict=True):
            begin = time.perf_counter()
            for _ in range(steps):
                adam.apply_gradients(pairs)
            seconds.append((time.perf_counter() - begin) / steps)
    return times
