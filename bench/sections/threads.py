# SPDX-License-Identifier: MIT
"""Steps in memory, in cache and over many tensors, by number of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rounds import Case, Contest

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "Threads"

NAMES = ("fusedadam", "traffic twin", "torch fused", "deepspeed", "numba")
CASES = (
    Case(f"1 x {1 << 20:,}", 1, 1 << 20),
    Case("1,000 x 1,000", 1_000, 1_000),
    Case(f"1 x {1 << 26:,}", 1, 1 << 26),
)
QUICK_CASES = (Case("10 x 1,000", 10, 1_000),)


def counts(settings: Settings) -> list[int]:
    """Return the numbers of threads: powers of two, and all threads."""
    powers = [1 << i for i in range(settings.threads.bit_length())]
    return sorted({*powers, settings.threads})


def ticks(settings: Settings) -> int:
    """One per case and number of threads."""
    return len(counts(settings)) * len(QUICK_CASES if settings.quick else CASES)


def run(settings: Settings, tick: Tick) -> Results:
    """Time each case on each number of threads, with new processes for each number."""
    rows = []
    for threads in counts(settings):
        with Contest(NAMES, settings, threads=threads) as contest:
            for case in QUICK_CASES if settings.quick else CASES:
                rows.append(contest.row(case))
                tick(f"{case.name}, {threads} threads")
    return {"rows": rows}
