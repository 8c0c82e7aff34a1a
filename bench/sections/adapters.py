# SPDX-License-Identifier: MIT
"""fusedadam behind the interfaces of PyTorch and Keras 3, against the frameworks' own optimizers.

The section also measures the peak memory of two trainings: one steps inside of the backward pass
(`attach`), the other after it, when all gradients exist.
"""

from __future__ import annotations

from peaks import Training, peak_rows
from rounds import Case, Contest
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
ARRAY_BYTES = 12  # per element: parameter and two moments


def trainings(settings: Settings) -> dict[str, Training]:
    """Return the trainings. Both should hold no gradients, and only one does."""
    width = QUICK_WIDTH if settings.quick else WIDTH
    return {
        f"{TORCH}: {name}": Training(LAYERS, width, attached, ARRAY_BYTES, {})
        for name, attached in (("backward, then step", False), ("attach", True))
    }


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
    return len(cases(settings)) + len(trainings(settings))


def run(settings: Settings, tick: Tick) -> Results:
    """Time each adapter interleaved with its framework, then measure the peaks."""
    rows = []
    for adapter, beside in BESIDE.items():
        with Contest((adapter, *beside), settings) as contest:
            for case in (case for name, case in cases(settings) if name == adapter):
                rows.append({"adapter": adapter, **contest.row(case)})
                tick(case.name)
    peaks, not_run = peak_rows(trainings(settings), settings, tick)
    return {"rows": rows + peaks, "not_run": not_run}
