# SPDX-License-Identifier: MIT
"""Several optimizers stepped concurrently, each by its own Python thread, or back-to-back by one.

Each Python thread has its own team of OpenMP threads. To avoid oversubscription, concurrent steps
share the CPUs in proportion to their sizes.

The baseline, one thread, steps the optimizers in turn, one step each. So the same amount of memory
is used between two steps of an optimizer in both arrangements, and caches serve both equally.

Each arrangement has its own processes, and these are interleaved. In the process of the concurrent
steps, one thread finally steps all optimizers ("one after the other, later"). This shows whether
the idle threads slow it down.
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
# From steps limited by Python to steps limited by memory. 32,768 is the smallest parallel step.
SIZES = (1_000, 1 << 15, 1 << 20, 1 << 22)
QUICK_SIZES = (1_000, 1 << 15)
# Elements stepped by all optimizers in a timing. It takes about 100 ms, so that the time in which
# only the last thread still runs is negligible.
ELEMENTS = 1 << 28
QUICK_ELEMENTS = 1 << 18
MOST_STEPS = 8_000
# Warm-up steps, as a fraction of a timing's steps. They take about 20 ms, in which sleeping threads
# wake up and spread over cores.
WARM = 0.2


def cases(settings: Settings) -> list[tuple[int, int]]:
    """Return pairs of a number of optimizers, and the elements of each."""
    return list(product(COUNTS, QUICK_SIZES if settings.quick else SIZES))


def ticks(settings: Settings) -> int:
    """One per case."""
    return len(cases(settings))


def run(settings: Settings, tick: Tick) -> Results:
    """Interleave the processes of both arrangements, round by round, for each case."""
    rows: list[dict[str, Any]] = []
    for count, elements in cases(settings):
        times = steps_in(QUICK_ELEMENTS if settings.quick else ELEMENTS, count, elements)
        arguments = (count, elements, times, settings.threads)
        # Some processes are slower than others for as long as they run, so each round has new ones.
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
    """Return the number of steps that each optimizer takes in a timing."""
    return max(2, min(MOST_STEPS, elements // (count * size)))


def warming(times: int) -> int:
    """Return the number of warm-up steps before a timing of `times` steps."""
    return max(1, round(WARM * times))


# ---- in a process of its own -------------------------------------------------------------------


def time_in_turn(count: int, size: int, times: int, threads: int) -> Seconds:
    """Return the seconds per step if one thread steps the optimizers in turn."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    steps = [make_step(size) for _ in range(count)]
    in_turn(steps, warming(times))
    return {IN_TURN: [in_turn(steps, times)]}


def time_at_once(count: int, size: int, times: int, threads: int) -> Seconds:
    """Return the seconds per step of concurrent threads, and of one thread afterwards."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    steps = [make_step(size) for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        at_once(pool, steps, warming(times))  # also starts the Python threads and their teams
        during = at_once(pool, steps, times)
    in_turn(steps, warming(times))
    return {AT_ONCE: [during], LATER: [in_turn(steps, times)]}


def in_turn(steps: Sequence[Callable[[], object]], times: int) -> float:
    """Return the mean seconds per step."""
    begin = time.perf_counter()
    for _ in range(times):
        for step in steps:
            step()
    return (time.perf_counter() - begin) / (times * len(steps))


def at_once(
    pool: concurrent.futures.Executor, steps: Sequence[Callable[[], object]], times: int
) -> float:
    """Return the time from the first thread's start to the last one's end, per step."""
    barrier = threading.Barrier(len(steps))

    def repeat(step: Callable[[], object]) -> tuple[float, float]:
        barrier.wait()
        begin = time.perf_counter()
        for _ in range(times):
            step()
        return begin, time.perf_counter()

    begins, ends = zip(*pool.map(repeat, steps), strict=True)
    return float(max(ends) - min(begins)) / (times * len(steps))
