# SPDX-License-Identifier: MIT
"""Time `fusedadam.Adam` against `torch.optim.Adam(fused=True)` in one run, round by round.

Both step the same shapes in float32 with gradients at hand, on the same number of threads. The contenders take turns,
and the figure to trust is the ratio of a round, of which the median and the quartiles are printed: the machines that this
runs on are shared, and no absolute time holds.

Needs torch 2.13.0, CPU build.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fusedadam
import numpy as np
import torch


class Case(NamedTuple):
    """A list of tensors, and how often to step it within one timing."""

    name: str
    sizes: list[int]
    steps: int


CASES = [
    Case("1 x 1,000", [1_000], 1000),
    Case("1 x 10,000", [10_000], 1000),
    Case("1 x 1M", [1 << 20], 50),
    Case("1 x 64M", [1 << 26], 2),
    Case("1,000 x 1,000", [1_000] * 1_000, 5),
]


def fusedadam_step(sizes: list[int]) -> Callable[[], Any]:
    """Return a function that takes one step."""
    params = [np.ones(n, np.float32) for n in sizes]
    grads = [np.full(n, 0.01, np.float32) for n in sizes]
    pairs = list(zip(grads, params, strict=True))
    adam = fusedadam.Adam()
    return lambda: adam.apply_gradients(pairs)


def torch_step(sizes: list[int]) -> Callable[[], Any]:
    """Return a function that takes one step."""
    params = [torch.ones(n, requires_grad=True) for n in sizes]
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    return torch.optim.Adam(params, fused=True).step


def seconds(step: Callable[[], Any], steps: int) -> float:
    """Return the time of one step, the mean of `steps` of them."""
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Time both contenders in turn."""
    contenders = {"fusedadam": fusedadam_step(case.sizes), "torch": torch_step(case.sizes)}
    for step in contenders.values():
        seconds(step, 3)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            times[name].append(seconds(step, case.steps))
    ratios = [t / f for t, f in zip(times["torch"], times["fusedadam"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": case.name,
        **{f"{name}_us": statistics.median(t) * 1e6 for name, t in times.items()},
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def first_step(size: int, rounds: int) -> dict[str, Any]:
    """Time `build` and the first step against a later step, on memory that was in use before."""
    param = np.ones(size, np.float32)
    grad = np.full(size, 0.01, np.float32)
    ratios = []
    for i in range(rounds + 1):
        adam = fusedadam.Adam()
        begin = time.perf_counter()
        adam.build([param])
        adam.apply_gradients([(grad, param)])
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        adam.apply_gradients([(grad, param)])
        later = time.perf_counter() - begin
        # The first of all gets pages that the machine may have to find first.
        if i > 0:
            ratios.append(first / later)
        del adam
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"case": f"build + first step, {size}", "ratio": middle, "ratio_quartiles": [low, high]}


def main() -> int:
    """Run all cases; print a table and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=fusedadam.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    fusedadam.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, {fusedadam.active_isa()}", end=", ")
    print(f"fusedadam {fusedadam.__version__}, torch {torch.__version__}\n")
    print("| tensors | fusedadam (us) | torch fused (us) | torch / fusedadam | quartiles |")
    print("|---|---|---|---|---|")
    results = []
    for case in CASES:
        row = compare(case, args.rounds)
        results.append(row)
        low, high = row["ratio_quartiles"]
        print(
            f"| {row['case']} | {row['fusedadam_us']:.1f} | {row['torch_us']:.1f}"
            f" | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |",
            flush=True,
        )
    row = first_step(1 << 26, 5)
    results.append(row)
    low, high = row["ratio_quartiles"]
    print(
        f"\nbuild and first step of 64M, over a later step: {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
