# SPDX-License-Identifier: MIT
"""What a contest calls in the process of a peer, and the contenders that this process holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from peers import Array, Contender, Work, load, reference

from runner.machine import baseline_bytes, collect, process_bytes

# Least seconds of a timing, so that the overhead of the clock and the loop is negligible.
SHORTEST_TIMING = 0.010
MOST_STEPS = 10_000
# Seconds of warm-up steps before a timing, so that sleeping threads wake up and spread over cores.
WARMING = 0.020
LATER_STEPS = 5

contenders: dict[str, Contender] = {}
# A tail zeroes the gradients, so they are set again before each step.
grads: list[Array] = []


def prepare(
    names: Sequence[str], unchecked: Sequence[str], work: Work, threads: int
) -> dict[str, str]:
    """Check contenders of one module, and set up those that are right.

    Returns how the results of each unchecked contender are wrong, or "".
    """
    found = {name: reference.error(name, work, threads) for name in unchecked}
    right = [name for name in names if not found.get(name)]
    if right:
        make(right, work, threads)
    return found


def make(names: Sequence[str], work: Work, threads: int) -> None:
    """Set up contenders of one module."""
    contenders.update(load(names[0]).make(names, work, threads))
    grads.extend(work.grads() if work.tail else ())


def free() -> None:
    """Drop all contenders and their memory."""
    contenders.clear()
    grads.clear()
    collect()


def calibrate(name: str) -> tuple[float, int]:
    """Warm up. Return the seconds per step, and how many steps a timing needs."""
    seconds = min(seconds_of(name, 1) for _ in range(3))  # the first step may compile
    steps = 1
    while seconds * steps < SHORTEST_TIMING / 2 and steps < MOST_STEPS:
        steps = min(MOST_STEPS, max(2 * steps, int(SHORTEST_TIMING / 2 / seconds)))
        seconds = seconds_of(name, steps)
    return seconds, min(MOST_STEPS, max(1, round(SHORTEST_TIMING / seconds + 0.5)))


def warm_seconds_of(name: str, steps: int) -> float:
    """Take untimed steps for a while, and return the mean seconds of `steps` steps."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARMING:
        seconds_of(name, 1)
    return seconds_of(name, steps)


def seconds_of(name: str, steps: int) -> float:
    """Return the mean seconds of `steps` steps."""
    contender = contenders[name]
    if not grads:
        return total_seconds(contender.step, steps) / steps
    total = 0.0
    for _ in range(steps):
        contender.set_grads(grads)
        total += total_seconds(contender.step, 1)
    return total / steps


def total_seconds(step: Callable[[], object], steps: int) -> float:
    """Return the total seconds of `steps` steps."""
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - begin


def held_bytes(name: str) -> int:
    """Return the bytes of a contender's parameters, gradients and state."""
    return contenders[name].held_bytes()


def peak(name: str, work: Work, threads: int) -> tuple[int, int]:
    """Return the resident bytes with all libraries loaded, and the peak over three steps."""
    wrong = reference.error(name, Work(()), threads)  # also loads and compiles what steps need
    if wrong:
        raise ArithmeticError(f"wrong result: {wrong}")
    baseline = baseline_bytes()
    make([name], work, threads)
    seconds_of(name, 3)
    return baseline, process_bytes("VmHWM")


def first_steps(name: str, work: Work, threads: int, times: int) -> list[list[float]]:
    """Time `times` optimizers over the same tensors, one after the other.

    Returns the seconds of making each, of its first step, and the median of some later ones.
    """
    begin = load(name).beginning(work, threads)
    found = []
    for _ in range(times):
        start = time.perf_counter()
        step = begin()
        made = time.perf_counter()
        first = total_seconds(step, 1)
        later = sorted(total_seconds(step, 1) for _ in range(LATER_STEPS))
        found.append([made - start, first, later[LATER_STEPS // 2]])
        del step
        collect()
    return found
