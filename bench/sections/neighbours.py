# SPDX-License-Identifier: MIT
"""Contention between a step and other work: other threads, other processes, and page sizes.

- Matrix products on all threads in the same process, by torch or NumPy, as in a training. Steps and
  products are each timed alone and interleaved. torch has its own copy of the OpenMP runtime, and
  the order of imports decides which copy is used. NumPy's BLAS has its own threads, which also
  spin-wait.
- A pause before each step, in which the threads of the last step go to sleep. `OMP_WAIT_POLICY`
  determines how long they spin first. In the pause, the caller sleeps ("asleep") or computes ("at
  work"), as between two steps of a training.
- Another process that keeps one core busy.
- 4 KiB pages. NumPy requests huge pages for arrays from 4 MiB on, unless
  `NUMPY_MADVISE_HUGEPAGE=0`. The moments have huge pages in any case.

Conditions that are fixed when a process starts are measured in separate, interleaved processes. The
times of a row that are compared with each other are from the same rounds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import child
import numpy as np
from settings import Results, Settings, Tick

TITLE = "Beside other work"

Row: TypeAlias = dict[str, Any]
Seconds: TypeAlias = dict[str, list[float]]

GRADIENT = 0.01
WARM_UP = 5

STEP = 1 << 20  # in cache, and large enough for two threads
SMALL_STEP = 1 << 15  # the smallest parallel step
LARGE_STEP = 1 << 26
MATRIX = 512  # rows and columns

POLICIES: dict[str, dict[str, str | None]] = {
    "default": {"OMP_WAIT_POLICY": None},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "active": {"OMP_WAIT_POLICY": "active"},
}
PAGES: dict[str, dict[str, str | None]] = {
    "huge pages": {"NUMPY_MADVISE_HUGEPAGE": "1"},
    "4 KiB pages": {"NUMPY_MADVISE_HUGEPAGE": "0"},
}
PRODUCTS = ("torch, imported first", "torch, imported after", "numpy")
# Seconds between two steps. The threads of GCC's runtime spin for about 5 ms before they sleep.
PAUSES = (0.0, 0.002, 0.02)
# Rounds that a process measures in its turn.
TURN = 5


class Pause(NamedTuple):
    """What the caller does between two steps: it computes or sleeps."""

    seconds: float
    works: bool

    def __str__(self) -> str:
        if self.seconds == 0:
            return "in a tight loop"
        return f"after {1e3 * self.seconds:g} ms {'at work' if self.works else 'asleep'}"


def pauses() -> list[Pause]:
    """Return all kinds of pauses."""
    return [Pause(s, works) for s in PAUSES for works in (False, True) if s > 0 or works]


def turns(settings: Settings) -> list[int]:
    """Return the number of rounds in each turn, that is, in each process of a kind."""
    whole, rest = divmod(settings.rounds, TURN)
    return [TURN] * whole + ([rest] if rest else [])


def beside(settings: Settings) -> list[tuple[str, str]]:
    """Return pairs of a library that computes products, and a wait policy."""
    return list(product(PRODUCTS, ["default"] if settings.quick else ["default", "passive"]))


def ticks(settings: Settings) -> int:
    """One per row of products, process of a turn, and busy core."""
    policies = len(POLICIES) + 1
    return (
        len(beside(settings))
        + len(turns(settings)) * (policies + len(PAGES))
        + 1  # beside another process
    )


def run(settings: Settings, tick: Tick) -> Results:
    """Run all measurements."""
    not_run: dict[str, str] = {}
    rows = [
        *beside_products(settings, tick, not_run),
        *after_pauses(settings, tick),
        *beside_a_busy_core(settings, tick),
        *on_pages(settings, tick),
    ]
    return {"rows": rows, "not_run": not_run}


def joined(parts: list[Seconds]) -> Seconds:
    """Concatenate the times that several processes measured."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def row(case: str, elements: int, settings: Settings, seconds: Seconds) -> Row:
    """Return a row of one tensor."""
    return {
        "case": case,
        "dtype": "float32",
        "threads": settings.threads,
        "tensors": 1,
        "elements": elements,
        "seconds": seconds,
    }


# ---- beside products of matrices ---------------------------------------------------------------


def beside_products(settings: Settings, tick: Tick, not_run: dict[str, str]) -> Iterator[Row]:
    """Steps and matrix products, alone and interleaved, in one process."""
    missing = child.absence("torch")
    for library, policy in beside(settings):
        case = f"{STEP:,}, beside {MATRIX} x {MATRIX} products of {library} ({policy} wait)"
        if library.startswith("torch") and missing is not None:
            not_run[case] = missing
        else:
            arguments = (library, settings.threads, settings.rounds, 2 if settings.quick else 20)
            seconds = child.call(time_in_turn, *arguments, environment=POLICIES[policy])
            yield row(case, STEP, settings, seconds)
        tick(case)


def time_in_turn(library: str, threads: int, rounds: int, steps: int) -> Seconds:
    """Time steps and products, alone and interleaved. Runs in a fresh process."""
    multiply: Callable[[], object]
    if library == "torch, imported first":
        multiply = torch_product(threads)
    import fusedadam

    fusedadam.set_num_threads(threads)
    if library == "torch, imported after":
        multiply = torch_product(threads)
    elif library == "numpy":
        multiply = numpy_product()
    step = make_step(STEP)
    seconds: Seconds = {
        name: [] for name in ("step", "step, in turn", "product", "product, in turn")
    }
    for i in range(rounds + 1):
        alone = (mean_of(step, steps), mean_of(multiply, steps))
        in_turn = [0.0, 0.0]
        for _ in range(steps):
            for k, work in enumerate((multiply, step)):
                begin = time.perf_counter()
                work()
                in_turn[k] += (time.perf_counter() - begin) / steps
        if i > 0:  # the first round is a warm-up
            for name, value in zip(
                seconds, (alone[0], in_turn[1], alone[1], in_turn[0]), strict=True
            ):
                seconds[name].append(value)
    return seconds


def torch_product(threads: int) -> Callable[[], object]:
    """Import torch, and return a function that computes a matrix product."""
    import torch

    torch.set_num_threads(threads)
    matrix = torch.ones(MATRIX, MATRIX)
    out = torch.empty_like(matrix)
    return lambda: torch.mm(matrix, matrix, out=out)


def numpy_product() -> Callable[[], object]:
    """Return a function that computes a matrix product, on the default threads of NumPy's BLAS."""
    matrix = np.ones((MATRIX, MATRIX), np.float32)
    out = np.empty_like(matrix)
    return lambda: np.matmul(matrix, matrix, out=out)


def make_step(elements: int) -> Callable[[], object]:
    """Return a function that steps one tensor, after some warm-up steps."""
    import fusedadam

    param = np.ones(elements, np.float32)
    pairs = [(np.full_like(param, GRADIENT), param)]
    adam = fusedadam.Adam()
    for _ in range(WARM_UP):
        adam.apply_gradients(pairs)
    return lambda: adam.apply_gradients(pairs)


def mean_of(work: Callable[[], object], count: int) -> float:
    """Return the mean time of `count` calls in a loop."""
    begin = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - begin) / count


# ---- after a pause -----------------------------------------------------------------------------


def after_pauses(settings: Settings, tick: Tick) -> Iterator[Row]:
    """Steps with each wait policy, and on one thread, which has nothing to wait for."""
    contenders = [(name, settings.threads, variables) for name, variables in POLICIES.items()]
    contenders.append(("one thread", 1, POLICIES["default"]))
    measured: dict[str, list[list[Seconds]]] = {name: [] for name, _, _ in contenders}
    steps = 2 if settings.quick else 5
    for rounds in turns(settings):
        for name, threads, variables in contenders:
            measured[name].append(
                child.call(time_pauses, threads, rounds, steps, environment=variables)
            )
            tick(f"waiting: {name}")
    cases = list(product((SMALL_STEP, STEP), pauses()))
    for i, (elements, pause) in enumerate(cases):
        seconds = {
            name: joined([part[i] for part in parts])["step"] for name, parts in measured.items()
        }
        yield row(f"{elements:,}, {pause}", elements, settings, seconds)


def time_pauses(threads: int, rounds: int, steps: int) -> list[Seconds]:
    """Time steps of both sizes after each kind of pause. Runs in a fresh process."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    results: list[Seconds] = []
    for elements, pause in product((SMALL_STEP, STEP), pauses()):
        step = make_step(elements)
        results.append({"step": [mean_after(pause, step, steps) for _ in range(rounds)]})
    return results


def mean_after(pause: Pause, step: Callable[[], object], steps: int) -> float:
    """Return the mean time of `steps` steps, each after a pause; of more steps without a pause."""
    if pause.seconds == 0:
        return mean_of(step, 20 * steps)
    some = np.ones(1 << 10, np.float32)  # fits in L1, so the step's arrays stay in the other caches
    total = 0.0
    for _ in range(steps):
        if pause.works:
            end = time.perf_counter() + pause.seconds
            while time.perf_counter() < end:
                np.add(some, 1, out=some)
        else:
            time.sleep(pause.seconds)
        begin = time.perf_counter()
        step()
        total += time.perf_counter() - begin
    return total / steps


# ---- beside another process --------------------------------------------------------------------


def beside_a_busy_core(settings: Settings, tick: Tick) -> Iterator[Row]:
    """Steps on all threads and on one, alone and beside another process that computes."""
    case = f"{STEP:,}, one core busy with another process"
    seconds = child.call(
        time_beside_a_process, settings.threads, settings.rounds, 5 if settings.quick else 100
    )
    yield row(case, STEP, settings, seconds)
    tick(case)


def time_beside_a_process(threads: int, rounds: int, steps: int) -> Seconds:
    """Time steps with and without a busy core. Runs in a fresh process."""
    import fusedadam

    step = make_step(STEP)
    names = {threads: f"{threads} threads", 1: "1 thread"}
    seconds: Seconds = {
        f"{name}{beside}": [] for beside in (", alone", "") for name in names.values()
    }

    def measure(beside: str) -> None:
        for count, name in names.items():
            fusedadam.set_num_threads(count)
            mean_of(step, WARM_UP)
            seconds[f"{name}{beside}"].append(mean_of(step, steps))

    for _ in range(rounds):
        measure(", alone")
        with busy_core():
            measure("")
    return seconds


@contextmanager
def busy_core() -> Iterator[None]:
    """Run another process that keeps a core busy."""
    code = "print('started', flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


# ---- pages -------------------------------------------------------------------------------------


def on_pages(settings: Settings, tick: Tick) -> Iterator[Row]:
    """A large step whose parameters and gradients are on huge or on small pages."""
    elements = STEP if settings.quick else LARGE_STEP
    measured: dict[str, list[Seconds]] = {name: [] for name in PAGES}
    for rounds in turns(settings):
        for name, variables in PAGES.items():
            measured[name].append(
                child.call(time_large, elements, settings.threads, rounds, environment=variables)
            )
            tick(name)
    seconds = {name: joined(parts)["step"] for name, parts in measured.items()}
    yield row(f"{elements:,}, by pages of parameters and gradients", elements, settings, seconds)


def time_large(elements: int, threads: int, rounds: int) -> Seconds:
    """Time steps of a large tensor. Runs in a fresh process."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    step = make_step(elements)
    return {"step": [mean_of(step, 2) for _ in range(rounds)]}
