# SPDX-License-Identifier: MIT
"""Extreme floats in every input of a step, compared with the oracle bit for bit.

Exhaustive tables and no samples: every combination of special numbers, under every option, in both
precisions, with every instruction set. FUSEDADAM_EXTREMES=all tests all combinations of six arrays
and of four hyper-parameters, which takes some minutes. ``-o log_cli=true`` logs the number of
compared elements.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
from extremes import ALL, check_call, column, compared, covering, few, product, special
from fusedadam import Adam, adam_step, global_norm
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits

FLUSH = [True, False]
LARGEST = float(np.finfo(np.float64).max)
# The largest double below 1. It rounds to 1 in float32.
NEARLY_1 = 1 - 2.0**-53
LEAST = 5e-324


@pytest.fixture(scope="module", autouse=True)
def _figure() -> Iterator[None]:
    yield
    logging.getLogger(__name__).info(
        "%d elements compared, of %d calls with each of: %s",
        compared["elements"],
        compared["calls"],
        ", ".join(fusedadam.supported_isas()),
    )


# -- every combination of special numbers -----------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.0},
    {"epsilon": 0.0},
    {"bias_corrected_epsilon": True},
    {"decay": 0.3},
    {"weight_decay": 0.1},
    {"l2": 0.1},
    {"weight_decay": 0.5, "l2": 0.25, "maximize": True},
    {"clipvalue": 1.0},
    {"clipvalue": 1e-44},
    {"clipnorm": 1.0},
    {"clipnorm_per_tensor": 1.0},
    {"maximize": True},
    {"loss_scale": 3.0},
    {"loss_scale": 2.0**-127},
    {"loss_scale": 2.0**127},
    {"loss_scale": "dynamic"},
    {"skip_nonfinite": True},
    {"zero_grad": True},
]
# Options with an additional array. `accumulated` is the gradient of the previous call.
ARRAYS: list[tuple[str, dict[str, Any]]] = [
    ("vhat", {}),
    ("vhat", {"epsilon": 0.0}),
    ("ema", {}),
    ("ema", {"ema_momentum": 0.0}),
    ("ema", {"ema_momentum": 1.0}),
    ("ema", {"ema_overwrite_frequency": 2}),
    ("accumulated", {"gradient_accumulation_steps": 2}),
    ("accumulated", {"gradient_accumulation_steps": 2, "loss_scale": 2.0**127}),
    ("accumulated", {"gradient_accumulation_steps": 2, "loss_scale": "dynamic"}),
]
WHOLE = [next(case for case in ARRAYS if case[0] == name) for name in dict(ARRAYS)]
EVERYTHING: dict[str, Any] = {
    "bias_corrected_epsilon": True,
    "decay": 0.3,
    "weight_decay": 0.1,
    "l2": 0.2,
    "clipvalue": 2.0,
    "loss_scale": 0.5,
    "gradient_accumulation_steps": 2,
    "ema_overwrite_frequency": 4,
    "maximize": True,
    "zero_grad": True,
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", FLUSH)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_special_numbers(dtype: str, flush_denormals: bool, options: dict[str, Any]) -> None:
    arrays = product([special(dtype)] * 4)
    check_call(*arrays, flush_denormals=flush_denormals, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", FLUSH)
@pytest.mark.parametrize(("name", "options"), ARRAYS, ids=str)
def test_special_numbers_in_five_arrays(
    dtype: str, flush_denormals: bool, name: str, options: dict[str, Any]
) -> None:
    # For the first entry of each name, all combinations; for the others, those of any four of the
    # five arrays.
    numbers = special(dtype)
    whole = ALL or (name, options) in WHOLE
    for shift in range(len(numbers) if whole else 1):
        more: dict[str, Any] = {name: column(numbers, [1, 1, 1, 1], shift, 4)} | options
        check_call(*product([numbers] * 4), **more, flush_denormals=flush_denormals)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", FLUSH)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_special_numbers_in_six_arrays(
    dtype: str, flush_denormals: bool, options: dict[str, Any]
) -> None:
    numbers = special(dtype)
    arrays = product([numbers] * 4)
    shifts = range(len(numbers) if ALL else 1)
    for i, j in itertools.product(shifts, repeat=2):
        more: dict[str, Any] = {
            "vhat": column(numbers, [1, 1, 1, 1], i, 4),
            "ema": column(numbers, [1, 2, 4, 7], j, 4),
        }
        if options:
            more["accumulated"] = column(numbers, [1, 4, 7, 2], i + j, 4)
        check_call(*arrays, flush_denormals=flush_denormals, **(more | options))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", FLUSH)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_special_numbers_beside_the_vectors(
    dtype: str, flush_denormals: bool, options: dict[str, Any]
) -> None:
    # The tail of a vector is processed by another loop or by a masked vector.
    numbers = few(dtype)
    more: dict[str, Any] = {
        name: column(numbers, factors, 0, 4)
        for name, factors in (("vhat", [1, 1, 1, 1]), ("ema", [1, 3, 7, 9]))
    }
    if options:
        more["accumulated"] = column(numbers, [1, 7, 3, 1], 0, 4)
    arrays = product([numbers] * 4)
    check_call(*arrays, split=True, flush_denormals=flush_denormals, **(more | options))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("iterations", [0, 1])
def test_special_numbers_at_the_first_steps(dtype: str, iterations: int) -> None:
    # The first step sets the average to the parameter, with a momentum of 0.
    numbers = special(dtype)
    ema = column(numbers, [1, 1, 1, 1], 0, 4)
    check_call(*product([numbers] * 4), ema=ema, iterations=iterations)


# -- norms ------------------------------------------------------------------------------------


def grads_of(dtype: str, kind: str) -> Array:
    """Gradients with a norm of this kind."""
    numbers = special(dtype)
    kinds = {
        "nothing": numbers[numbers == 0],
        "subnormal": numbers[np.abs(numbers) < np.finfo(dtype).smallest_normal],
        "small": numbers[np.abs(numbers) <= np.finfo(dtype).smallest_normal],
        "one": numbers[np.abs(numbers) <= 1],
        "largest": numbers[np.isfinite(numbers)],
        "infinite": numbers[~np.isnan(numbers)],
        "NaN": numbers,
    }
    return np.asarray(kinds[kind])


KINDS = ["nothing", "subnormal", "small", "one", "largest", "infinite", "NaN"]
CLIPS = [0.0, LEAST, 1e-300, 1e-46, 1e-38, 1.0, 1e38, 1e300, LARGEST]
SCALES: list[float | str | None] = [None, 2.0**-127, 3.0, 2.0**127, "dynamic"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("loss_scale", SCALES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["clipnorm", "clipnorm_per_tensor"])
def test_norms(dtype: str, loss_scale: float | str | None, kind: str, option: str) -> None:
    numbers = few(dtype)
    arrays = product([numbers[[1, 4]], grads_of(dtype, kind), numbers[[0, 2, 5, 7]], numbers[:7]])
    for clip in CLIPS:
        options: dict[str, Any] = {option: clip, "loss_scale": loss_scale}
        check_call(*arrays, **options, clipvalue=2.0)
        check_call(*arrays, **options, maximize=True, skip_nonfinite=True)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_norms_of_two_tensors_of_both_dtypes(first: str, second: str) -> None:
    grads = [grads_of("float32", first), grads_of("float64", second)]
    assert_norms_as_the_oracle(grads)


def assert_norms_as_the_oracle(grads: Sequence[Array]) -> None:
    params = [np.ones_like(g) for g in grads]
    assert_same_bits(np.float64(global_norm(grads)), np.float64(oracle.global_norm(grads)), "norm")
    for clip in CLIPS:
        for option in ("clipnorm", "clipnorm_per_tensor"):
            options: dict[str, Any] = {option: clip}
            clipped = Adam(**options).get_gradients(grads, params)
            assert_all_same_bits(clipped, oracle.clip(grads, **options), str(options))


@pytest.mark.parametrize("dtype", FLOATS)
def test_accumulated_gradients_that_overflow_together(dtype: str) -> None:
    # Each gradient is finite but their sum is not. The sum is what counts.
    largest = np.finfo(dtype).max
    g = np.array([largest, -largest, 1.0], dtype)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    for other in (g, -g):
        for skip in ({"skip_nonfinite": True}, {"loss_scale": "dynamic"}, {"clipnorm": 1.0}, {}):
            check_call(g, g, g, np.abs(g), accumulated=other, **options, **skip)


# -- hyper-parameters -------------------------------------------------------------------------

# In float32, 3.5e38 and more are infinite, and 1e-46 and less round to 0.
CHOICES: dict[str, Sequence[Any]] = {
    "lr": [0.0, LEAST, 1e-46, 1e-45, 1e-3, 1.0, 1e38, 3.5e38, 1e300, LARGEST, -0.0],
    "beta_1": [0.9, 0.0, LEAST, 1e-46, 1e-45, 2.0**-53, 0.5, 1 - 2.0**-24, 1 - 2.0**-25, NEARLY_1],
    "beta_2": [
        0.999,
        0.0,
        LEAST,
        1e-46,
        1e-45,
        2.0**-53,
        0.5,
        1 - 2.0**-24,
        1 - 2.0**-25,
        NEARLY_1,
    ],
    "epsilon": [1e-8, 0.0, LEAST, 1e-46, 1e-45, 1e-38, 1.0, 1e38, 3.5e38, 1e300, LARGEST],
    "decay": [0.0, LEAST, 1e-300, 2.0**-53, 1.0, 1e300, LARGEST],
    "weight_decay": [None, 0.0, LEAST, 1e-46, 1e-45, 1.0, 1e38, 3.5e38, 1e300, LARGEST],
    "l2": [0.0, LEAST, 1e-46, 1e-45, 1.0, 1e38, 3.5e38, 1e300, LARGEST],
    "clipvalue": [None, 0.0, LEAST, 1e-46, 1e-45, 1.0, 1e38, 3.5e38, 1e300, LARGEST],
    "loss_scale": [None, 2.0**-127, 1e-37, 1.0, 3.0, 1e37, 1.5 * 2.0**126, 2.0**127],
    "ema_momentum": [0.99, 0.0, LEAST, 1e-46, 2.0**-53, NEARLY_1, 1.0],
    "iterations": [0, 1, 2, 1_000, 2**24, 2**31 - 1, 2**31, 2**32, 2**53 - 2, 2**53 - 1],
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", FLUSH)
@pytest.mark.parametrize("name", CHOICES)
def test_extreme_hyper_parameter(dtype: str, flush_denormals: bool, name: str) -> None:
    numbers = few(dtype)
    arrays = product([numbers] * 4)
    ema = column(numbers, [1, 1, 1, 1], 0, 4)
    for value in CHOICES[name]:
        check_call(*arrays, ema=ema, **{"flush_denormals": flush_denormals, name: value})


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_hyper_parameters_together(dtype: str) -> None:
    # All combinations of any two of them (of any three takes some minutes), with some numbers each.
    numbers = few(dtype)
    vhat, ema = (column(numbers, [1, k], 0, 2) for k in (1, 3))
    more: dict[str, Any] = {"vhat": vhat, "ema": ema, "flush_denormals": False}
    m, v = product([numbers[[0, 2, 4, 5, 7]], numbers[[0, 2, 4, 5]]])
    m, v = np.resize(m, ema.shape), np.resize(v, ema.shape)
    p, g = product([numbers] * 2)
    for row in covering(CHOICES, prime=11, strength=3 if ALL else 2):
        check_call(p, g, m, v, **more, **row)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("beta_1", [0.0, LEAST, 0.9, NEARLY_1])
@pytest.mark.parametrize("beta_2", [0.0, LEAST, 0.999, NEARLY_1])
def test_betas_of_zero_in_the_function(dtype: str, beta_1: float, beta_2: float) -> None:
    arrays = product([few(dtype)] * 4)
    for step in (1, 2, 2**31, 2**53):
        actual = [a.copy() for a in arrays]
        options: dict[str, Any] = {"beta_1": beta_1, "beta_2": beta_2, "step": step}
        adam_step(*actual, **options)
        p, m, v = oracle.adam_step(*arrays, **options)
        assert_all_same_bits(actual, [p, arrays[1], m, v], f"step {step}: [p, g, m, v]")


REFUSED: dict[str, list[Any]] = {
    "lr": [-LEAST, -1.0, np.inf, -np.inf, np.nan, 10**309],
    "beta_1": [-LEAST, 1.0, 1.0 + 2**-52, np.inf, np.nan],
    "beta_2": [-LEAST, 1.0, 1.0 + 2**-52, np.inf, np.nan],
    "epsilon": [-LEAST, np.inf, np.nan, 10**309],
    "decay": [-LEAST, np.inf, np.nan, 10**309],
    "weight_decay": [-LEAST, np.inf, np.nan, 10**309],
    "l2": [-LEAST, np.inf, np.nan, 10**309],
    "clipnorm": [np.inf, np.nan, 10**309],
    "clipnorm_per_tensor": [np.inf, np.nan, 10**309],
    "clipvalue": [np.inf, np.nan, 10**309],
    "ema_momentum": [-LEAST, 1.0 + 2**-52, np.inf, np.nan],
    "loss_scale": [0.0, np.nextafter(2.0**-127, 0), np.nextafter(2.0**127, np.inf), np.inf, np.nan],
    "gradient_accumulation_steps": [0, -1, -(2**63), 2**63],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in REFUSED.items() for v in vs])
def test_number_just_beyond_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*\. Received: {name}"):
        Adam(**{name: value})
    adam = Adam()
    before = adam.get_config()
    with pytest.raises(ValueError, match=rf"^{name} must .*\. Received: {name}"):
        setattr(adam, name, value)
    assert adam.get_config() == before
