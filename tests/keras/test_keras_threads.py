# SPDX-License-Identifier: MIT
"""Several Python threads that step Keras optimizers: different ones at once, and a shared one."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from at_once import together
from helpers import Array, assert_all_same_bits, running, values

os.environ.setdefault("KERAS_BACKEND", "torch")
torch: Any = pytest.importorskip("torch")
keras: Any = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras runs on another backend: KERAS_BACKEND=torch", allow_module_level=True)

import fusedadam.keras

STEPS = 8
OPTIONS: list[dict[str, Any]] = [
    {},
    {"clipnorm": 0.5, "amsgrad": True},
    {"loss_scale_factor": 256.0, "global_clipnorm": 0.5},
    {"gradient_accumulation_steps": 2, "use_ema": True},
]
SIZES = (1_000, 100_000)  # the second is large enough to be split among threads


class Model:
    """Variables with an optimizer and constant gradients."""

    def __init__(self, size: int, options: dict[str, Any]) -> None:
        rng = np.random.default_rng(size)
        shapes = [(size,), (3, 5)]
        self.variables = [keras.Variable(values(rng, shape, "float32")) for shape in shapes]
        self.grads = [torch.from_numpy(values(rng, shape, "float32")) for shape in shapes]
        self.optimizer = fusedadam.keras.Adam(0.01, **options)
        self.optimizer.build(self.variables)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.apply(list(self.grads), self.variables)

    def results(self) -> list[Array]:
        variables = [*self.variables, *self.optimizer.variables]
        return [v.value.detach().numpy() for v in variables]


def test_different_optimizers_at_once() -> None:
    models, alone = (
        [Model(size, options) for size in SIZES for options in OPTIONS] for _ in range(2)
    )
    with running(threads=2):
        together(len(models), lambda i: models[i].steps(STEPS))
        for model, expected in zip(models, alone, strict=True):
            expected.steps(STEPS)
            assert_all_same_bits(model.results(), expected.results())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_optimizer_from_several_threads(size: int, options: dict[str, Any]) -> None:
    # Steps of one optimizer are serialized. The gradients are constant, so the order of the threads
    # does not matter.
    model, alone = Model(size, options), Model(size, options)
    with running(threads=2):
        together(4, lambda _: model.steps(STEPS))
    alone.steps(4 * STEPS)
    assert_all_same_bits(model.results(), alone.results())
