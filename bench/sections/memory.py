# SPDX-License-Identifier: MIT
"""Peak memory, the first step, and steps of up to a billion parameters."""

from __future__ import annotations

import functools

import numpy as np
from peers import PEERS, Work
from runner import Bench, Row, contestant, not_run
from runner.machine import too_large
from runner.worker import WorkerError, call

STATE_BYTES = 16  # of an element: parameter, gradient and two moments
PEAKS = ("fusedadam", "torch fused", "torch foreach", "deepspeed", "optax", "numpy")
FIRST = ("fusedadam", "torch fused")
# Each repetition takes a few seconds, since it starts a process and fills its arrays.
MOST_ROUNDS = 7


def memory(bench: Bench) -> list[Row]:
    """The peak of each contender in its own process, from the first array to the third step."""
    rows = []
    size = 1 << 20 if bench.quick else 1 << 28
    for name in bench.chosen(PEAKS[:2] if bench.quick else PEAKS):
        try:
            why = too_large((STATE_BYTES + 4 * PEERS[name].temporaries) * size)
            if why:
                raise WorkerError(why)
            work = Work((size,))
            before, peak = call(contestant.peak, name, work, bench.threads, threads=bench.threads)
        except WorkerError as error:
            rows.append(not_run(name, {name: str(error)}))
            continue
        expected = STATE_BYTES * size
        of_peak = {"peak_bytes": peak, "baseline_bytes": before, "expected_bytes": expected}
        rows.append(bench.row(name, size, {}, **of_peak))
    return rows


def first_step(bench: Bench) -> list[Row]:
    """The first step, which needs memory for the moments, against a later step.

    In a fresh process, the operating system has to allocate and clear that memory ("fresh"). Then a
    second optimizer in the same process reuses the freed memory of the first ("recycled").
    """
    size, repeats = (1 << 20, 1) if bench.quick else (1 << 26, min(bench.rounds, MOST_ROUNDS))
    rows = []
    for name in bench.chosen(FIRST):
        try:
            repeated = [first_steps(bench, name, size) for _ in range(repeats)]
        except WorkerError as error:
            rows.append(not_run(name, {name: str(error)}))
            continue
        for memory, timings in zip(("fresh", "recycled"), zip(*repeated, strict=True), strict=True):
            parts = zip(("build", "first", "later"), zip(*timings, strict=True), strict=True)
            seconds = {part: [*values] for part, values in parts}
            rows.append(bench.row(f"{name}, {memory} memory", size, seconds))
    return rows


def first_steps(bench: Bench, name: str, size: int) -> list[list[float]]:
    """Time two optimizers in a fresh process."""
    # A virtual machine may have returned free memory to its host, and to get it back takes longer
    # than everything that is measured here. So twice that much is touched and freed before.
    np.ones(2 * STATE_BYTES * size, np.uint8)
    arguments = (name, Work((size,)), bench.threads, 2)
    found: list[list[float]] = call(contestant.first_steps, *arguments, threads=bench.threads)
    return found


def large(bench: Bench) -> list[Row]:
    """Steps of up to a billion parameters, interleaved with steps of the first 64M of them.

    The memory speed of a shared machine changes by as much as half from minute to minute. Only
    times of the same round show how the time grows with the size.
    """
    part, sizes = 1 << 26, [1 << 28, 1 << 29, 1_000_000_000]
    if bench.quick:
        part, sizes = 1 << 20, [1 << 21]
    rows = []
    for size in sizes:
        case = f"1 x {size:,}"
        why = too_large(STATE_BYTES * size + 8 * part)
        if why:
            rows.append(not_run(case, {case: why}))
            continue
        rounds = min(bench.rounds, 9)
        seconds = call(step_whole_and_part, size, part, rounds, threads=bench.threads)
        rows.append(bench.row(case, size, seconds, part=part))
    return rows


def step_whole_and_part(size: int, part: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of steps of all elements, and of interleaved steps of the first `part`."""
    import fusedadam

    param, grad = np.ones(size, np.float32), np.full(size, 1e-3, np.float32)
    pairs = {"fusedadam": [(grad, param)], "part": [(grad[:part], param[:part])]}
    # Several steps of the part, so that both turns take equally long.
    steps = {"fusedadam": 1, "part": size // part}
    adams = {name: fusedadam.Adam() for name in pairs}
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for i in range(rounds + 1):
        for name, adam in adams.items():
            step = functools.partial(adam.apply_gradients, pairs[name])
            total = contestant.total_seconds(step, steps[name])
            if i > 0:  # the first round makes the moments
                seconds[name].append(total / steps[name])
    return seconds
