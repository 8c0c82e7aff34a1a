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
from configurations import EVERYTHING, OPTIONS
from extremes import (
    ALL,
    LARGEST,
    LEAST,
    NEARLY_1,
    check_call,
    column,
    compared,
    covering,
    few,
    product,
    special,
)
from fusedadam import Adam, global_norm
from helpers import FLOATS, Array, assert_all_same_bits

dtypes = pytest.mark.parametrize("dtype", FLOATS)
flushes = pytest.mark.parametrize("flush_denormals", [True, False])


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

# The option that adds an array to p, g, m and v. `accumulated` is the gradient of a previous call.
MORE = {"vhat": "amsgrad", "ema": "use_ema", "accumulated": "gradient_accumulation_steps"}
# Extreme values of options, beside those of every test. Norms have their own test below.
SPECIAL: list[dict[str, Any]] = [
    *(o for o in OPTIONS if not {"clipnorm", "clipnorm_per_tensor", "lr"} & o.keys()),
    {"lr": 0.0},
    {"loss_scale": "dynamic"},
    {"clipnorm": 1.0},
    {"clipvalue": 1e-44, "maximize": True},
    {"weight_decay": 0.5, "l2": 0.25, "maximize": True},
    {"amsgrad": True, "epsilon": 0.0},
    {"gradient_accumulation_steps": 2, "loss_scale": 2.0**127},
    {"gradient_accumulation_steps": 2, "loss_scale": "dynamic"},
]
# Of these, all combinations in five arrays; of the others, those in any four of the arrays.
WHOLE: list[dict[str, Any]] = [
    {"amsgrad": True},
    {"use_ema": True, "ema_momentum": 0.9},
    {"gradient_accumulation_steps": 2},
]
# All clip the value, since the norm of these gradients is NaN.
OF_SIX = {**EVERYTHING, "clipnorm_per_tensor": None, "clipvalue": 2.0, "loss_scale": 0.5}


@dtypes
@flushes
@pytest.mark.parametrize("options", [*SPECIAL, *WHOLE], ids=str)
def test_special_numbers(dtype: str, flush_denormals: bool, options: dict[str, Any]) -> None:
    numbers = special(dtype)
    arrays = product([numbers] * 4)
    names = [name for name, option in MORE.items() if options.get(option)]
    for shift in range(len(numbers) if names and (ALL or options in WHOLE) else 1):
        more: dict[str, Any] = {n: column(numbers, [1, 1, 1, 1], shift, 4) for n in names}
        more = {"flush_denormals": flush_denormals} | more | options
        check_call(*arrays, **more)


@dtypes
@flushes
@pytest.mark.parametrize("options", [{}, OF_SIX], ids=["plain", "everything"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_special_numbers_in_six_arrays(
    dtype: str, flush_denormals: bool, options: dict[str, Any], split: bool
) -> None:
    # The tail of a vector, in split tensors, is processed by another loop or by a masked vector.
    numbers = few(dtype) if split else special(dtype)
    factors = [1, 3, 7, 9] if split else [1, 2, 4, 7]
    shifts = range(len(numbers) if ALL and not split else 1)
    for i, j in itertools.product(shifts, repeat=2):
        more: dict[str, Any] = {
            "vhat": column(numbers, [1, 1, 1, 1], i, 4),
            "ema": column(numbers, factors, j, 4),
        }
        if options:
            more["accumulated"] = column(numbers, factors[::-1], i + j, 4)
        more |= options | {"flush_denormals": flush_denormals}
        check_call(*product([numbers] * 4), split=split, **more)


# -- norms ------------------------------------------------------------------------------------


def grads_of(dtype: str, kind: str) -> Array:
    """Gradients with a norm of this kind."""
    numbers, tiny = special(dtype), np.finfo(dtype).smallest_normal
    kinds = {
        "nothing": numbers[numbers == 0],
        "subnormal": numbers[np.abs(numbers) < tiny],
        "small": numbers[np.abs(numbers) <= tiny],
        "one": numbers[np.abs(numbers) <= 1],
        "largest": numbers[np.isfinite(numbers)],
        "infinite": numbers[~np.isnan(numbers)],
        "NaN": numbers,
    }
    return np.asarray(kinds[kind])


KINDS = ["nothing", "subnormal", "small", "one", "largest", "infinite", "NaN"]
CLIPS = [0.0, LEAST, 1e-300, 1e-46, 1e-38, 1.0, 1e38, 1e300, LARGEST]
SCALES: list[float | str | None] = [None, 2.0**-127, 3.0, 2.0**127, "dynamic"]


@dtypes
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
    np.testing.assert_equal(global_norm(grads), oracle.global_norm(grads))
    for clip, option in itertools.product(CLIPS, ("clipnorm", "clipnorm_per_tensor")):
        options: dict[str, Any] = {option: clip}
        clipped = Adam(**options).get_gradients(grads, grads)
        assert_all_same_bits(clipped, oracle.clip(grads, **options), str(options))


@dtypes
@pytest.mark.parametrize(
    "options", [{"skip_nonfinite": True}, {"loss_scale": "dynamic"}, {"clipnorm": 1.0}, {}], ids=str
)
def test_accumulated_gradients_that_overflow_or_cancel(dtype: str, options: dict[str, Any]) -> None:
    # Each gradient is finite but their sum is not, or the reverse. The sum is what counts.
    largest = np.finfo(dtype).max
    for numbers in ([largest, -largest, 1.0], [np.inf, 1.0, 0.0]):
        g = np.array(numbers, dtype)
        for other in (g, -g):
            more = {**options, "accumulated": other, "gradient_accumulation_steps": 2}
            check_call(g, g, g, np.abs(g), **more)


# -- hyper-parameters -------------------------------------------------------------------------

# In float32, 3.5e38 and more are infinite, and 1e-46 and less round to 0.
SMALL = [0.0, LEAST, 1e-46, 1e-45]
HUGE = [1.0, 1e38, 3.5e38, 1e300, LARGEST]
BETAS = [*SMALL, 2.0**-53, 0.5, 1 - 2.0**-24, 1 - 2.0**-25, NEARLY_1]
CHOICES: dict[str, Sequence[Any]] = {
    "lr": [*SMALL, *HUGE, 1e-3, -0.0],
    "beta_1": [0.9, *BETAS],
    "beta_2": [0.999, *BETAS],
    "epsilon": [1e-8, *SMALL, 1e-38, *HUGE],
    "decay": [0.0, LEAST, 1e-300, 2.0**-53, 1.0, 1e300, LARGEST],
    "weight_decay": [None, *SMALL, *HUGE],
    "l2": [*SMALL, *HUGE],
    "clipvalue": [None, *SMALL, *HUGE],
    "loss_scale": [None, 2.0**-127, 1e-37, 1.0, 3.0, 1e37, 1.5 * 2.0**126, 2.0**127],
    "ema_momentum": [0.99, 0.0, LEAST, 1e-46, 2.0**-53, NEARLY_1, 1.0],
    "iterations": [0, 1, 2, 1_000, 2**24, 2**31 - 1, 2**31, 2**32, 2**53 - 2, 2**53 - 1],
}


@dtypes
@flushes
@pytest.mark.parametrize("name", CHOICES)
def test_extreme_hyper_parameter(dtype: str, flush_denormals: bool, name: str) -> None:
    numbers = few(dtype)
    ema = column(numbers, [1, 1, 1, 1], 0, 4)
    for value in CHOICES[name]:
        options: dict[str, Any] = {"flush_denormals": flush_denormals, name: value}
        check_call(*product([numbers] * 4), ema=ema, **options)


@dtypes
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
