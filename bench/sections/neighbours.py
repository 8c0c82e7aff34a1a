# SPDX-License-Identifier: MIT
"""Contention between a step and other work: threads, other OpenMP runtimes, other processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from peers import Work
from runner import Bench, Row, contestant, not_run
from runner.machine import too_large
from runner.worker import PAUSE, Worker, absence, call

WARM_UP = 5
SMALLEST_PARALLEL = 1 << 15
MATRIX = 512  # rows and columns
# Libraries with their own OpenMP runtime, imported before and after fusedadam.
RUNTIMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alone": ((), ()),
    "both before": (("torch", "sklearn"), ()),
    "both after": ((), ("torch", "sklearn")),
    "torch before": (("torch",), ()),
    "torch after": ((), ("torch",)),
    "scikit-learn before": (("sklearn",), ()),
    "scikit-learn after": ((), ("sklearn",)),
}
# Seconds after which other threads sleep, and seconds of steps.
SLEEP, STEPS_SECONDS = 0.02, 0.02
IN_TURN, AT_ONCE = "one after the other", "at once"
RANKS, RANK_STEPS = 2, 3


# ---- in processes of their own -----------------------------------------------------------------


@functools.cache
def step_of(elements: int, index: int = 0) -> Callable[[], object]:  # noqa: ARG001 - another one
    """Return a function that steps one tensor, after some warm-up steps."""
    import fusedadam

    param = np.ones(elements, np.float32)
    pairs = [(np.full_like(param, 0.01), param)]
    adam = fusedadam.Adam()
    for _ in range(WARM_UP):
        adam.apply_gradients(pairs)
    return lambda: adam.apply_gradients(pairs)


def mean_of(work: Callable[[], object], count: int) -> float:
    """Return the mean seconds of `count` calls in a loop."""
    return contestant.total_seconds(work, count) / count


def busy(seconds: float = 0.005) -> None:
    """Compute on this thread only, within the first level of a cache."""
    some = np.ones(1 << 10, np.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        np.add(some, 1, out=some)


def work_of(library: str) -> Callable[[], object]:
    """Import a library, and return a function that computes on all of its threads."""
    if library == "sklearn":
        from sklearn.cluster import KMeans

        samples = np.random.default_rng(0).standard_normal((4_000, 16)).astype(np.float32)
        model = KMeans(8, init="random", n_init=1, max_iter=5, tol=0, random_state=0)
        return lambda: model.fit(samples)
    import torch

    matrix = torch.ones(MATRIX, MATRIX)
    return lambda: matrix @ matrix


@functools.cache
def works_around(before: tuple[str, ...], after: tuple[str, ...]) -> list[Callable[[], object]]:
    """Import libraries before and after fusedadam, and return their work."""
    works = [work_of(library) for library in before]
    import fusedadam  # noqa: F401 - the order matters

    return works + [work_of(library) for library in after]


def time_beside_runtime(name: str, elements: int) -> float:
    """Work with the other libraries, wait until their threads sleep, and time steps."""
    works = works_around(*RUNTIMES[name])
    step = step_of(elements)
    one = max(mean_of(step, 3), 1e-6)
    for work in works or [busy]:
        work()
    # Steps instead of a sleep, so that this thread and the step's threads keep their CPUs.
    end = time.perf_counter() + SLEEP
    while time.perf_counter() < end:
        step()
    return mean_of(step, max(2, min(500, int(STEPS_SECONDS / one))))


def time_at_once(count: int, elements: int, times: int, together: bool) -> dict[str, float]:
    """Time optimizers that threads step concurrently, or that one thread steps in turn."""
    steps = [step_of(elements, i) for i in range(count)]
    warming = max(1, times // 5)  # sleeping threads wake up and spread over cores
    if together:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            all_at_once(pool, steps, warming)  # also starts the Python threads and their teams
            return {AT_ONCE: all_at_once(pool, steps, times)}
    all_in_turn(steps, warming)
    return {IN_TURN: all_in_turn(steps, times)}


def all_in_turn(steps: Sequence[Callable[[], object]], times: int) -> float:
    """Return the mean seconds per step."""
    return mean_of(lambda: [step() for step in steps], times) / len(steps)


def all_at_once(pool: Any, steps: Sequence[Callable[[], object]], times: int) -> float:
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


# ---- the sections ------------------------------------------------------------------------------


def runtimes(bench: Bench) -> list[Row]:
    """Steps in a process with torch's or scikit-learn's copy of the OpenMP runtime.

    The copies do not know of each other's threads, which spin on their CPUs for about 9 ms after
    their own work. Each kind of process takes its turn in each round.
    """
    rows = []
    names = [*RUNTIMES][:3] if bench.quick else [*RUNTIMES]
    missing = {name: absence(*sum(RUNTIMES[name], ())) for name in names}
    missing = {name: why for name, why in missing.items() if why}
    for elements in (1 << 15,) if bench.quick else (1 << 15, 1 << 20, 1 << 24):
        seconds: dict[str, list[float]] = {name: [] for name in names if name not in missing}
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(bench.threads)) for name in seconds}
            for i in range(bench.rounds + 1):
                for name, worker in workers.items():
                    time.sleep(PAUSE)
                    found = worker.call(time_beside_runtime, name, elements)
                    seconds[name] += [found] if i > 0 else []  # the first is a warm-up
        rows.append({**bench.row(f"{elements:,}", elements, seconds), "not_run": missing})
    return rows


def at_once(bench: Bench) -> list[Row]:
    """Several optimizers stepped concurrently, each by its own Python thread, or by one thread.

    The one thread steps the optimizers in turn, one step each, so that the same amount of memory is
    used between two steps of an optimizer in both arrangements.
    """
    rows = []
    # From steps limited by Python to steps limited by memory.
    sizes = (
        (1_000, SMALLEST_PARALLEL) if bench.quick else (1_000, SMALLEST_PARALLEL, 1 << 20, 1 << 22)
    )
    for count, elements in product((2, 8), sizes):
        # About 100 ms, so that the time in which only the last thread runs is negligible.
        times = max(2, min(8_000, (1 << (18 if bench.quick else 28)) // (count * elements)))
        seconds: dict[str, list[float]] = {}
        # Some processes are slower than others for as long as they run, so each round has new ones.
        for together in [False, True] * bench.rounds:
            arguments = (count, elements, times, together)
            for name, value in call(time_at_once, *arguments, threads=bench.threads).items():
                seconds.setdefault(name, []).append(value)
        case = f"{count} optimizers x {elements:,}"
        rows.append(bench.row(case, elements, seconds, tensors=count))
    return rows


def ranks(bench: Bench) -> list[Row]:
    """Contention for memory between processes, as between the ranks of a distributed training.

    One process has all threads and steps all parameters. Otherwise several processes divide the
    threads and CPUs, and each steps all parameters (plain data parallelism) or an equal share of
    them (ZeRO, FSDP2). The time is that of the slowest process.
    """
    size = 1 << 16 if bench.quick else 1 << 26
    why = too_large((RANKS + 2) * 16 * size)
    if why:
        return [not_run(f"{size:,}", {"ranks": why})]
    each = max(1, bench.threads // RANKS)
    arrangements = {
        "one process": [(size, bench.threads, 0)],
        f"{RANKS} processes, all each": [(size, each, each * i) for i in range(RANKS)],
        f"{RANKS} processes, a share each": [(size // RANKS, each, each * i) for i in range(RANKS)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in arrangements}
    with contextlib.ExitStack() as stack:
        workers: dict[str, list[Worker]] = {name: [] for name in arrangements}
        for name, processes in arrangements.items():
            for elements, threads, first_cpu in processes:
                worker = stack.enter_context(Worker(threads, first_cpu=first_cpu))
                worker.call(contestant.make, ["fusedadam"], Work((elements,)), threads)
                workers[name].append(worker)
        for i in range(bench.rounds + 1):
            for name, members in workers.items():
                time.sleep(PAUSE)
                for worker in members:
                    worker.send(contestant.warm_seconds_of, "fusedadam", RANK_STEPS)
                slowest = max([worker.receive() for worker in members])
                if i > 0:
                    seconds[name].append(slowest)
    return [bench.row(f"{size:,}", size, seconds)]
