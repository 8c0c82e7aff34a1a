# SPDX-License-Identifier: MIT
"""Gradients of float16 and bfloat16 for float32 parameters: widened in the step, never copied."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from fusedadam import Adam, adam_step, global_norm
from helpers import Array, assert_all_same_bits, assert_same_bits, state, values
from training import Training

HALVES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
halves = pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)

# Sizes that leave incomplete vectors, chunks and tiles. The float64 parameter keeps float64
# gradients.
SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((), "float32"),
    ((0, 3), "float32"),
    ((3, 67), "float32"),
    ((2500,), "float32"),
    ((7,), "float64"),
    ((40_001,), "float32"),
]
EVERYTHING: dict[str, Any] = {
    "amsgrad": True,
    "weight_decay": 0.1,
    "l2": 0.2,
    "clipnorm_per_tensor": 0.5,
    "clipvalue": 0.01,
    "use_ema": True,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 2,
    "zero_grad": True,
    "maximize": True,
    "flush_denormals": False,
}


class HalfTraining(Training):
    """Gradients rounded to 16 bits. The oracle gets their exact values."""

    def __init__(self, half: np.dtype[Any], **options: Any) -> None:
        super().__init__(SHAPES, **options)
        self.half = half

    def grads(self) -> list[Array]:
        return [
            g.astype(self.half) if g.dtype == np.float32 else g
            for g in map(np.asarray, super().grads())
        ]

    def call(self, grads: Sequence[Any]) -> None:
        left = self.reference.step(
            [g.astype(p.dtype) for g, p in zip(grads, self.params, strict=True)]
        )
        count = self.optimizer.apply_gradients(list(zip(grads, self.params, strict=True)))
        assert count == self.reference.iterations
        assert_all_same_bits([g.astype(w.dtype) for g, w in zip(grads, left, strict=True)], left)


@halves
@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipnorm": 0.5},
        {"loss_scale": "dynamic", "skip_nonfinite": True},
        {"gradient_accumulation_steps": 3},
        {"zero_grad": True},
        EVERYTHING,
    ],
    ids=str,
)
def test_steps_equal_oracle(half: np.dtype[Any], options: dict[str, Any]) -> None:
    training = HalfTraining(half, **options)
    for _ in range(4):
        training.step()
        training.check()


@halves
@pytest.mark.usefixtures("isa")
def test_every_number_is_widened_exactly(half: np.dtype[Any]) -> None:
    # NumPy and a step only have to agree on which numbers are NaN, not on their payload.
    grads = np.arange(2**16).astype("uint16").view(half)
    p, m, v = (np.zeros(2**16, "float32") for _ in range(3))
    with np.errstate(all="ignore"):
        expected = oracle.adam_step(p, grads.astype("float32"), m, v, step=1)
        adam_step(p, grads, m, v, step=1)
    assert_all_same_bits([p, m, v], expected)


@halves
def test_gradients_are_not_copied(half: np.dtype[Any]) -> None:
    size = 1_000_000
    p, g = np.ones(size, "float32"), np.ones(size).astype(half)
    adam = Adam(clipnorm=1.0)
    adam.apply_gradients([(g, p)])
    tracemalloc.start()
    adam.apply_gradients([(g, p)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size


@halves
def test_gradients_of_another_layout_and_of_memory_that_is_written(half: np.dtype[Any]) -> None:
    rng = np.random.default_rng(3)
    p, g, m, v = state(rng, (6, 8), "float32")
    given = {
        "Fortran": np.asfortranarray(g.astype(half)),
        "strided": np.repeat(g.astype(half), 2, axis=1)[:, ::2],
        "reversed": g.astype(half)[::-1].copy()[::-1],
        "read-only": g.astype(half),
    }
    given["read-only"].flags.writeable = False
    expected = oracle.adam_step(p, g.astype(half).astype("float32"), m, v, step=2)
    for name, grad in given.items():
        arrays = [a.copy() for a in (p, m, v)]
        adam_step(arrays[0], grad, *arrays[1:], step=2)
        assert_all_same_bits(arrays, expected, name)
    # The gradient is the upper half of the parameter's bytes, as they were before the step.
    p = values(rng, 8, "float32")
    grad = p.view(half)[8:]
    adam, reference = Adam(), oracle.OracleAdam([p.copy()])
    reference.step([np.asarray(grad.astype("float32"))])
    adam.apply_gradients([(grad, p)])
    assert_same_bits(p, reference.params[0])


@halves
@pytest.mark.usefixtures("isa")
def test_norm(half: np.dtype[Any]) -> None:
    rng = np.random.default_rng(3)
    grads = [values(rng, shape, "float32").astype(half) for shape in ((70, 41), 5000, ())]
    wide = [g.astype("float32") for g in grads]
    assert global_norm(grads) == oracle.global_norm(wide) == global_norm(wide)
    assert global_norm([np.asfortranarray(grads[0])]) == global_norm([wide[0]])


@halves
def test_get_gradients_gives_the_dtype_of_the_parameter(half: np.dtype[Any]) -> None:
    p, g = np.ones(5, "float32"), np.full(5, 0.5).astype(half)
    for clipnorm in (None, 0.1):
        [grad] = Adam(clipnorm=clipnorm).get_gradients([g], [p])
        assert grad.dtype == np.float32
    assert g.dtype == half


@halves
def test_gradients_that_come_in_turn_in_the_same_memory(half: np.dtype[Any]) -> None:
    buffer = np.zeros(64, "uint8")
    p = np.ones(8, "float32")
    adam, reference = Adam(), oracle.OracleAdam([p.copy()])
    for dtype in (half, np.dtype("float32"), half, HALVES["float16"], HALVES["bfloat16"]):
        grad = buffer[: 8 * dtype.itemsize].view(dtype)
        grad[...] = 0.5
        adam.apply_gradients([(grad, p)])
        reference.step([np.full(8, 0.5, "float32")])
        assert_same_bits(p, reference.params[0])
