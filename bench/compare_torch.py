# SPDX-License-Identifier: MIT
"""Time `fusedadam.Adam` against torch's fused optimizers in one run, round by round.

Both step the same shapes in float32 with gradients at hand, on the same number of threads: a plain step, against
`torch.optim.Adam(fused=True)`; and a training tail, which is clipping by the global norm, decoupled weight decay, averages of
the parameters and zeroed gradients, one step here and in torch the calls that its documentation advises. The contenders take
turns, and the figure to trust is the ratio of a round, of which the median and the quartiles are printed: the machines that
this runs on are shared, and no absolute time holds.

Needs torch 2.13.0, CPU build.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import fusedadam
import numpy as np
import torch

GRADIENT = 0.01
LR = 0.001
WEIGHT_DECAY = 0.01
EMA_MOMENTUM = 0.99
# Below the norm of every list of gradients here, so that each step clips.
CLIPNORM = 0.1


class Contender(NamedTuple):
    """A way to step: `step` is timed, what it leaves is in `params`, its gradients in `grads`."""

    step: Callable[[], Any]
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    averages: list[torch.Tensor]


Contenders: TypeAlias = dict[str, Callable[[list[int]], Contender]]


class Case(NamedTuple):
    """A list of tensors, how often to step it within one timing, and what steps it."""

    name: str
    sizes: list[int]
    steps: int
    contenders: Contenders
    zeroes: bool  # the gradients, which are then set again before each step


def fusedadam_step(sizes: list[int]) -> Contender:
    """Step plainly."""
    return fusedadam_contender(fusedadam.Adam(lr=LR), sizes)


def torch_step(sizes: list[int]) -> Contender:
    """Step plainly."""
    params, grads = torch_tensors(sizes)
    return Contender(torch.optim.Adam(params, lr=LR, fused=True).step, params, grads, [])


def fusedadam_tail(sizes: list[int]) -> Contender:
    """Step with the options of a training tail."""
    adam = fusedadam.Adam(
        lr=LR,
        clipnorm=CLIPNORM,
        weight_decay=WEIGHT_DECAY,
        use_ema=True,
        ema_momentum=EMA_MOMENTUM,
        zero_grad=True,
    )
    return fusedadam_contender(adam, sizes)


def torch_tail(sizes: list[int]) -> Contender:
    """Clip, step, average and zero."""
    params, grads = torch_tensors(sizes)
    averages = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    # The first average is the parameter itself, as `torch.optim.swa_utils` has it too.
    weights = itertools.chain([1.0], itertools.repeat(1 - EMA_MOMENTUM))

    @torch.no_grad()
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIPNORM, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, params, next(weights))
        torch._foreach_zero_(grads)

    return Contender(step, params, grads, averages)


def fusedadam_contender(adam: fusedadam.Adam, sizes: list[int]) -> Contender:
    """Step NumPy arrays with this optimizer."""
    params = [np.ones(n, np.float32) for n in sizes]
    grads = [np.full(n, GRADIENT, np.float32) for n in sizes]
    pairs = list(zip(grads, params, strict=True))
    adam.build(params)
    params_seen, grads_seen, averages_seen = (
        [torch.from_numpy(array) for array in arrays] for arrays in (params, grads, adam.ema)
    )
    return Contender(lambda: adam.apply_gradients(pairs), params_seen, grads_seen, averages_seen)


def torch_tensors(sizes: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return parameters and their gradients."""
    params = [torch.ones(n, requires_grad=True) for n in sizes]
    grads = [torch.full_like(param, GRADIENT, requires_grad=False) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params, grads


PLAIN: Contenders = {"fusedadam": fusedadam_step, "torch": torch_step}
TAIL: Contenders = {"fusedadam": fusedadam_tail, "torch": torch_tail}

CASES = [
    Case("1 x 1,000", [1_000], 1000, PLAIN, False),
    Case("1 x 10,000", [10_000], 1000, PLAIN, False),
    Case("1 x 1M", [1 << 20], 50, PLAIN, False),
    Case("1 x 64M", [1 << 26], 2, PLAIN, False),
    Case("1,000 x 1,000", [1_000] * 1_000, 5, PLAIN, False),
    Case("tail, 1 x 1M", [1 << 20], 20, TAIL, True),
    Case("tail, 1 x 64M", [1 << 26], 1, TAIL, True),
]


def seconds(contender: Contender, case: Case) -> float:
    """Return the time of one step, the mean of `case.steps` of them."""
    if not case.zeroes:
        begin = time.perf_counter()
        for _ in range(case.steps):
            contender.step()
        return (time.perf_counter() - begin) / case.steps
    total = 0.0
    for _ in range(case.steps):
        for grad in contender.grads:
            grad.fill_(GRADIENT)
        begin = time.perf_counter()
        contender.step()
        total += time.perf_counter() - begin
    return total / case.steps


def check_agreement(case: Case) -> None:
    """Step both contenders over a little of random gradients: they must do the same.

    Loosely, since torch adds its epsilon elsewhere, and another one to the norm.
    """
    sizes = [min(n, 1000) for n in case.sizes[:3]]
    ours, theirs = (make(sizes) for make in case.contenders.values())
    random = torch.Generator().manual_seed(1)
    for scale in range(1, 6):  # a step of Adam shows changes of scale, and not scale itself
        for our_grad, their_grad in zip(ours.grads, theirs.grads, strict=True):
            our_grad.uniform_(0.5 * scale, 1.5 * scale, generator=random)
            their_grad.copy_(our_grad)
        ours.step()
        theirs.step()
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Time both contenders in turn."""
    check_agreement(case)
    contenders = {name: make(case.sizes) for name, make in case.contenders.items()}
    for contender in contenders.values():
        seconds(contender, case._replace(steps=3))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(seconds(contender, case))
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
    grad = np.full(size, GRADIENT, np.float32)
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
