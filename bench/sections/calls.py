# SPDX-License-Identifier: MIT
"""The time of a call from Python by number and size of tensors, and a profile of a small call.

The contenders of a row are different ways to take the same step:
- "fusedadam": `Adam.apply_gradients` with the same list of pairs at every call
- "fresh gradients": the same with a new list of new gradients at every call, as hand-written
  backpropagation makes them. They are made outside of the timing. The clock is read for every call,
  which adds about 50 ns.
- "get_updates": `Adam.get_updates` with a list of gradients
- "adam_step": the function over moments that the caller owns; one tensor only

The profile divides a call on a tensor of 1,000 elements into parts. Each part is the difference in
time between two calls, one with and one without it, so the parts add up to the whole.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from threading import RLock
from typing import Any, NamedTuple, TypeAlias

import fusedadam
import numpy as np
import numpy.typing as npt
from fusedadam import _core
from settings import Results, Settings, Tick

TITLE = "The cost of a call"

Array: TypeAlias = npt.NDArray[np.float32]
# Takes the given number of steps, and returns their total seconds.
Contender: TypeAlias = Callable[[int], float]

GRADIENT = 0.01
ELEMENTS = (1, 100, 1_000)

PROFILE_ELEMENTS = 1_000
PROFILE_CALLS = 2_000
# Accumulation steps. So many that no call in the benchmark completes a step: each call only
# accumulates gradients, and computes no scalars.
NEVER = 1 << 40


class Case(NamedTuple):
    """A list of equal tensors, and the number of steps in one timing."""

    tensors: int
    elements: int
    steps: int


class Part(NamedTuple):
    """A part of a call: the difference in time between the statements `call` and `without`."""

    name: str
    call: str
    without: str


def cases(settings: Settings) -> list[Case]:
    """Return the cases."""
    # About 5 ms per timing, or one call.
    steps = {1: 2_000, 10: 1_000, 1_000: 20, 100_000: 1}
    if settings.quick:
        steps = {1: 20, 10: 10, 1_000: 1}
    return [Case(tensors, elements, steps[tensors]) for tensors in steps for elements in ELEMENTS]


def ticks(settings: Settings) -> int:
    """One per case, and one for the profile."""
    return len(cases(settings)) + 1


def run(settings: Settings, tick: Tick) -> Results:
    """Time all cases, and profile a call."""
    fusedadam.set_num_threads(settings.threads)
    rows = []
    for case in cases(settings):
        rows.append(compare(case, settings))
        tick(rows[-1]["case"])
    profile = take_apart(settings)
    tick("profile")
    return {"rows": rows, **profile}


# ---- by number of tensors ----------------------------------------------------------------------


def compare(case: Case, settings: Settings) -> dict[str, Any]:
    """Time the contenders, interleaved round by round."""
    contenders = make_contenders(case)
    for step in contenders.values():
        step(min(case.steps, 3))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(settings.rounds):
        for name, step in contenders.items():
            times[name].append(step(case.steps) / case.steps)
    return {
        "case": f"{case.tensors:,} x {case.elements:,}",
        "dtype": "float32",
        "threads": settings.threads,
        "tensors": case.tensors,
        "elements": case.elements,
        "seconds": times,
        "steps": dict.fromkeys(times, case.steps),
    }


def make_contenders(case: Case) -> dict[str, Contender]:
    """Return the contenders.

    They share an optimizer, whose state belongs to the positions of the tensors and not to a way of
    calling it.
    """
    params = [np.ones(case.elements, np.float32) for _ in range(case.tensors)]
    grads = [np.full(case.elements, GRADIENT, np.float32) for _ in range(case.tensors)]
    pairs = list(zip(grads, params, strict=True))
    adam = fusedadam.Adam()
    adam.build(params)

    def same_gradients(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            adam.apply_gradients(pairs)
        return time.perf_counter() - begin

    def fresh_gradients(steps: int) -> float:
        seconds = 0.0
        for _ in range(steps):
            fresh = [(grad.copy(), param) for grad, param in pairs]
            begin = time.perf_counter()
            adam.apply_gradients(fresh)
            seconds += time.perf_counter() - begin
        return seconds

    def get_updates(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            adam.get_updates(grads, params)
        return time.perf_counter() - begin

    contenders: dict[str, Contender] = {
        "fusedadam": same_gradients,
        "fresh gradients": fresh_gradients,
        "get_updates": get_updates,
    }
    if case.tensors == 1:
        contenders["adam_step"] = stateless(params[0], grads[0])
    return contenders


def stateless(param: Array, grad: Array) -> Contender:
    """Return a contender that owns the moments."""
    m, v = np.zeros_like(param), np.zeros_like(param)

    def adam_step(steps: int) -> float:
        begin = time.perf_counter()
        for step in range(1, steps + 1):
            fusedadam.adam_step(param, grad, m, v, step=step)
        return time.perf_counter() - begin

    return adam_step


# ---- where the time goes -----------------------------------------------------------------------

# From the whole call down to nothing: the `without` of each part is the `call` of the next.
PARTS = (
    Part(
        "kernel, 1,000 elements",
        "one.apply_gradients(pair)",
        "one_empty.apply_gradients(empty_pair)",
    ),
    Part(
        "one tensor: checks, tile list",
        "one_empty.apply_gradients(empty_pair)",
        "none.apply_gradients(no_pairs)",
    ),
    Part(
        "Python method, lock, options",
        "none.apply_gradients(no_pairs)",
        "no_state.step_pairs(no_pairs, options)",
    ),
    Part(
        "scalars of the step (powers of beta)",
        "no_state.step_pairs(no_pairs, options)",
        "waiting_state.step_pairs(no_pairs, waiting)",
    ),
    Part(
        "other fixed work in C++ (GIL, counts)",
        "waiting_state.step_pairs(no_pairs, waiting)",
        "no_state.require_not_swapped()",
    ),
    Part("entering C++ (pybind11)", "no_state.require_not_swapped()", "pass"),
)
# Operations that the parts above consist of, timed separately where Python allows it.
WITHIN = (
    Part("a Python method of one argument", "python.method(pair)", "pass"),
    Part("a lock taken and released", "with lock: pass", "pass"),
    Part("a hyper-parameter read through pybind11", "options.lr", "pass"),
    Part("a compiled function without arguments", "get_num_threads()", "pass"),
)


class Python:
    """Has a method that does nothing, to time a call of it."""

    def method(self, argument: object) -> object:
        """Return the argument."""
        return argument


def take_apart(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Return the times of the parts of a call, and of operations within them."""
    names = namespace()
    calls = PROFILE_CALLS // 10 if settings.quick else PROFILE_CALLS
    statements = list(
        dict.fromkeys(s for part in (*PARTS, *WITHIN) for s in (part.call, part.without))
    )
    timers = {statement: timeit.Timer(statement, globals=names) for statement in statements}
    times: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(settings.rounds):
        for statement, timer in timers.items():
            times[statement].append(timer.timeit(calls) / calls)

    def differences(parts: tuple[Part, ...]) -> list[dict[str, Any]]:
        return [
            {
                "part": part.name,
                "microseconds": 1e6
                * (statistics.median(times[part.call]) - statistics.median(times[part.without])),
            }
            for part in parts
        ]

    return {"profile": differences(PARTS), "profile_within": differences(WITHIN)}


def namespace() -> dict[str, Any]:
    """Return the names that the statements of the parts use."""
    names: dict[str, Any] = {
        "python": Python(),
        "lock": RLock(),
        "get_num_threads": _core.get_num_threads,
        "no_pairs": [],
        "options": _core.AdamOptions(),
        "waiting": _core.AdamOptions({"gradient_accumulation_steps": NEVER}),
    }
    for name, options in (("no_state", "options"), ("waiting_state", "waiting")):
        names[name] = _core.AdamState(None)
        names[name].build([], names[options])
    for adam, pairs, sizes in (
        ("one", "pair", [PROFILE_ELEMENTS]),
        ("one_empty", "empty_pair", [0]),
        ("none", "no_pairs", []),
    ):
        params = [np.ones(size, np.float32) for size in sizes]
        names[pairs] = [(np.full_like(param, GRADIENT), param) for param in params]
        names[adam] = fusedadam.Adam()
        names[adam].build(params)
    return names
