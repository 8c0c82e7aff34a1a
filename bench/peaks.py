# SPDX-License-Identifier: MIT
"""The peak memory of trainings with `fusedadam.torch`, each in a fresh process.

The moments are allocated before the peak is measured. The baseline is the same process after
trainings of a tiny model, so that torch itself and what it loads for a step are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import child
from machine import available_bytes
from rounds import SPARE_BYTES
from settings import Settings, Tick

BATCH = 8  # small, so that gradients use more memory than activations
STEPS = 3
# Trainings with the same settings compute the same, but matrix products may round differently in
# another process.
LOSS_TOLERANCE = 1e-3
# Only Linux has it.
RESET_PEAK = Path("/proc/self/clear_refs")


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


def peak_rows(
    trainings: Mapping[str, Training], settings: Settings, tick: Tick
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each training, and reasons for those that were not run."""
    rows, not_run = [], {}
    losses: list[float] = []
    for name, training in trainings.items():
        why = absent(training)
        if why:
            not_run[name] = why
        else:
            baseline, peak, held, loss = child.call(measure, training, settings.threads)
            losses.append(loss)
            rows.append(
                {
                    "contender": name,
                    "attached": training.attached,
                    "elements": training.elements,
                    "peak_bytes": peak,
                    "baseline_bytes": baseline,
                    "expected_bytes": training.expected * training.elements,
                    "held_bytes": held,
                }
            )
        tick(name)
    if any(not math.isclose(loss, losses[0], rel_tol=LOSS_TOLERANCE) for loss in losses):
        return [], dict.fromkeys(trainings, f"wrong result: losses that differ: {losses}")
    return rows, not_run


def absent(training: Training) -> str:
    """Return why a training cannot run, or ""."""
    # A model begins in float32. Gradients take 4 bytes at most.
    return unmeasurable((max(4, training.expected) + 4) * training.elements)


def unmeasurable(needed: int) -> str:
    """Return why a peak of so many bytes cannot be measured, or ""."""
    if needed + SPARE_BYTES > available_bytes():
        return f"memory: needs {(needed + SPARE_BYTES) / 2**30:.1f} GiB"
    if not RESET_PEAK.exists():
        return f"no {RESET_PEAK} here, which lets a peak be counted anew"
    return child.absence("torch") or ""


# ---- in a process of its own -------------------------------------------------------------------


def measure(parts: list[Any], threads: int) -> tuple[int, int, int, float]:
    """Return the bytes before the model is made, the peak, the held bytes, and the last loss."""
    import fusedadam
    import torch
    from worker import collect, process_bytes

    training = Training(*parts)
    torch.set_num_threads(threads)
    fusedadam.set_num_threads(threads)
    Trainer(training._replace(width=8)).steps(1)  # loads everything that a step needs
    collect()
    baseline = process_bytes("VmRSS")
    trainer = Trainer(training)
    trainer.steps(1)  # makes the moments
    collect()
    RESET_PEAK.write_text("5")
    loss = trainer.steps(STEPS)
    return baseline, process_bytes("VmHWM"), trainer.held_bytes, loss


class Trainer:
    """A new model and its optimizer.

    `held_bytes` is the size of parameters, gradients and state after the last step.
    """

    def __init__(self, training: Training) -> None:
        import fusedadam.torch
        import torch

        torch.manual_seed(1)
        width = training.width
        layers = [
            layer
            for _ in range(training.layers)
            for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())
        ]
        self._model = torch.nn.Sequential(*layers)
        settings = training.settings
        self._optimizer = fusedadam.torch.Adam(self._model.parameters(), **settings)
        if "low_bits" in settings:
            fusedadam.torch.split_(self._model, self._optimizer)
        self._attached = training.attached
        if self._attached:
            fusedadam.torch.attach(self._model, self._optimizer)
        dtype = next(self._model.parameters()).dtype
        self._inputs = torch.randn(BATCH, width).to(dtype)
        self._targets = torch.randn(BATCH, width)
        self.held_bytes = 0

    def steps(self, count: int) -> float:
        """Take steps, and return the last loss."""
        import torch
        from peers.storing import held_bytes

        for _ in range(count):
            outputs = self._model(self._inputs).float()
            loss: Any = torch.nn.functional.mse_loss(outputs, self._targets)
            loss.backward()
            if not self._attached:
                self._optimizer.step()
            self.held_bytes = held_bytes(self._model.parameters(), self._optimizer)
            if not self._attached:
                self._optimizer.zero_grad()
        return float(loss.item())
