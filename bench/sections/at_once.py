# SPDX-License-Identifier: MIT
"""Optimizers stepped by Python threads at once, each by its own, against one after the other by one thread.

Each thread of the caller's has a team of OpenMP threads of its own, and steps that are under way share the CPUs by their sizes. Who
steps one after the other takes a step of each in turn, so that both go through the same memory between two steps of an optimizer.
Both have processes of their own, which take turns; in that of the threads, one thread steps all of them afterwards ("one after the
other, later"), which shows what the threads have left behind.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import child
from settings import Results, Settings, Tick

from sections.neighbours import Seconds, joined, make_step

TITLE = "Optimizers stepped at once"

IN_TURN = "one after the other"
AT_ONCE = "at once"
LATER = "one after the other, later"
COUNTS = (2, 8)  # optimizers, and threads
# From Python's share of a step to the memory's: 32,768 is the smallest that enters a parallel region.
SIZES = (1_000, 1 << 15, 1 << 20, 1 << 22)
QUICK_SIZES = (1_000, 1 << 15)
# Of all optimizers in a timing: some 100 ms, beside which the last thread's time alone on a CPU does not show.
ELEMENTS = 1 << 28
QUICK_ELEMENTS = 1 << 18
MOST_STEPS = 8_000
WARM = 0.2  # of the steps of a timing go before it, some 20 ms: threads that slept come back, each on a core of its own


def cases(settings: Settings) -> list[tuple[int, int]]:
    """Return how many optimizers of how many elements each."""
    return list(product(COUNTS, QUICK_SIZES if settings.quick else SIZES))


def ticks(settings: Settings) -> int:
    """One a case."""
    return len(cases(settings))


def run(settings: Settings, tick: Tick) -> Results:
    """Let processes of both kinds take turns, round by round, for each case."""
    rows: list[dict[str, Any]] = []
    for count, elements in cases(settings):
        times = steps_in(QUICK_ELEMENTS if settings.quick else ELEMENTS, count, elements)
        arguments = (count, elements, times, settings.threads)
        # Some processes are slower than their like, for good: each round has its own.
        parts = [
            child.call(time_in_turn, *arguments) | child.call(time_at_once, *arguments)
            for _ in range(settings.rounds)
        ]
        rows.append(
            {
                "case": f"{count} optimizers x {elements:,}",
                "dtype": "float32",
                "threads": settings.threads,
                "tensors": count,
                "elements": elements,
                "seconds": joined(parts),
            }
        )
        tick(str(rows[-1]["case"]))
    return {"rows": rows}


def steps_in(elements: int, count: int, size: int) -> int:
    """Return how many steps each optimizer takes in a timing."""
    return max(2, min(MOST_STEPS, elements // (count * size)))


def warming(times: int) -> int:
    """Return how many go before a timing of so many."""
    return max(1, round(WARM * times))


# ---- in a process of its own -------------------------------------------------------------------


def time_in_turn(count: int, size: int, times: int, threads: int) -> Seconds:
    """Return the seconds of a step of each of the optimizers, stepped in turn."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    steps = [make_step(size) for _ in range(count)]
    in_turn(steps, warming(times))
    return {IN_TURN: [in_turn(steps, times)]}


def time_at_once(count: int, size: int, times: int, threads: int) -> Seconds:
    """Return the same of as many threads at once, and of one thread afterwards."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    steps = [make_step(size) for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        at_once(pool, steps, warming(times))  # starts the threads, and theirs
        during = at_once(pool, steps, times)
    in_turn(steps, warming(times))
    return {AT_ONCE: [during], LATER: [in_turn(steps, times)]}


def in_turn(steps: Sequence[Callable[[], object]], times: int) -> float:
    """Return the seconds of a step."""
    begin = time.perf_counter()
    for _ in range(times):
        for step in steps:
            step()
    return (time.perf_counter() - begin) / (times * len(steps))


def at_once(
    pool: concurrent.futures.Executor, steps: Sequence[Callable[[], object]], times: int
) -> float:
    """Return the seconds from the first thread's begin to the last one's end, by all steps between."""
    barrier = threading.Barrier(len(steps))

    def repeat(step: Callable[[], object]) -> tuple[float, float]:
        barrier.wait()
        begin = time.perf_counter()
        for _ in range(times):
            step()
        return begin, time.perf_counter()

    begins, ends = zip(*pool.map(repeat, steps), strict=True)
    return float(max(ends) - min(begins)) / (times * len(steps))
