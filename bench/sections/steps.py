# SPDX-License-Identifier: MIT
"""Steps of float32 and float64 tensors by all contenders."""

from __future__ import annotations

from peers import STEPS, TAILS
from runner import Bench, Row

SIZES = (100, 1_000, 10_000, 100_000, 1 << 20, 10_000_000, 1 << 26, 100_000_000)
# At the largest size, memory is the only limit. Only the contenders that come near it are timed;
# more would not fit in memory.
LARGEST = 1 << 28
AT_LARGEST = ("fusedadam", "traffic twin", "torch fused", "deepspeed")
SHAPES = ((1, 1_000), *((10**k, 1_000) for k in range(1, 6)), (100_000, 100))
# In cache, of many tensors, and in memory.
ON_THREADS = ((1, 1 << 20), (1_000, 1_000), (1, 1 << 26))


def sizes(bench: Bench) -> list[Row]:
    """One float32 tensor, from 100 to 256M elements."""
    rows = [bench.contest.row(bench, [*STEPS], [n]) for n in ((1_000,) if bench.quick else SIZES)]
    rows.append(bench.contest.row(bench, AT_LARGEST, [1 << 20 if bench.quick else LARGEST]))
    return rows


def float64(bench: Bench) -> list[Row]:
    """One float64 tensor."""
    size = 1_000 if bench.quick else 1 << 25
    return [bench.contest.row(bench, [*STEPS], [size], dtype="float64")]


def many_tensors(bench: Bench) -> list[Row]:
    """Many small tensors in one step, which shows the overhead per tensor."""
    shapes = ((2_000, 100),) if bench.quick else SHAPES
    return [bench.contest.row(bench, [*STEPS], [size] * tensors) for tensors, size in shapes]


def threads(bench: Bench) -> list[Row]:
    """Steps by number of threads: powers of two, and all threads."""
    names = AT_LARGEST[:3] if bench.quick else (*AT_LARGEST, "numba")
    powers = {1 << i for i in range(bench.threads.bit_length())}
    return [
        bench.contest.row(bench, names, [size] * tensors, threads=count)
        for count in sorted({*powers, bench.threads})
        for tensors, size in (((10, 1_000),) if bench.quick else ON_THREADS)
    ]


def tail(bench: Bench) -> list[Row]:
    """A training tail: clip by the global norm, decay and step, average, zero the gradients.

    The gradients are set again before each step, outside of the timing.
    """
    sizes = (10_000,) if bench.quick else (1 << 20, 1 << 26)
    return [bench.contest.row(bench, [*TAILS], [size], tail=True) for size in sizes]
