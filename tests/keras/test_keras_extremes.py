# SPDX-License-Identifier: MIT
"""`fusedadam.keras` with extreme floats, and counts near the limit of Keras' 32-bit counter."""

from __future__ import annotations

import os
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
from extremes import column, product, special
from helpers import FLOATS, Array, assert_all_same_bits, running

os.environ.setdefault("KERAS_BACKEND", "torch")
torch: Any = pytest.importorskip("torch")
keras: Any = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras runs on another backend: KERAS_BACKEND=torch", allow_module_level=True)

import fusedadam.keras

# Exact in float32, the precision in which Keras keeps it.
LR = 2.0**-7

OPTIONS: list[dict[str, Any]] = [
    {},
    {"epsilon": 0.0},
    {"amsgrad": True},
    {"weight_decay": 0.1},
    {"clipvalue": 1.0},
    {"loss_scale_factor": 2.0**20},
]


def array(variable: Any) -> Array:
    numbers: Array = variable.value.detach().numpy()
    return numbers


def counted(count: int, p: Array, **options: Any) -> tuple[Any, Any]:
    """An optimizer that has taken `count` steps, and its variable."""
    variable = keras.Variable(p, dtype=str(p.dtype))
    optimizer = fusedadam.keras.Adam(LR, **options)
    optimizer.build([variable])
    optimizer._iterations.assign(count)
    return optimizer, variable


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_special_numbers(dtype: str, options: dict[str, Any]) -> None:
    numbers = special(dtype)
    p, g, m, v = product([numbers] * 4)
    arrays = {"_momentums": m, "_velocities": v}
    if options.get("amsgrad"):
        arrays["_velocity_hats"] = column(numbers, [1, 1, 1, 1], 0, 4)
    (clipped,) = oracle.clip(
        [g], clipvalue=options.get("clipvalue"), divisor=options.get("loss_scale_factor")
    )
    epsilon = options.get("epsilon", 1e-7)
    expected = oracle.adam_step(
        p,
        clipped,
        m,
        v,
        vhat=arrays.get("_velocity_hats"),
        step=4,
        lr=LR,
        epsilon=epsilon,
        weight_decay=options.get("weight_decay"),
        flush_denormals=epsilon >= 1e-12,
    )
    optimizer, variable = counted(3, p, **options)
    for isa in fusedadam.supported_isas():
        variable.assign(p)
        optimizer._iterations.assign(3)
        kept = [getattr(optimizer, name)[0] for name in arrays]
        for own, before in zip(kept, arrays.values(), strict=True):
            own.assign(before)
        with running(isa=isa):
            optimizer.apply([torch.from_numpy(g.copy())], [variable])
        actual = [array(x) for x in (variable, *kept)]
        assert_all_same_bits(actual, expected, f"{isa}: [p, m, v, ...]")


def test_count_ends_with_32_bits() -> None:
    # Keras' own step turns all parameters into NaN here, because its count becomes negative.
    p, g = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    beta_2 = 1 - 2.0**-30
    expected = oracle.OracleAdam([p], lr=LR, beta_2=beta_2, epsilon=1e-7)
    expected.set_count(2**31 - 3)
    optimizer, variable = counted(expected.iterations, p, beta_2=beta_2)
    for _ in range(3):
        expected.step([g])
        optimizer.apply([torch.from_numpy(g)], [variable])
        kept = (variable, optimizer._momentums[0], optimizer._velocities[0])
        after = [array(x).copy() for x in kept]
        assert_all_same_bits(after, [*expected.params, *expected.m, *expected.v])
    assert int(optimizer.iterations) == -(2**31)
    message = r"^iterations must be >= 0 and <= 2\*\*53\. Received: iterations=-2147483648"
    with pytest.raises(ValueError, match=message):
        optimizer.apply([torch.from_numpy(g)], [variable])
    assert_all_same_bits([array(x) for x in kept], after)
