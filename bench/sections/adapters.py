# SPDX-License-Identifier: MIT
"""fusedadam behind the interfaces of PyTorch and Keras 3, against the frameworks' own optimizers.

The section also measures the peak memory of two trainings: one steps inside of the backward pass
(`attach`), the other after it, when all gradients exist. Each runs in a fresh process. The moments
are allocated before the peak is measured.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import child
from machine import available_bytes
from rounds import SPARE_BYTES, Case, Contest, chosen
from settings import Results, Settings, Tick

TITLE = "PyTorch and Keras 3"

TORCH, KERAS = "fusedadam.torch", "fusedadam.keras"
# Adapter -> the contenders that it is compared with.
BESIDE = {TORCH: ("torch fused", "torch default"), KERAS: ("keras torch",)}

# Number of tensors, and elements of each.
TORCH_SHAPES = ((1, 10_000), (1, 1 << 20), (1, 1 << 26), (1_000, 1_000))
QUICK_TORCH_SHAPES = ((1, 10_000), (20, 100))


def transformer(width: int, blocks: int, classes: int) -> tuple[int, ...]:
    """Return the sizes of a small transformer's variables: kernels, biases, normalizations."""
    dense = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    norm = (width, width)
    block = [size for rows, columns in dense for size in (rows * columns, columns)]
    return (*(blocks * (*block, *norm, *norm)), *norm, width * classes, classes)


# 10M parameters in 40 variables.
MODEL = transformer(width=512, blocks=3, classes=1_000)
QUICK_MODEL = transformer(width=16, blocks=3, classes=10)

# A deep network with 100M parameters. Its layers have equal widths, so each has 1/24 of the
# gradients.
LAYERS, WIDTH, QUICK_WIDTH = 24, 2_048, 128
BATCH = 8  # small, so that gradients use more memory than activations
STEPS = 3
ITEM = 4  # bytes of a float32
ARRAYS = 3  # parameter and two moments
# Both trainings compute the same, but matrix products may round differently in another process.
LOSS_TOLERANCE = 1e-3
# Only Linux has it.
RESET_PEAK = Path("/proc/self/clear_refs")
# Training -> whether it steps inside of the backward pass.
TRAININGS = {f"{TORCH}: backward, then step": False, f"{TORCH}: attach": True}


def cases(settings: Settings) -> list[tuple[str, Case]]:
    """Return the timed cases with their adapters."""
    shapes = QUICK_TORCH_SHAPES if settings.quick else TORCH_SHAPES
    model = QUICK_MODEL if settings.quick else MODEL
    mean = round(sum(model) / len(model))
    return [
        *((TORCH, Case(f"{tensors:,} x {size:,}", tensors, size)) for tensors, size in shapes),
        (KERAS, Case(f"a model of {sum(model):,}", len(model), mean, model)),
    ]


def ticks(settings: Settings) -> int:
    """One per case, and one per training."""
    return len(cases(settings)) + len(TRAININGS)


def run(settings: Settings, tick: Tick) -> Results:
    """Time each adapter interleaved with its framework, then measure the peaks."""
    rows = []
    for adapter, beside in BESIDE.items():
        with Contest((adapter, *beside), settings) as contest:
            for case in (case for name, case in cases(settings) if name == adapter):
                rows.append({"adapter": adapter, **contest.row(case)})
                tick(case.name)
    peaks, not_run = peak_rows(settings, tick)
    return {"rows": rows + peaks, "not_run": not_run}


# ---- memory at peak ----------------------------------------------------------------------------


def peak_rows(settings: Settings, tick: Tick) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each training, and reasons for those that were not run."""
    width = QUICK_WIDTH if settings.quick else WIDTH
    elements = LAYERS * (width * width + width)
    rows, not_run = [], {}
    losses: list[float] = []
    for name, attached in TRAININGS.items():
        why = absent(elements)
        if why:
            not_run[name] = why
        else:
            baseline, peak, loss = child.call(measure, width, attached, settings.threads)
            losses.append(loss)
            rows.append(
                {
                    "contender": name,
                    "attached": attached,
                    "elements": elements,
                    "peak_bytes": peak,
                    "baseline_bytes": baseline,
                    "expected_bytes": ARRAYS * ITEM * elements,
                }
            )
        tick(name)
    if any(not math.isclose(loss, losses[0], rel_tol=LOSS_TOLERANCE) for loss in losses):
        return [], dict.fromkeys(TRAININGS, f"wrong result: losses that differ: {losses}")
    return rows, not_run


def absent(elements: int) -> str:
    """Return why trainings cannot run, or ""."""
    if TORCH not in chosen([TORCH]):
        return "not chosen"
    needed = (ARRAYS + 1) * ITEM * elements + SPARE_BYTES
    if needed > available_bytes():
        return f"memory: needs {needed / 2**30:.1f} GiB"
    if not RESET_PEAK.exists():
        return f"no {RESET_PEAK} here, which lets a peak be counted anew"
    return child.absence("torch") or ""


def measure(width: int, attached: bool, threads: int) -> tuple[int, int, float]:
    """Return the bytes before the model is made, the peak of some steps, and the last loss."""
    import fusedadam
    import torch
    from worker import collect, process_bytes

    torch.set_num_threads(threads)
    fusedadam.set_num_threads(threads)
    train(width=8, attached=attached)(1)  # loads everything that a step needs
    collect()
    baseline = process_bytes("VmRSS")
    steps = train(width, attached=attached)
    steps(1)  # makes the moments
    collect()
    RESET_PEAK.write_text("5")
    loss = steps(STEPS)
    return baseline, process_bytes("VmHWM"), loss


def train(width: int, *, attached: bool) -> Any:
    """Return a function that trains a new model for `count` steps and returns the last loss."""
    import fusedadam.torch
    import torch

    torch.manual_seed(1)
    layers = [
        layer for _ in range(LAYERS) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*layers)
    optimizer = fusedadam.torch.Adam(model.parameters())
    if attached:
        fusedadam.torch.attach(model, optimizer)
    inputs, targets = torch.randn(BATCH, width), torch.randn(BATCH, width)

    def steps(count: int) -> float:
        for _ in range(count):
            loss: Any = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            if not attached:
                optimizer.step()
                optimizer.zero_grad()
        return float(loss.item())

    return steps
