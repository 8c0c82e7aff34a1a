# SPDX-License-Identifier: MIT
"""fusedadam behind the interfaces of frameworks, against the frameworks' own optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from runner import Bench, Row, not_run
from runner.machine import RESET_PEAK, baseline_bytes, process_bytes, too_large
from runner.worker import absence, call

BESIDE_TORCH = ("fusedadam.torch", "torch fused", "torch default")
BESIDE_KERAS = ("fusedadam.keras", "keras torch")
BESIDE_OPTAX = ("fusedadam.jax", "optax")
JAX_SHAPES = ((1, 1 << 26), (10, 1 << 20), (1_000, 1_000))
SHAPES = ((1, 10_000), (1, 1 << 20), (1, 1 << 26), (1_000, 1_000))

BATCH = 8  # small, so that gradients use more memory than activations
STEPS = 3
# Trainings with the same settings compute the same, but matrix products may round differently in
# another process.
LOSS_TOLERANCE = 1e-3


def transformer(width: int, blocks: int, classes: int) -> tuple[int, ...]:
    """Return the sizes of a small transformer's variables: kernels, biases, normalizations."""
    dense = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    norm = (width, width)
    block = [size for rows, columns in dense for size in (rows * columns, columns)]
    return (*(blocks * (*block, *norm, *norm)), *norm, width * classes, classes)


def adapters(bench: Bench) -> list[Row]:
    """Time each adapter interleaved with its framework."""
    shapes = ((20, 100),) if bench.quick else SHAPES
    rows = [bench.contest.row(bench, BESIDE_TORCH, [size] * n) for n, size in shapes]
    rows += [
        bench.contest.row(bench, BESIDE_OPTAX, [size] * n, case=f"JAX, {n:,} x {size:,}")
        for n, size in (((20, 100),) if bench.quick else JAX_SHAPES)
    ]
    # 10M parameters in 40 variables.
    model = transformer(16, 3, 10) if bench.quick else transformer(512, 3, 1_000)
    case = f"a model of {sum(model):,}"
    return [*rows, bench.contest.row(bench, BESIDE_KERAS, model, case=case)]


def peaks(bench: Bench) -> list[Row]:
    """Measure the peaks of two trainings of 100M parameters. One holds no gradients (`attach`)."""
    width = 128 if bench.quick else 2_048
    return peak_rows(
        bench,
        {
            "backward, then step": Training(24, width, False, 12, {}),
            "attach": Training(24, width, True, 12, {}),
        },
    )


class Training(NamedTuple):
    """A training of a deep network of layers with equal widths."""

    layers: int
    width: int
    attached: bool  # whether it steps inside of the backward pass
    expected: int  # bytes of an element that have to exist
    settings: dict[str, Any]  # of the optimizer

    @property
    def elements(self) -> int:
        """The number of parameters."""
        return self.layers * (self.width * self.width + self.width)


def peak_rows(bench: Bench, trainings: Mapping[str, Training]) -> list[Row]:
    """Return a row for each training, measured in a fresh process."""
    rows = []
    losses: list[float] = []
    for name, training in trainings.items():
        # A model begins in float32. Gradients take 4 bytes at most.
        why = too_large((max(4, training.expected) + 4) * training.elements) or absence("torch")
        why = why or ("" if RESET_PEAK.exists() else f"no {RESET_PEAK} here")
        if why:
            rows.append(not_run(name, {name: why}))
            continue
        found = call(measure, training, bench.threads, threads=bench.threads)
        losses.append(found.pop("loss"))
        if not math.isclose(losses[0], losses[-1], rel_tol=LOSS_TOLERANCE):
            rows.append(not_run(name, {name: f"wrong result: losses that differ: {losses}"}))
            continue
        expected = training.expected * training.elements
        rows.append(bench.row(name, training.elements, {}, expected_bytes=expected, **found))
    return rows


def measure(training: Training, threads: int) -> dict[str, float]:
    """Return the bytes before the model is made, at the peak and held, and the last loss."""
    from peers.torch_adam import set_threads

    set_threads(threads)
    train(training._replace(width=8), 1)  # loads everything that a step needs
    baseline = baseline_bytes()
    loss, held, peak = train(training, STEPS)
    return {"baseline_bytes": baseline, "peak_bytes": peak, "held_bytes": held, "loss": loss}


def train(training: Training, steps: int) -> tuple[float, int, int]:
    """Train a new model; return the last loss, and the bytes held after a step and at the peak.

    The first step makes the moments, and is no part of the peak.
    """
    import fusedadam.torch
    import torch
    from peers.torch_adam import held_bytes

    torch.manual_seed(1)
    width = training.width
    linears = [torch.nn.Linear(width, width) for _ in range(training.layers)]
    model = torch.nn.Sequential(*(part for f in linears for part in (f, torch.nn.ReLU())))
    optimizer = fusedadam.torch.Adam(model.parameters(), **training.settings)
    if "low_bits" in training.settings:
        fusedadam.torch.split_(model, optimizer)
    if training.attached:
        fusedadam.torch.attach(model, optimizer)
    inputs = torch.randn(BATCH, width).to(next(model.parameters()).dtype)
    targets = torch.randn(BATCH, width)
    for step in range(steps + 1):
        loss: Any = torch.nn.functional.mse_loss(model(inputs).float(), targets)
        loss.backward()
        if not training.attached:
            optimizer.step()
        held = held_bytes(model.parameters(), optimizer)
        if not training.attached:
            optimizer.zero_grad()
        if step == 0:
            baseline_bytes()
    return float(loss.item()), held, process_bytes("VmHWM")
