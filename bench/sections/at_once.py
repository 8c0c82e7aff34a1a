# SPDX-License-Identifier: MIT
"""Optimizers stepped by Python threads at once, each by its own, against one after the other by one thread.

Each step may take all threads of OpenMP, of which every thread of the caller's has a team of its own: more threads want to run
than there are CPUs. Who steps one after the other takes a step of each in turn, so that both go through the same memory between
two steps of an optimizer. Both have processes of their own, which take turns; in that of the threads, one thread steps all of
them afterwards ("one after the other, later"), which shows what the threads have left behind.
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

from sections.neighbours import Seconds, joined, make_step, turns

TITLE = "Optimizers stepped at once"

IN_TURN = "one after the other"
AT_ONCE = "at once"
LATER = "one after the other, later"
COUNTS = (2, 8)  # optimizers, and threads
# From Python's share of a step to the memory's: 32,768 is the smallest that enters a parallel region.
SIZES = (1_000, 1 << 15, 1 << 20, 1 << 22)
QUICK_SIZES = (1_000, 1 << 15)
# Of all optimizers in a timing: tens of milliseconds, which hold many changes of threads.
ELEMENTS = 1 << 26
QUICK_ELEMENTS = 1 << 18
MOST_STEPS = 1_000


def cases(settings: Settings) -> list[tuple[int, int]]:
    """Return how many optimizers of how many elements each."""
    return list(product(COUNTS, QUICK_SIZES if settings.quick else SIZES))


def ticks(settings: Settings) -> int:
    """One a process."""
    return 2 * len(turns(settings))


def run(settings: Settings, tick: Tick) -> Results:
    """Let processes of both kinds take turns, each with all cases."""
    arguments = (cases(settings), QUICK_ELEMENTS if settings.quick else ELEMENTS, settings.threads)
    measured: list[list[Seconds]] = []
    for rounds in turns(settings):
        parts: list[Seconds] = [{} for _ in cases(settings)]
        for time_cases, words in ((time_in_turn, IN_TURN), (time_at_once, AT_ONCE)):
            for part, seconds in zip(
                parts, child.call(time_cases, *arguments, rounds), strict=True
            ):
                part.update(seconds)
            tick(words)
        measured.append(parts)
    rows: list[dict[str, Any]] = [
        {
            "case": f"{count} optimizers x {elements:,}",
            "dtype": "float32",
            "threads": settings.threads,
            "tensors": count,
            "elements": elements,
            "seconds": joined([parts[i] for parts in measured]),
        }
        for i, (count, elements) in enumerate(cases(settings))
    ]
    return {"rows": rows}


# ---- in a process of its own -------------------------------------------------------------------


def time_in_turn(
    of: Sequence[tuple[int, int]], elements: int, threads: int, rounds: int
) -> list[Seconds]:
    """Return the seconds of a step of each of the optimizers, stepped in turn, round by round."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    results: list[Seconds] = []
    for count, size in of:
        steps = [make_step(size) for _ in range(count)]
        times = steps_in(elements, count, size)
        results.append({IN_TURN: [in_turn(steps, times) for _ in range(rounds)]})
    return results


def time_at_once(
    of: Sequence[tuple[int, int]], elements: int, threads: int, rounds: int
) -> list[Seconds]:
    """Return the same of as many threads at once, and of one thread once they are gone."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    results: list[Seconds] = []
    for count, size in of:
        steps = [make_step(size) for _ in range(count)]
        times = steps_in(elements, count, size)
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            at_once(pool, steps, times)  # starts the threads, and theirs
            during = [at_once(pool, steps, times) for _ in range(rounds)]
        results.append({AT_ONCE: during, LATER: [in_turn(steps, times) for _ in range(rounds)]})
    return results


def steps_in(elements: int, count: int, size: int) -> int:
    """Return how many steps each optimizer takes in a timing."""
    return max(2, min(MOST_STEPS, elements // (count * size)))


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
