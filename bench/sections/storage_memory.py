# SPDX-License-Identifier: MIT
"""The memory of packed state: at the peak of a training, and of a step of 2.5 billion parameters.

Both count the bytes that parameters, gradients and state hold as well.
"""

from __future__ import annotations

import time
from typing import Any

import child
from formats import FORMATS, PACKED
from peaks import RESET_PEAK, Training, peak_rows, unmeasurable
from settings import Results, Settings, Tick

TITLE = "Memory of packed state"

# 256M parameters in layers of 4M, which bounds the gradients that `attach` holds at a time.
LAYERS, WIDTH = 64, 2_048
QUICK_LAYERS, QUICK_WIDTH = 8, 128
# In float32 they would take 40 GB.
LARGEST, QUICK_LARGEST = 2_500_000_000, 1 << 20
LARGEST_STEPS = 3

HELD = FORMATS[PACKED].held
GRADIENT = FORMATS[PACKED].gradient


def trainings(settings: Settings) -> dict[str, Training]:
    """Return the trainings: with all gradients, and without."""
    layers, width = (QUICK_LAYERS, QUICK_WIDTH) if settings.quick else (LAYERS, WIDTH)
    of_packed = FORMATS[PACKED].settings
    return {
        f"{PACKED}: {name}": Training(layers, width, attached, expected, of_packed)
        for name, attached, expected in (
            ("backward, then step", False, HELD),
            ("attach", True, HELD - GRADIENT),
        )
    }


def ticks(settings: Settings) -> int:
    """One per training, and one for the large step."""
    return len(trainings(settings)) + 1


def run(settings: Settings, tick: Tick) -> Results:
    """Measure the peaks, then the large step."""
    rows, not_run = peak_rows(trainings(settings), settings, tick)
    elements = QUICK_LARGEST if settings.quick else LARGEST
    case = f"1 x {elements:,}"
    why = unmeasurable(HELD * elements)
    if why:
        not_run[case] = why
    else:
        rows.append({"case": case, **child.call(step_largest, elements, settings.threads)})
    tick(case)
    return {"rows": rows, "not_run": not_run}


# ---- in a process of its own -------------------------------------------------------------------


def step_largest(elements: int, threads: int) -> dict[str, Any]:
    """Step one packed tensor, and return a row: its times, its bytes and the peak."""
    import fusedadam.torch
    import torch
    from peers.storing import held_bytes
    from worker import process_bytes

    torch.set_num_threads(threads)
    fusedadam.set_num_threads(threads)
    settings = FORMATS[PACKED].settings

    def optimizer_of(size: int) -> tuple[torch.nn.Parameter, fusedadam.torch.Adam]:
        param = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        param.grad = torch.full_like(param, 1e-3)
        return param, fusedadam.torch.Adam([param], **settings)

    optimizer_of(1 << 16)[1].step()  # loads everything that a step needs
    baseline = process_bytes("VmRSS")
    RESET_PEAK.write_text("5")
    param, optimizer = optimizer_of(elements)
    optimizer.step()  # makes the moments
    times = []
    for _ in range(LARGEST_STEPS):
        begin = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    if not all(float(param[i]) < 1 for i in (0, elements // 2, elements - 1)):
        raise ArithmeticError("wrong result: a weight stands still")
    return {
        "contender": PACKED,
        "dtype": "bfloat16",
        "threads": threads,
        "tensors": 1,
        "elements": elements,
        "seconds": {PACKED: times},
        "peak_bytes": process_bytes("VmHWM"),
        "baseline_bytes": baseline,
        "expected_bytes": HELD * elements,
        "held_bytes": held_bytes([param], optimizer),
    }
