# SPDX-License-Identifier: MIT
"""What is stored in 16 bits or fewer, against the oracle: every format, option and kind of number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import fusedadam
import ml_dtypes
import numpy as np
import pytest
import storage_oracle as storage
from fusedadam import Adam, _core, adam_step
from helpers import Array, assert_all_same_bits, assert_same_bits, running
from oracle import OracleAdam

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bf16": BFLOAT16, "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}

# Every combination of formats that is not refused.
FORMATS = [
    pytest.param(dtype, moments, low_bits, rounding, id=f"{dtype}-{moments}-{low_bits}-{rounding}")
    for dtype, moments, low_bits, rounding in itertools.product(
        DTYPES,
        ("float32", "bfloat16", "packed"),
        (None, "int8", "int16"),
        ("stochastic", "nearest"),
    )
    if not (dtype != "bf16" and low_bits)
    and not (rounding == "nearest" and (moments == "packed" or low_bits == "int8"))
]

# Two partial groups of 64, several vectors and chunks, and one element.
SHAPES = [(1,), (37,), (3, 5, 7), (1300,)]


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Numbers of a model: magnitudes over some decades, and zeros."""
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 0, shape)
    return np.where(rng.random(shape) < 0.05, 0.0, x).astype(np.float32).astype(dtype)


def grads_of(rng: np.random.Generator, params: list[Array], dtype: Any = None) -> list[Array]:
    return [numbers(rng, p.shape, dtype or p.dtype) for p in params]


def assert_same_state(adam: Adam, oracle: OracleAdam, params: list[Array]) -> None:
    assert_all_same_bits(params, oracle.params, "params")
    slots = adam._state.slots
    for kind in ("m", "v", "vhat", "packed", "ema"):
        assert_all_same_bits(slots.get(kind, []), getattr(oracle, kind), kind)
    for i, low in enumerate(oracle.low_bits or ()):
        if low is not None:
            assert_same_bits(slots["low_bits"][i], low, f"low_bits[{i}]")


@pytest.fixture(params=fusedadam.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(isa=request.param):
        yield request.param


@pytest.mark.parametrize(("dtype", "moments", "low_bits", "rounding"), FORMATS)
def test_steps_equal_those_of_the_oracle(
    isa: str, dtype: str, moments: str, low_bits: str | None, rounding: str
) -> None:
    rng = np.random.default_rng(1)
    params = [numbers(rng, shape, DTYPES[dtype]) for shape in SHAPES]
    formats: Any = {"moments": moments, "low_bits": low_bits, "rounding": rounding, "seed": 7}
    adam, oracle = Adam(lr=0.01, **formats), OracleAdam(params, lr=0.01, **formats)
    for _ in range(4):
        grads = grads_of(rng, params)
        adam.step(params, grads)
        oracle.step(grads)
        assert_same_state(adam, oracle, params)


# Settings that add stages to a step.
OPTIONS: dict[str, dict[str, Any]] = {
    "weight decay": {"weight_decay": 0.1},
    "l2": {"l2": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.01},
    "loss scale": {"loss_scale": 1024.0},
    "average": {"use_ema": True, "ema_momentum": 0.9},
    "overwriting average": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "zeroing": {"zero_grad": True},
    "ascent": {"maximize": True},
    "subnormals kept": {"flush_denormals": False},
    "amsgrad": {"amsgrad": True},
    "epsilon 0": {"epsilon": 0.0},
    "all": {
        "weight_decay": 0.1,
        "l2": 0.1,
        "clipnorm": 0.5,
        "clipvalue": 0.01,
        "use_ema": True,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 2,
        "zero_grad": True,
        "bias_corrected_epsilon": True,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "packed"])
@pytest.mark.parametrize("low_bits", [None, "int8", "int16"])
def test_options_of_mixed_tensors_equal_those_of_the_oracle(
    option: str, moments: str, low_bits: str | None
) -> None:
    settings: Any = {**OPTIONS[option], "moments": moments, "low_bits": low_bits}
    if moments == "packed" and settings.get("amsgrad"):
        pytest.xfail("refused: test_combinations_are_refused")
    rng = np.random.default_rng(2)
    kinds = [BFLOAT16, np.float32] + ([] if low_bits else [np.float16])
    params = [numbers(rng, shape, kind) for shape in SHAPES for kind in kinds]
    oracle = OracleAdam(params, **settings)
    adam = Adam(**settings)
    for step in range(6):
        grads = grads_of(rng, params, [None, np.float32, BFLOAT16, np.float16][step % 4])
        left = oracle.step(grads)
        adam.step(params, grads)
        assert_same_state(adam, oracle, params)
        assert_all_same_bits(grads, left, "grads")
    if settings.get("use_ema"):
        before = [[a.copy() for a in arrays] for arrays in (params, adam.ema)]
        for _ in range(2):
            adam.swap_ema()
            oracle.swap_ema()
            assert_same_state(adam, oracle, params)
        assert_all_same_bits([*params, *adam.ema], list(itertools.chain(*before)), "swapped twice")
