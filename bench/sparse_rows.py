# SPDX-License-Identifier: MIT
"""Time `apply_sparse` against the dense step of the same table, round by round.

A lazy step of some rows of a float32 table, against `apply_gradients` with the gradient of the whole table, by optimizers of the
same settings. The contenders take turns. Each step begins with cold caches, as after the forward and the backward pass of a
model, and names other rows than the one before: a small table that stays in cache would otherwise look cheaper than the same
rows of a large one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fusedadam
import numpy as np

WIDTH = 64  # elements of a row
GRADIENT = 0.01

# Written between two timings: larger than the caches.
SWEPT = np.zeros(1 << 25, np.float32)


class Case(NamedTuple):
    """A table, and how many of its rows a step names."""

    table_rows: int
    rows: int


CASES = [
    Case(1_000_000, 1_000),
    # The same rows, other tables.
    Case(100_000, 1_000),
    Case(10_000, 1_000),
    # The same table, other numbers of rows.
    Case(1_000_000, 100),
    Case(1_000_000, 10_000),
    Case(1_000_000, 100_000),
]


def seconds(step: Callable[[], Any]) -> float:
    """Return the time of one step from cold caches."""
    np.add(SWEPT, 1, out=SWEPT)
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Time both contenders in turn."""
    random = np.random.default_rng(1)
    table = np.ones((case.table_rows, WIDTH), np.float32)
    dense_grad = np.full_like(table, GRADIENT)
    grad_rows = np.full((case.rows, WIDTH), GRADIENT, np.float32)
    lazy, dense = fusedadam.Adam(), fusedadam.Adam()

    times: dict[str, list[float]] = {"lazy": [], "dense": []}
    for i in range(rounds + 1):
        indices = random.choice(case.table_rows, case.rows, replace=False)
        lazy_time = seconds(partial(lazy.apply_sparse, indices, grad_rows, table))
        dense_time = seconds(partial(dense.apply_gradients, [(dense_grad, table)]))
        # The first steps make the moments.
        if i > 0:
            times["lazy"].append(lazy_time)
            times["dense"].append(dense_time)
    ratios = [d / s for d, s in zip(times["dense"], times["lazy"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        **case._asdict(),
        **{f"{name}_us": statistics.median(t) * 1e6 for name, t in times.items()},
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def main() -> int:
    """Run all cases; print a table and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=fusedadam.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    fusedadam.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, {fusedadam.active_isa()}", end=", ")
    print(f"fusedadam {fusedadam.__version__}\n")
    print("| table | rows named | lazy (us) | dense step (us) | dense / lazy | quartiles |")
    print("|---|---|---|---|---|---|")
    results = []
    for case in CASES:
        row = compare(case, args.rounds)
        results.append(row)
        low, high = row["ratio_quartiles"]
        print(
            f"| {case.table_rows:,} x {WIDTH} | {case.rows:,} | {row['lazy_us']:.0f}"
            f" | {row['dense_us']:.0f} | {row['ratio']:.1f} | {low:.1f} to {high:.1f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
