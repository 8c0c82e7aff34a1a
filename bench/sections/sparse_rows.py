# SPDX-License-Identifier: MIT
"""A lazy step of some rows of a table (`apply_sparse`) against the dense step of the same table.

The dense contender calls `apply_gradients` with the gradient of the whole table, on an optimizer
with the same settings. Each step starts with a cold cache, as after the forward and backward pass
of a model, and with other rows than the step before. Otherwise a small table would stay in cache,
and seem cheaper than the same number of rows of a large table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import fusedadam
import numpy as np
from settings import Results, Settings, Tick

TITLE = "Rows of a table"

WIDTH = 64  # elements per row
GRADIENT = 0.01
SWEPT_ELEMENTS = 1 << 25  # 128 MiB: larger than the caches, which a pass over it evicts


class Case(NamedTuple):
    """A table, and the number of its rows in a step."""

    table_rows: int
    rows: int


CASES = (
    Case(1_000_000, 1_000),
    # Equal numbers of rows, other tables.
    Case(100_000, 1_000),
    Case(10_000, 1_000),
    # The same table, other numbers of rows.
    Case(1_000_000, 100),
    Case(1_000_000, 10_000),
    Case(1_000_000, 100_000),
)
QUICK_CASES = (Case(10_000, 100), Case(10_000, 1_000))


def cases(settings: Settings) -> tuple[Case, ...]:
    """Return the cases."""
    return QUICK_CASES if settings.quick else CASES


def ticks(settings: Settings) -> int:
    """One per case."""
    return len(cases(settings))


def run(settings: Settings, tick: Tick) -> Results:
    """Time all cases."""
    fusedadam.set_num_threads(settings.threads)
    swept = np.zeros(SWEPT_ELEMENTS, np.float32)
    rows = []
    for case in cases(settings):
        rows.append(compare(case, settings, swept))
        tick(rows[-1]["case"])
    return {"rows": rows}


def compare(case: Case, settings: Settings, swept: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Time both contenders, interleaved."""
    random = np.random.default_rng(1)
    table = np.ones((case.table_rows, WIDTH), np.float32)
    dense_grad = np.full_like(table, GRADIENT)
    grad_rows = np.full((case.rows, WIDTH), GRADIENT, np.float32)
    lazy, dense = fusedadam.Adam(), fusedadam.Adam()

    times: dict[str, list[float]] = {"lazy": [], "dense": []}
    for i in range(settings.rounds + 1):
        indices = random.choice(case.table_rows, case.rows, replace=False)
        steps = {
            "lazy": partial(lazy.apply_sparse, indices, grad_rows, table),
            "dense": partial(dense.apply_gradients, [(dense_grad, table)]),
        }
        for name, step in steps.items():
            np.add(swept, 1, out=swept)
            taken = seconds(step)
            # The first steps allocate the moments.
            if i > 0:
                times[name].append(taken)
    return {
        "case": f"{case.rows:,} of {case.table_rows:,} x {WIDTH}",
        "dtype": "float32",
        "threads": settings.threads,
        **case._asdict(),
        "width": WIDTH,
        "seconds": times,
    }


def seconds(step: Callable[[], Any]) -> float:
    """Return the time of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
