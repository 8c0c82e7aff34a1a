# SPDX-License-Identifier: MIT
"""What is particular to storage in 16 bits or fewer: every word, other forms of state, refusals.

That steps in every format equal the oracle is tested in test_numerics.py.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import storage_oracle as storage
from configurations import FORMATS, format_name, shapes_for
from fusedadam import Adam, _core, adam_step
from helpers import Array, assert_all_same_bits, assert_same_bits, read_only, values
from oracle import OracleAdam
from training import Training

BFLOAT16 = storage.BFLOAT16
LARGE = [1e-44, 1e-30, 1e-12, 1e-3, 1.0, 1e4, 1e19, 3e38]


# -- numbers of every kind --------------------------------------------------------------------


def words(rng: np.random.Generator, dtype: Any) -> Array:
    """All 16-bit words in any order, as numbers of this dtype."""
    shuffled = rng.permutation(np.arange(65_536, dtype=np.uint16))
    return shuffled.astype(dtype) if dtype == "int8" else shuffled.view(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("low_bits", [None, "int8", "int16"])
def test_every_word_and_gradients_of_every_kind(
    rng: np.random.Generator, low_bits: str | None
) -> None:
    """All packed words, weights and low bits, with gradients from zero to NaN."""
    for g in [0.0, *LARGE, *(-x for x in LARGE), np.inf, -np.inf, np.nan]:
        param, packed = words(rng, BFLOAT16), words(rng, "int16")
        low = None if low_bits is None else words(rng, low_bits)
        oracle = OracleAdam([param], moments="packed", low_bits=low_bits)
        oracle.packed = [packed.copy()]
        oracle.low_bits = None if low is None else [low.copy()]
        grad = np.full(param.shape, g, np.float32)
        oracle.step([grad])
        adam_step(param, grad, step=1, packed=packed, low_bits=low)
        expected = [oracle.params[0], oracle.packed[0], *(oracle.low_bits or [])]
        ours = [param, packed] if low is None else [param, packed, low]
        assert_all_same_bits(ours, expected, f"[p, packed, low] with gradients of {g}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("vhat", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype("float16")], ids=str)
def test_every_moment_and_weight(
    rng: np.random.Generator, dtype: Any, rounding: Any, vhat: bool
) -> None:
    for g in (0.0, 1e-7, -3.0, 1e20, np.inf, np.nan):
        param, (m, v, largest) = words(rng, dtype), (words(rng, BFLOAT16) for _ in range(3))
        oracle = OracleAdam([param], moments="bfloat16", rounding=rounding, amsgrad=vhat)
        oracle.m, oracle.v = [m.copy()], [v.copy()]
        oracle.vhat = [largest.copy()] if vhat else []
        grad = np.full(param.shape, g, np.float32)
        oracle.step([grad])
        more: dict[str, Any] = {"vhat": largest} if vhat else {}
        adam_step(param, grad, m, v, step=1, rounding=rounding, **more)
        expected = [oracle.params[0], oracle.m[0], oracle.v[0], *oracle.vhat]
        assert_all_same_bits([param, m, v, *more.values()], expected, f"gradients of {g}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_every_half_gradient(half: str) -> None:
    # NumPy and a step only have to agree on which numbers are NaN, not on their payload.
    grad = np.arange(65_536).astype("uint16").view(half)
    p, oracle = np.zeros(65_536, "float32"), OracleAdam([np.zeros(65_536, "float32")])
    oracle.step([grad])
    adam = Adam()
    adam.apply_gradients([(grad, p)])
    assert_all_same_bits([p, *adam.weights], [*oracle.params, *oracle.weights()])


# -- the state in other forms -----------------------------------------------------------------


@pytest.mark.parametrize("formats", FORMATS, ids=format_name)
def test_weights_are_float32_and_set_what_they_were(formats: dict[str, Any]) -> None:
    training = Training(shapes_for(formats), **formats)
    training.step(3)
    adam = training.optimizer
    weights, live = adam.get_weights(), [w.copy() for w in adam.weights]
    assert {w.dtype for w in weights[1:]} == {np.dtype(np.float32)}
    adam.set_weights([np.zeros_like(w) for w in weights])
    adam.set_weights(weights)
    assert_all_same_bits(adam.weights, live)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "packed"])
@pytest.mark.parametrize("low_bits", ["int8", "int16"])
@pytest.mark.parametrize("value", [0.0, -0.0, np.inf, -np.inf])
def test_weights_set_from_outside_are_what_they_were_set_to(
    moments: str, low_bits: str, value: float
) -> None:
    decay = 0.1 if value == 0 else None  # of an infinity, it would be a NaN
    formats: dict[str, Any] = {"moments": moments, "low_bits": low_bits, "weight_decay": decay}
    training = Training([((1000,), "bfloat16")], **formats)
    training.step(3)
    adam, (param,) = training.optimizer, training.params
    low = adam._state.slots["low_bits"][0]
    # The other low bits make a zero a subnormal number, and an infinity the largest one.
    would_be_nan = low < 0 if value == 0 else low > 0
    assert would_be_nan.any()
    param[:] = training.reference.params[0][:] = value
    joined = adam.master_weights([param])[0]
    assert_same_bits(joined[would_be_nan], np.full(would_be_nan.sum(), value, np.float32))
    assert not np.isnan(joined).any()
    training.step()
    training.check()
    assert not np.isnan(adam.master_weights([param])[0]).any()


def test_master_weights_of_a_copy_whose_state_has_another_layout(rng: np.random.Generator) -> None:
    master = values(rng, (3, 5), "float32")
    param, adam = np.asfortranarray(master.astype(BFLOAT16)), Adam(low_bits="int16")
    adam.build([param])
    adam.set_master_weights([param], [master])
    twin = pickle.loads(pickle.dumps(adam))
    assert_same_bits(twin.master_weights([param])[0], master)
    other = np.asarray(master * np.float32(1.37))  # with other low bits
    twin.set_master_weights([param], [other])
    twin.step([param], [np.zeros_like(param)])
    assert_same_bits(twin.master_weights([param])[0], other)


# -- refusals ---------------------------------------------------------------------------------

THREE: dict[str, Any] = {
    **{name: np.zeros(3, name) for name in ("float32", "float64", "int8", "int16", "int32")},
    "bfloat16": np.zeros(3, BFLOAT16),
}


@pytest.mark.parametrize(
    ("settings", "dtype", "word"),
    [
        ({"moments": "packed", "amsgrad": True}, BFLOAT16, "amsgrad"),
        ({"moments": "packed", "rounding": "nearest"}, BFLOAT16, "stochastic"),
        ({"low_bits": "int8", "rounding": "nearest"}, BFLOAT16, "stochastic"),
        ({"moments": "packed"}, np.float64, r"params\[0\].*float64"),
        ({"moments": "bfloat16"}, np.float64, r"params\[0\].*float64"),
        ({"low_bits": "int8"}, np.float16, r"params\[0\].*bfloat16"),
    ],
    ids=str,
)
def test_combinations_are_refused(settings: dict[str, Any], dtype: Any, word: str) -> None:
    param = np.ones(3, dtype)
    with pytest.raises((TypeError, ValueError), match=rf"(?s){word}.*Received: "):
        Adam(**settings).step([param], [np.ones(3, np.float32)])
    np.testing.assert_array_equal(param.astype(np.float32), 1)


def test_roundings_may_change_once_the_state_exists() -> None:
    training = Training([((3,), "bfloat16")])
    training.step()
    for each in (training.optimizer, training.reference):
        each.seed, each.rounding = 3, "nearest"
    training.step()
    training.check()


@pytest.mark.parametrize(
    ("arrays", "error", "word"),
    [
        ({}, TypeError, "m and v, or as packed"),
        ({"m": "float64", "packed": "int16"}, TypeError, "m and v, or"),
        ({"packed": "int32"}, TypeError, "packed.0. must be int16"),
        (
            {"packed": "int16", "low_bits": "float32"},
            ValueError,
            "low_bits must be None, 'int8' or",
        ),
        ({"packed": "int16", "low_bits": [0, 0, 0]}, TypeError, "low_bits.0. must be"),
        ({"m": "bfloat16", "v": "float32"}, TypeError, "v.0. must be bfloat16"),
        ({"m": "float32", "v": "float32", "ema": "bfloat16"}, TypeError, "ema.0. must be float32"),
        (
            {"packed": "int16", "low_bits": read_only(THREE["int8"])},
            ValueError,
            "low_bits.0. must be writeable",
        ),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit(arrays: dict[str, Any], error: type[Exception], word: str) -> None:
    param = np.ones(3, BFLOAT16)
    given = {name: THREE[x].copy() if isinstance(x, str) else x for name, x in arrays.items()}
    with pytest.raises(error, match=rf"(?s){word}.*Received: "):
        adam_step(param, np.ones(3, np.float32), step=1, **given)
    np.testing.assert_array_equal(param.astype(np.float32), 1)


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        ("join_weights", (THREE["float32"], THREE["int8"]), "param"),
        ("join_weights", (THREE["bfloat16"], np.zeros(4, np.int8)), "low_bits"),
        ("split_weights", (THREE["float64"], THREE["bfloat16"], None), "values"),
        ("split_weights", (THREE["float32"], read_only(THREE["bfloat16"]), None), "param"),
        ("unpack_moments", (np.zeros(6, np.int16)[::2],), "packed"),
        ("unpack_moments", ([1, 2],), "packed"),
    ],
)
def test_conversions_refuse_what_does_not_fit(function: str, arguments: Any, name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{name} must .*Received: "):
        getattr(_core, function)(*arguments)


def test_master_weights_refuse_what_does_not_fit() -> None:
    params = [np.ones(3, BFLOAT16), np.ones(5, BFLOAT16)]
    adam = Adam(low_bits="int8")
    adam.build(params)
    with pytest.raises(ValueError, match=r"params must be as many as .* 2.*Received: "):
        adam.master_weights(params[:1])
    with pytest.raises(ValueError, match=r"values must be as many.*Received: "):
        adam.set_master_weights(params, params[:1])
    with pytest.raises(ValueError, match=r"values\[1\] must have the shape of params\[1\], \(5,\)"):
        adam.set_master_weights(params, [np.ones(3), np.ones(4)])
    assert all((p.astype(np.float32) == 1).all() for p in params)
