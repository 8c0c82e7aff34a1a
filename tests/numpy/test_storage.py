# SPDX-License-Identifier: MIT
"""What is stored in 16 bits or fewer, against the oracle: every format, option and kind of number."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fusedadam
import ml_dtypes
import numpy as np
import pytest
import storage_oracle as storage
from fusedadam import Adam, _core, adam_step
from helpers import Array, assert_all_same_bits, assert_same_bits, read_only, running
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
@pytest.mark.usefixtures("isa")
def test_steps_equal_those_of_the_oracle(
    dtype: str, moments: str, low_bits: str | None, rounding: str
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


WITH_OPTIONS = [
    pytest.param(option, moments, low_bits, id=f"{option}-{moments}-{low_bits}")
    for option, moments, low_bits in itertools.product(
        OPTIONS, ("float32", "bfloat16", "packed", "auto"), (None, "int8", "int16")
    )
    if (option, moments) != ("amsgrad", "packed")
]


@pytest.mark.parametrize(("option", "moments", "low_bits"), WITH_OPTIONS)
def test_options_of_mixed_tensors_equal_those_of_the_oracle(
    option: str, moments: str, low_bits: str | None
) -> None:
    settings: Any = {**OPTIONS[option], "moments": moments, "low_bits": low_bits}
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


# ---- numbers of every kind


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("low_bits", [None, "int8", "int16"])
def test_every_word_and_gradients_of_every_kind(low_bits: str | None) -> None:
    """All packed words, weights and low bits, with gradients from zero to NaN."""
    words = np.arange(65_536, dtype=np.uint16)
    rng = np.random.default_rng(3)
    large = [1e-44, 1e-30, 1e-12, 1e-3, 1.0, 1e4, 1e19, 3e38]
    for g in [0.0, *large, *(-x for x in large), np.inf, -np.inf, np.nan]:
        params = words.view(BFLOAT16).copy()
        packed = rng.permutation(words).view(np.int16)
        low = None if low_bits is None else rng.permutation(words).astype(low_bits)
        oracle = OracleAdam([params], moments="packed", low_bits=low_bits)
        oracle.packed[0] = packed.copy()
        if low is not None:
            oracle.low_bits[0] = low.copy()
        grads = np.full(params.shape, g, np.float32)
        with np.errstate(all="ignore"):
            oracle.step([grads])
        adam_step(params, grads, step=1, packed=packed, low_bits=low)
        assert_same_bits(params, oracle.params[0], f"params with gradients of {g}")
        assert_same_bits(packed, oracle.packed[0], f"words with gradients of {g}")
        if low is not None:
            assert_same_bits(low, oracle.low_bits[0], f"low bits with gradients of {g}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("vhat", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_every_moment_and_weight(dtype: str, rounding: Any, vhat: bool) -> None:
    words = np.arange(65_536, dtype=np.uint16)
    rng = np.random.default_rng(4)
    for g in (0.0, 1e-7, -3.0, 1e20, np.inf, np.nan):
        params = words.view(DTYPES[dtype]).copy()
        m, v, largest = (rng.permutation(words).view(BFLOAT16) for _ in range(3))
        oracle = OracleAdam([params], moments="bfloat16", rounding=rounding, amsgrad=vhat)
        oracle.m[0], oracle.v[0] = m.copy(), v.copy()
        if vhat:
            oracle.vhat[0] = largest.copy()
        grads = np.full(params.shape, g, np.float32)
        with np.errstate(all="ignore"):
            oracle.step([grads])
        more = {"vhat": largest} if vhat else {}
        adam_step(params, grads, m, v, step=1, rounding=rounding, **more)
        expected = [oracle.params[0], oracle.m[0], oracle.v[0], *oracle.vhat]
        assert_all_same_bits([params, m, v, *more.values()], expected, f"gradients of {g}")


# ---- one result however a tensor is divided


def test_threads_and_alignment_change_no_bit() -> None:
    rng = np.random.default_rng(5)
    n = 100_003
    start = numbers(rng, (n,), BFLOAT16)
    grads = numbers(rng, (n,), BFLOAT16)
    results = []
    for threads, offset in itertools.product((1, 2, 7), (0, 1, 31)):
        with running(threads=threads):
            arrays = [np.zeros(n + 64, x.dtype)[offset : offset + n] for x in (start, grads)]
            arrays[0][:], arrays[1][:] = start, grads
            words = np.zeros(n + 64, np.int16)[offset : offset + n]
            low = np.zeros(n + 64, np.int8)[offset : offset + n]
            for step in (1, 2):
                adam_step(*arrays, step=step, packed=words, low_bits=low, seed=2)
            results.append([arrays[0], words, low])
    for result in results[1:]:
        assert_all_same_bits(result, results[0])


@pytest.mark.parametrize("lazy", [True, False])
def test_sparse_rows_equal_those_of_the_oracle(lazy: bool) -> None:
    rng = np.random.default_rng(6)
    table = numbers(rng, (50, 7), BFLOAT16)
    formats: Any = {"moments": "packed", "low_bits": "int8", "clipnorm": 0.1}
    oracle, adam = OracleAdam([table], **formats), Adam(**formats)
    for indices in ([3, 49, 3, 0], [1, 2, 3], []):
        rows = numbers(rng, (len(indices), 7), BFLOAT16)
        oracle.apply_sparse(np.array(indices, np.int64), rows, lazy=lazy)
        adam.apply_sparse(np.array(indices, np.int64), rows, table, lazy=lazy)
        assert_same_state(adam, oracle, [table])


def test_dither_depends_on_the_seed_and_the_step() -> None:
    grads = np.full(1000, 0.3, np.float32)
    results = []
    for seed, step in ((0, 1), (1, 1), (0, 2)):
        params, words = np.ones(1000, BFLOAT16), np.zeros(1000, np.int16)
        adam_step(params, grads, step=step, packed=words, seed=seed, lr=0.003)
        results.append(params.view(np.int16).tobytes())
    assert len(set(results)) == 3


def test_weights_move_at_small_rates_unless_rounded_to_nearest() -> None:
    """Movement of weights of 0.05 at a rate of 1e-6, in units of the exact movement."""
    moved = {}
    all_formats: list[dict[str, Any]] = [
        {},
        {"low_bits": "int8"},
        {"low_bits": "int16"},
        {"rounding": "nearest"},
    ]
    for formats in all_formats:
        params = np.full(10_000, 0.05, BFLOAT16)
        adam: Any = Adam(lr=1e-6, **formats)
        adam.build([params])
        start = float(params[0])
        for _ in range(100):
            adam.step([params], [np.ones(10_000, np.float32)])
        values = adam.master_weights([params])[0]
        moved[str(formats)] = (start - float(values.mean(dtype=np.float64))) / 1e-4
    nearest = moved.pop("{'rounding': 'nearest'}")
    assert nearest == 0
    assert all(0.9 < share < 1.1 for share in moved.values()), moved


# ---- the state in other forms


@pytest.fixture(params=[p.values for p in FORMATS], ids=[str(p.id) for p in FORMATS])
def trained(request: pytest.FixtureRequest) -> tuple[Adam, list[Array]]:
    dtype, moments, low_bits, rounding = request.param
    rng = np.random.default_rng(7)
    params = [numbers(rng, shape, DTYPES[dtype]) for shape in SHAPES]
    params.append(numbers(rng, (9,), np.float32))  # has no low bits
    adam: Any = Adam(moments=moments, low_bits=low_bits, rounding=rounding, seed=5, use_ema=True)
    for _ in range(3):
        adam.step(params, grads_of(rng, params))
    return adam, params


def test_continues_from_every_kind_of_copy(
    trained: tuple[Adam, list[Array]], tmp_path: Path
) -> None:
    adam, params = trained
    adam.save(tmp_path / "adam.safetensors")
    copies = [
        (pickle.loads(pickle.dumps(adam)), [p.copy() for p in params]),
        (copy.deepcopy(adam), [p.copy() for p in params]),
        (Adam.load(tmp_path / "adam.safetensors", params), [p.copy() for p in params]),
    ]
    grads = grads_of(np.random.default_rng(8), params)
    adam.step(params, grads)
    for other, own in copies:
        other.step(own, grads)
        assert_all_same_bits(own, params)
        assert other.get_config() == adam.get_config()
        for kind, arrays in adam._state.slots.items():
            for mine, theirs in zip(arrays, other._state.slots[kind], strict=True):
                if mine is not None:
                    assert_same_bits(theirs, mine, kind)


def test_weights_are_float32_and_set_what_they_were(trained: tuple[Adam, list[Array]]) -> None:
    adam, params = trained
    weights = adam.get_weights()
    assert {w.dtype for w in weights[1:]} == {np.dtype(np.float32)}
    live = [w.copy() for w in adam.weights]
    adam.set_weights([np.zeros_like(w) for w in weights])
    assert not any(np.asarray(w, np.float32).any() for w in adam.weights[1:])
    adam.set_weights(weights)
    assert_all_same_bits(adam.weights, live)
    plain = Adam()
    plain.build([p.astype(np.float32) for p in params])
    plain.set_weights(weights)
    assert_all_same_bits(plain.get_weights(), weights)


def test_master_weights_join_and_split(trained: tuple[Adam, list[Array]]) -> None:
    adam, params = trained
    values = adam.master_weights(params)
    assert {w.dtype for w in values} == {np.dtype(np.float32)}
    low = adam._state.slots.get("low_bits", [None] * len(params))
    expected = [storage.load_weight(p, part) for p, part in zip(params, low, strict=True)]
    assert_all_same_bits(values, expected)
    before = [p.copy() for p in params]
    adam.set_master_weights(params, [w * np.float32(1.37) for w in values])
    for value, p, part in zip(values, params, low, strict=True):
        named = None if part is None else part.dtype.name
        hi, rest = storage.store_weight(value * np.float32(1.37), p.dtype, named)
        assert_same_bits(p, hi)
        if rest is not None:
            assert_same_bits(part, rest)
    adam.set_master_weights(params, values)
    assert_all_same_bits(params, before)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "packed"])
@pytest.mark.parametrize("low_bits", ["int8", "int16"])
@pytest.mark.parametrize("value", [0.0, -0.0, np.inf, -np.inf])
def test_weights_set_from_outside_are_what_they_were_set_to(
    moments: Any, low_bits: Any, value: float
) -> None:
    rng = np.random.default_rng(3)
    param = rng.standard_normal(1000).astype(BFLOAT16)
    decay = 0.1 if value == 0 else None  # of an infinity, it would be a NaN
    adam = Adam(moments=moments, low_bits=low_bits, weight_decay=decay)
    for _ in range(3):
        adam.step([param], [rng.standard_normal(1000).astype(np.float32)])
    low = adam._state.slots["low_bits"][0]
    # The other low bits make a zero a subnormal number, and an infinity the largest one.
    would_be_nan = low < 0 if value == 0 else low > 0
    assert would_be_nan.any()
    param[:] = value
    joined = adam.master_weights([param])[0]
    assert_same_bits(joined[would_be_nan], np.full(would_be_nan.sum(), value, np.float32))
    assert not np.isnan(joined).any()
    adam.step([param], [np.ones(1000, np.float32)])
    assert not np.isnan(param.astype(np.float32)).any()
    assert not np.isnan(adam.master_weights([param])[0]).any()


def test_master_weights_of_a_copy_whose_state_has_another_layout() -> None:
    rng = np.random.default_rng(9)
    values = rng.standard_normal((3, 5)).astype(np.float32)
    param = np.asfortranarray(values.astype(BFLOAT16))
    adam = Adam(low_bits="int16")
    adam.build([param])
    adam.set_master_weights([param], [values])
    twin = pickle.loads(pickle.dumps(adam))
    assert_same_bits(twin.master_weights([param])[0], values)
    twin.set_master_weights([param], [2 * values])
    assert_same_bits(twin.master_weights([param])[0], 2 * values)
    twin.step([param], [np.zeros_like(param)])
    assert_same_bits(twin.master_weights([param])[0], 2 * values)


# ---- refusals


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "packed amsgrad": ({"moments": "packed", "amsgrad": True}, BFLOAT16, "amsgrad"),
    "packed nearest": ({"moments": "packed", "rounding": "nearest"}, BFLOAT16, "stochastic"),
    "int8 nearest": ({"low_bits": "int8", "rounding": "nearest"}, BFLOAT16, "stochastic"),
    "packed float64": ({"moments": "packed"}, np.float64, r"params\[0\].*float64"),
    "bfloat16 float64": ({"moments": "bfloat16"}, np.float64, r"params\[0\].*float64"),
    "low bits of float16": ({"low_bits": "int8"}, np.float16, r"params\[0\].*bfloat16"),
    "a name": ({"moments": "float8"}, BFLOAT16, "'float32', 'bfloat16', 'packed' or 'auto'"),
    "a number": ({"low_bits": 8}, BFLOAT16, "None, 'int8' or 'int16'"),
    "a negative seed": ({"seed": -1}, BFLOAT16, "seed must be >= 0"),
}


@pytest.mark.parametrize(("settings", "dtype", "word"), REFUSED.values(), ids=REFUSED)
def test_combinations_are_refused(settings: dict[str, Any], dtype: Any, word: str) -> None:
    params = [np.ones(3, dtype)]
    with pytest.raises((TypeError, ValueError), match=rf"(?s){word}.*Received: "):
        Adam(**settings).step(params, [np.ones(3, np.float32)])
    np.testing.assert_array_equal(params[0].astype(np.float32), 1)


def test_formats_must_not_change_once_the_state_exists() -> None:
    adam, params = Adam(), [np.ones(3, BFLOAT16)]
    adam.step(params, [np.ones(3, np.float32)])
    for name, value in (("moments", "packed"), ("low_bits", "int8")):
        with pytest.raises(ValueError, match=rf"{name} must not change.*Received: "):
            setattr(adam, name, value)
        with pytest.raises(ValueError, match=rf"{name} concerns the step as a whole"):
            adam.override(params, **{name: value})
    adam.seed, adam.rounding = 3, "nearest"
    adam.step(params, [np.ones(3, np.float32)])


ARRAYS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no moments": ({}, TypeError, "m and v, or as packed"),
    "both": ({"m": np.zeros(3), "packed": np.zeros(3, np.int16)}, TypeError, "m and v, or"),
    "words of another dtype": (
        {"packed": np.zeros(3, np.int32)},
        TypeError,
        "packed.0. must be int16",
    ),
    "low bits of another dtype": (
        {"packed": np.zeros(3, np.int16), "low_bits": np.zeros(3, np.float32)},
        ValueError,
        "low_bits must be None, 'int8' or 'int16'",
    ),
    "low bits that are no array": (
        {"packed": np.zeros(3, np.int16), "low_bits": [0, 0, 0]},
        TypeError,
        "low_bits.0. must be",
    ),
    "moments of two dtypes": (
        {"m": np.zeros(3, BFLOAT16), "v": np.zeros(3, np.float32)},
        TypeError,
        "v.0. must be bfloat16",
    ),
    "average in 16 bits": (
        {"m": np.zeros(3, np.float32), "v": np.zeros(3, np.float32), "ema": np.zeros(3, BFLOAT16)},
        TypeError,
        "ema.0. must be float32",
    ),
    "read-only low bits": (
        {"packed": np.zeros(3, np.int16), "low_bits": read_only(np.zeros(3, np.int8))},
        ValueError,
        "low_bits.0. must be writeable",
    ),
}


@pytest.mark.parametrize(("arrays", "error", "word"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_do_not_fit(arrays: dict[str, Any], error: type[Exception], word: str) -> None:
    params = np.ones(3, BFLOAT16)
    with pytest.raises(error, match=rf"(?s){word}.*Received: "):
        adam_step(params, np.ones(3, np.float32), step=1, **arrays)
    np.testing.assert_array_equal(params.astype(np.float32), 1)


CONVERSIONS: dict[str, tuple[Callable[[], object], str]] = {
    "join of floats": (
        lambda: _core.join_weights(np.ones(3, np.float32), np.zeros(3, np.int8)),
        "param",
    ),
    "other shape": (
        lambda: _core.join_weights(np.ones(3, BFLOAT16), np.zeros(4, np.int8)),
        "low_bits",
    ),
    "double": (lambda: _core.split_weights(np.ones(3), np.ones(3, BFLOAT16), None), "values"),
    "read-only": (
        lambda: _core.split_weights(np.ones(3, "f4"), read_only(np.ones(3, BFLOAT16)), None),
        "param",
    ),
    "gaps": (lambda: _core.unpack_moments(np.zeros(6, np.int16)[::2]), "packed"),
    "no words": (lambda: _core.unpack_moments([1, 2]), "packed"),
}


@pytest.mark.parametrize(("call", "name"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions_refuse_what_does_not_fit(call: Callable[[], object], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{name} must .*Received: "):
        call()


VALUES: dict[str, tuple[Callable[[Adam, list[Array]], object], str]] = {
    "fewer params": (lambda a, p: a.master_weights(p[:1]), "params must be as many as .* 2"),
    "fewer values": (lambda a, p: a.set_master_weights(p, p[:1]), "values must be as many"),
    "another shape": (
        lambda a, p: a.set_master_weights(p, [np.ones(3), np.ones(4)]),
        r"values\[1\] must have the shape of params\[1\], \(5,\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), VALUES.values(), ids=VALUES)
def test_master_weights_refuse_what_does_not_fit(
    call: Callable[[Adam, list[Array]], object], message: str
) -> None:
    params = [np.ones(3, BFLOAT16), np.ones(5, BFLOAT16)]
    adam = Adam(low_bits="int8")
    adam.build(params)
    with pytest.raises(ValueError, match=rf"{message}.*Received: "):
        call(adam, params)
    assert all((p.astype(np.float32) == 1).all() for p in params)
