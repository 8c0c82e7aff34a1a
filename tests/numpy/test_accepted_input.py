# SPDX-License-Identifier: MIT
"""Accepted input, compared with the oracle bit for bit: gradients of every layout and type."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import autograd
import autograd.numpy as anp
import fusedadam
import ml_dtypes
import numpy as np
import oracle
import pytest
from fresh_python import output_of
from fusedadam import Adam, adam_step
from helpers import (
    FLOATS,
    Array,
    assert_all_same_bits,
    assert_same_bits,
    misaligned,
    read_only,
    running,
    state,
    values,
)
from processor_state import MODES, needs_fenv, processor_restored

SHAPE = (12, 10)
# More than the 32,768 elements from which a step uses several threads.
LARGE = (190, 200)

Layout: TypeAlias = Callable[[Array], Array]


def strided(a: Array) -> Array:
    wide = np.full((2 * a.shape[0], 3 * a.shape[1]), np.nan, a.dtype)
    wide[1::2, ::3] = a
    return wide[1::2, ::3]


def misaligned_and_strided(a: Array) -> Array:
    records = np.zeros(a.shape, np.dtype([("tag", "i1"), ("g", a.dtype)]))  # packed, as in C files
    records["g"] = a
    packed: Array = records["g"]
    assert not packed.flags.aligned
    return packed


LAYOUTS: dict[str, Layout] = {
    "C order": np.copy,
    "Fortran order": np.asfortranarray,
    "strided": strided,
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "row reversed": lambda a: a[:, ::-1].copy()[:, ::-1],
    "misaligned": misaligned,
    "misaligned and strided": misaligned_and_strided,
    "read-only": read_only,
    "broadcast from a row": lambda a: np.broadcast_to(a[:1].copy(), a.shape),
    "broadcast from a column": lambda a: np.broadcast_to(a[:, :1].copy(), a.shape),
    "broadcast from a scalar": lambda a: np.broadcast_to(a[0, 0].copy(), a.shape),
}


def step_by_optimizer(
    p: Array, g: Array, m: Array, v: Array, **options: Any
) -> tuple[Array, Array, Array]:
    """Take one step, the fourth, with an optimizer that has these moments."""
    optimizer = Adam(**options)
    optimizer.build([p])
    optimizer.set_weights([np.array(3), m, v])
    optimizer.apply_gradients([(g, p)])
    return p, optimizer.weights[1], optimizer.weights[2]


def step_by_function(p: Array, g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
    adam_step(p, g, m, v, step=4)
    return p, m, v


Step: TypeAlias = Callable[[Array, Array, Array, Array], tuple[Array, Array, Array]]
STEPS: list[Step] = [step_by_optimizer, step_by_function]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_layout(
    rng: np.random.Generator, layout: Layout, dtype: str, shape: tuple[int, int], step: Step
) -> None:
    p, g, m, v = state(rng, shape, dtype)
    grad = layout(g)
    kept = grad.copy()
    expected = oracle.adam_step(p, kept, m, v, step=4)
    assert_all_same_bits(step(p, grad, m, v), expected)
    assert_same_bits(grad, kept, "the gradient")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_layout_does_not_change_what_is_clipped(
    rng: np.random.Generator, layout: Layout
) -> None:
    p, g, m, v = state(rng, SHAPE, "float32")
    grad = layout(g)
    kept = grad.copy()
    limits: dict[str, Any] = {"clipnorm": 1.5, "clipvalue": 0.25}
    clipped = oracle.clip([kept], **limits)
    actual = Adam(**limits).get_gradients([grad], [p])
    assert_all_same_bits(actual, clipped)
    expected = oracle.adam_step(p, clipped[0], m, v, step=4)
    assert_all_same_bits(step_by_optimizer(p, grad, m, v, **limits), expected)
    assert_same_bits(grad, kept, "the gradient")


@pytest.mark.parametrize("dtype", FLOATS)
def test_transposed_gradient_of_three_axes(rng: np.random.Generator, dtype: str) -> None:
    p, g, m, v = state(rng, (3, 5, 7), dtype)
    grad = g.transpose(2, 0, 1).copy().transpose(1, 2, 0)
    assert not grad.flags.c_contiguous
    expected = oracle.adam_step(p, g, m, v, step=4)
    assert_all_same_bits(step_by_optimizer(p, grad, m, v), expected)


# -- gradients in memory that the step writes -------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [100, 40_000])
@pytest.mark.parametrize("shift", [-1000, -17, -1, 0, 1, 17, 1000])
def test_gradient_that_overlaps_its_parameter(
    rng: np.random.Generator, shift: int, size: int, dtype: str, step: Step
) -> None:
    buffer = values(rng, 1000 + size + 1000, dtype)
    p = buffer[1000 : 1000 + size]
    g = buffer[1000 + shift : 1000 + shift + size]
    _, _, m, v = state(rng, size, dtype)
    around = buffer.copy()
    expected = oracle.adam_step(p.copy(), g.copy(), m, v, step=4)
    assert_all_same_bits(step(p, g, m, v), expected)
    around[1000 : 1000 + size] = expected[0]
    assert_same_bits(buffer, around, "the buffer around the parameter")


@pytest.mark.parametrize("which", ["m", "v"])
@pytest.mark.parametrize("size", [100, 40_000])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_adam_step_gradient_that_overlaps_a_moment(
    rng: np.random.Generator, which: str, size: int, shift: int
) -> None:
    buffer = np.abs(values(rng, size + 2, "float32"))
    moments: dict[str, Any] = {
        "m": values(rng, size, "float32"),
        "v": np.abs(values(rng, size, "float32")),
    }
    moments[which] = buffer[1:-1]
    p = values(rng, size, "float32")
    g = buffer[1 + shift : 1 + shift + size]
    expected = oracle.adam_step(p, g.copy(), moments["m"], moments["v"], step=4)
    adam_step(p, g, **moments, step=4)
    assert_all_same_bits([p, moments["m"], moments["v"]], expected)


@pytest.mark.parametrize("size", [100, 40_000])
@pytest.mark.parametrize("order", [[1, 0], [0, 1], [0, 0]], ids=str)
def test_gradients_that_are_parameters(
    rng: np.random.Generator, size: int, order: list[int]
) -> None:
    params = [values(rng, size, "float32") for _ in range(2)]
    reference = oracle.OracleAdam(params)
    optimizer = Adam()
    for _ in range(3):
        reference.step([params[i].copy() for i in order])
        optimizer.apply_gradients([(params[i], p) for i, p in zip(order, params, strict=True)])
        assert_all_same_bits(params, reference.params)
        params = [p.copy() for p in params]  # for bound parameters, and for new ones like them
    reference.step([params[i].copy() for i in order])
    optimizer.get_updates([params[i] for i in order], params)
    assert_all_same_bits(params, reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


@pytest.mark.parametrize("position", [1, 2, 3, 4], ids=["m[0]", "m[1]", "v[0]", "v[1]"])
def test_gradients_that_are_moments_of_the_optimizer(
    rng: np.random.Generator, position: int
) -> None:
    params = [values(rng, 100, "float32") for _ in range(2)]
    grads = [values(rng, 100, "float32") for _ in range(2)]
    reference = oracle.OracleAdam(params)
    reference.step(grads)
    optimizer = Adam()
    optimizer.get_updates(grads, params)
    moment = optimizer.weights[position]
    reference.step([moment.copy(), moment.copy()])
    optimizer.get_updates([moment, moment], params)
    assert_all_same_bits(params, reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


def test_one_gradient_for_two_parameters(rng: np.random.Generator) -> None:
    params = [values(rng, 100, "float32") for _ in range(2)]
    grad = values(rng, 100, "float32")
    reference = oracle.OracleAdam(params)
    reference.step([grad, grad])
    Adam().get_updates([grad, grad], params)
    assert_all_same_bits(params, reference.params)


def test_gradient_in_its_old_memory_for_new_parameters(rng: np.random.Generator) -> None:
    """A gradient that did not overlap the old parameters is checked again with new ones."""
    g = values(rng, 101, "float32")
    params = [values(rng, 100, "float32")]
    optimizer = Adam()
    reference = oracle.OracleAdam(params)
    for _ in range(2):
        reference.step([g[:-1].copy()])
        optimizer.apply_gradients([(g[:-1], params[0])])
    p = g[1:]
    reference.params = [p.copy()]
    reference.step([g[:-1].copy()])
    optimizer.apply_gradients([(g[:-1], p)])
    assert_same_bits(p, reference.params[0])
    assert_all_same_bits(optimizer.weights, reference.weights())


def test_zeroed_gradient_that_was_refused_is_looked_at_anew(rng: np.random.Generator) -> None:
    buffer = values(rng, 101, "float32")
    p, g = buffer[:-1], buffer[1:]
    optimizer = Adam(zero_grad=True)
    optimizer.build([p])
    with pytest.raises(ValueError, match=r"grads\[0\] must not overlap"):
        optimizer.apply_gradients([(g, p)])
    optimizer.zero_grad = False
    reference = oracle.OracleAdam([p.copy()])
    reference.step([g.copy()])
    optimizer.apply_gradients([(g, p)])
    assert_same_bits(p, reference.params[0])


# Raised by NumPy 2.5 and later.
@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")
def test_gradient_changed_in_place_between_steps(rng: np.random.Generator) -> None:
    p, g = values(rng, (4, 5), "float32"), values(rng, (4, 5), "float32")
    optimizer = Adam()
    optimizer.apply_gradients([(g, p)])
    before = p.copy()
    g.resize((5, 4), refcheck=False)
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape"):
        optimizer.apply_gradients([(g, p)])
    g.resize((4, 5), refcheck=False)
    g.dtype = np.dtype("S4")  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"grads\[0\] must be .* same_kind"):
        optimizer.apply_gradients([(g, p)])
    assert_same_bits(p, before)
    g.dtype = np.dtype("int32")  # type: ignore[misc]
    reference = oracle.OracleAdam([p], lr=0.5)
    reference.step([g.astype("float32")])
    fresh = Adam(lr=0.5)
    fresh.apply_gradients([(g, p)])
    assert_same_bits(p, reference.params[0])


# -- cast gradients ---------------------------------------------------------------------------

# All numeric dtypes that NumPy casts to float32 and float64 by the rule `same_kind`, with values
# that are rounded.
CASTS: dict[str, Callable[[Array], Any]] = {
    **{
        dtype: lambda g, dtype=dtype: g.astype(dtype)  # type: ignore[misc]
        for dtype in ("float16", "float32", "float64", "longdouble", ">f4", ">f8", ">f2", "bool")
    },
    **{
        dtype: lambda g, dtype=dtype: (g.astype("float64") * 2.0**20).astype(dtype)  # type: ignore[misc]
        for dtype in ("int8", "int32", "int64", ">i8")
    },
    **{
        dtype: lambda g, dtype=dtype: (np.abs(g.astype("float64")) * 2.0**20).astype(dtype)  # type: ignore[misc]
        for dtype in ("uint8", "uint64")
    },
    "odd integers beyond 2**53": lambda g: (g * 2**20).astype("int64") * 2 + 2**60 + 1,
    "float64 in Fortran order": lambda g: np.asfortranarray(g, "float64"),
    "bfloat16": lambda g: g.astype(ml_dtypes.bfloat16),
    "strided float16": lambda g: strided(g.astype("float16")),
    "lists": lambda g: g.tolist(),
    "lists of integers": lambda g: g.astype("int64").tolist(),
    "lists of arrays": lambda g: list(g.astype("float64")),
}
casts = pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)


@casts
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_another_dtype_is_cast(
    rng: np.random.Generator, dtype: str, cast: Callable[[Array], Any]
) -> None:
    p, g, m, v = state(rng, SHAPE, dtype)
    given = cast(g)
    kept = np.array(given)
    rounded = np.asarray(given).astype(dtype)
    expected = oracle.adam_step(p, rounded, m, v, step=4)
    for step in STEPS:
        arrays = p.copy(), given, m.copy(), v.copy()
        assert_all_same_bits(step(*arrays), expected, step.__name__)
    np.testing.assert_array_equal(np.array(given), kept)
    [returned] = Adam().get_gradients([given], [p])
    assert_same_bits(returned, rounded)
    [clipped] = Adam(clipnorm=0.5).get_gradients([given], [p])
    assert_same_bits(clipped, oracle.clip([rounded], clipnorm=0.5)[0])
    ours, theirs = p.copy(), p.copy()
    Adam().get_updates([given], [ours])
    Adam().apply_gradients([(rounded, theirs)])
    assert_same_bits(ours, theirs)


@casts
def test_gradients_of_another_dtype_at_every_step(
    rng: np.random.Generator, cast: Callable[[Array], Any]
) -> None:
    # Cached facts about one gradient do not apply to the next, which may lie at the same address.
    params = [values(rng, SHAPE, dtype) for dtype in FLOATS]
    reference, optimizer = oracle.OracleAdam(params, clipnorm=1.0), Adam(clipnorm=1.0)
    for call in range(6):
        grads: list[Any] = [values(rng, SHAPE, str(p.dtype)) for p in params]
        if call % 2:
            grads[call // 2 % 2] = cast(grads[call // 2 % 2])
        reference.step([np.asarray(g).astype(p.dtype) for g, p in zip(grads, params, strict=True)])
        optimizer.apply_gradients(list(zip(grads, params, strict=True)))
        assert_all_same_bits(params, reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


@pytest.mark.parametrize("shape", [(), (1,), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_small_gradients_are_cast(dtype: str, shape: tuple[int, ...]) -> None:
    for value in (0.1, 3, True, np.float64(0.1), np.float16(0.1), np.int32(-2)):
        p = np.ones(shape, dtype)
        given: Any = np.full(shape, value) if shape else value
        expected = oracle.OracleAdam([p])
        expected.step([np.full(shape, value, dtype)])
        Adam().apply_gradients([(given, p)])
        assert_same_bits(p, expected.params[0])


@needs_fenv
@pytest.mark.parametrize("modes", MODES, ids="+".join)
@pytest.mark.parametrize("kind", ["float64", "int64", "float16", "longdouble"])
def test_casts_round_to_nearest_whatever_the_caller_has_set(
    rng: np.random.Generator, kind: str, modes: tuple[str, ...]
) -> None:
    p, _, m, v = state(rng, SHAPE, "float32")
    wide = values(rng, SHAPE, "float64")
    wide[::3] *= 1e-41  # subnormal in float32
    given = (wide * 2.0**40 if kind == "int64" else wide).astype(kind)
    rounded = given.astype("float32")
    expected = oracle.adam_step(p, rounded, m, v, step=4)
    table = oracle.OracleAdam([p])
    table.apply_sparse(np.arange(len(p)), rounded)
    ours = [[a.copy() for a in (p, given, m, v)] for _ in STEPS]
    rows, adam = p.copy(), Adam()
    with processor_restored() as processor:
        processor.set(*modes)
        results = [step(*arrays) for step, arrays in zip(STEPS, ours, strict=True)]
        [returned] = Adam().get_gradients([given], [p])
        adam.apply_sparse(np.arange(len(p)), given, rows)
        processor.restore()
    for result in results:
        assert_all_same_bits(result, expected)
    assert_same_bits(returned, rounded)
    assert_same_bits(rows, table.params[0])


@pytest.mark.parametrize("order", ["C", "F"])
def test_zeroed_gradient_of_any_dense_layout(rng: np.random.Generator, order: Any) -> None:
    for parameter in (np.copy, np.asfortranarray):
        c, g, m, v = state(rng, SHAPE, "float32")
        p, grad = parameter(c), np.array(g, order=order)
        expected = oracle.adam_step(c, g, m, v, step=4)
        assert_all_same_bits(step_by_optimizer(p, grad, m, v, zero_grad=True), expected)
        assert_same_bits(grad, np.zeros(SHAPE, "float32"))
        grad[...] = g
        p[...] = c
        like = [parameter(a) for a in (m, v)]
        adam_step(p, grad, *like, step=4, zero_grad=True)
        assert_all_same_bits([p, *like], expected)
        assert_same_bits(grad, np.zeros(SHAPE, "float32"))


# -- parameters -------------------------------------------------------------------------------


class LaidOut:
    """Parameters with permuted dimensions in memory, and an oracle over that memory.

    Sums over elements (for norms) use memory order. Nothing else depends on the layout.
    """

    def __init__(self, axes: tuple[int, ...], dtype: str, size: int = 3, **options: Any) -> None:
        self.rng = np.random.default_rng(8)
        self.axes = axes
        self.inverse = tuple(np.argsort(axes))
        extents = tuple(size + 2 * i for i in range(len(axes)))
        self.memory = [values(self.rng, extents, dtype), values(self.rng, 5, "float64")]
        self.params = self.laid(self.memory)
        assert not self.params[0].flags.c_contiguous
        self.reference = oracle.OracleAdam(self.memory, **options)
        self.optimizer = Adam(**options)

    def laid(self, arrays: Sequence[Array]) -> list[Array]:
        return [arrays[0].transpose(self.axes), *arrays[1:]]

    def call(self) -> None:
        grads = [values(self.rng, a.shape, str(a.dtype)) for a in self.memory]
        given = self.laid([g.copy() for g in grads])
        if self.reference.iterations % 2:
            given[0] = np.ascontiguousarray(given[0])
        left = self.laid(self.reference.step(grads))
        count = self.optimizer.apply_gradients(list(zip(given, self.params, strict=True)))
        assert count == self.reference.iterations
        assert_all_same_bits(given, left, "grads after the call")
        self.check()

    def check(self) -> None:
        assert_all_same_bits(self.params, self.laid(self.reference.params), "params")
        state, kept = self.optimizer._state, self.optimizer.weights[1:] + self.optimizer.ema
        assert state.is_built
        slots = {kind: getattr(self.reference, kind) for kind in state.slots if kind[0] != "a"}
        for kind, arrays in slots.items():
            assert_all_same_bits(state.slots[kind], self.laid(arrays), kind)
        assert {a.strides for a in kept if a.ndim > 1} == {self.params[0].strides}


AXES = [(1, 0), (2, 0, 1), (0, 2, 1), (3, 1, 0, 2)]
LAID_OUT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 3, "weight_decay": 0.1},
    {"gradient_accumulation_steps": 2, "clipnorm": 0.5, "zero_grad": True, "amsgrad": True},
    {"clipnorm_per_tensor": 0.1, "clipvalue": 0.05, "loss_scale": "dynamic", "zero_grad": True},
]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("options", LAID_OUT_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_parameter_of_any_dense_layout(
    axes: tuple[int, ...], options: dict[str, Any], dtype: str
) -> None:
    training = LaidOut(axes, dtype, **options)
    for _ in range(6):
        training.call()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("options", LAID_OUT_OPTIONS, ids=str)
def test_large_parameter_in_fortran_order(options: dict[str, Any]) -> None:
    training = LaidOut((1, 0), "float32", 190, **options)
    for _ in range(4):
        training.call()


@pytest.mark.parametrize("keep", ["save", "pickle", "deepcopy", "weights", "in place"])
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("options", LAID_OUT_OPTIONS, ids=str)
def test_parameter_of_any_dense_layout_goes_on(
    path: Path, keep: str, axes: tuple[int, ...], options: dict[str, Any]
) -> None:
    training = LaidOut(axes, "float32", **options)
    accumulates = "gradient_accumulation_steps" in options
    for _ in range(4 if keep == "weights" else 3):
        training.call()
    optimizer = training.optimizer
    if keep == "save":
        optimizer.save(path)
        looked_at = [read_only(p) for p in training.params]
        training.optimizer = Adam.load(path, looked_at)
    elif keep == "in place":
        optimizer.save(path)
        assert optimizer.load(path, training.params) is optimizer
    elif keep == "pickle":
        training.optimizer = pickle.loads(pickle.dumps(optimizer))
    elif keep == "deepcopy":
        training.optimizer = copy.deepcopy(optimizer)
    elif accumulates or not options:  # averages and the loss scale are not weights
        training.optimizer = Adam(**options)
        training.optimizer.build(training.params)
        training.optimizer.set_weights(optimizer.get_weights())
    for _ in range(3):
        training.call()


def test_averages_of_a_parameter_in_fortran_order_are_swapped() -> None:
    training = LaidOut((1, 0), "float64", use_ema=True)
    for _ in range(3):
        training.call()
    training.optimizer.swap_ema()
    training.reference.swap_ema()
    training.check()
    training.optimizer.swap_ema()
    training.reference.swap_ema()
    training.call()


@pytest.mark.parametrize("options", LAID_OUT_OPTIONS[:2], ids=str)
def test_layout_may_change_between_steps(rng: np.random.Generator, options: dict[str, Any]) -> None:
    p = values(rng, (3, 4, 5), "float32")
    reference, optimizer = oracle.OracleAdam([p], **options), Adam(**options)
    for axes in [(0, 1, 2), (2, 1, 0), (2, 1, 0), (0, 2, 1), (0, 1, 2)]:
        memory = np.ascontiguousarray(p.transpose(axes))
        p = memory.transpose(np.argsort(axes))
        g = values(rng, p.shape, "float32")
        reference.step([g])
        optimizer.apply_gradients([(g, p)])
        assert_same_bits(p, reference.params[0])
        assert_all_same_bits(optimizer.weights, reference.weights())
        assert_all_same_bits(optimizer.ema, reference.ema)
        assert {w.strides for w in optimizer.weights[1:]} == {p.strides}


def test_refused_step_with_another_layout_changes_nothing(rng: np.random.Generator) -> None:
    p = values(rng, (4, 5), "float32")
    reference, optimizer = oracle.OracleAdam([p]), Adam()
    grads = [values(rng, (4, 5), "float32") for _ in range(3)]
    for g in grads:
        other = np.asfortranarray(p)
        kept = other.copy()
        with pytest.raises(ValueError, match="shape"):
            optimizer.apply_gradients([(g[:1], other)])
        assert_same_bits(other, kept)
        reference.step([g])
        optimizer.apply_gradients([(g, p)])
        assert_same_bits(p, reference.params[0])
        assert_all_same_bits(optimizer.weights, reference.weights())


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_adam_step_of_any_dense_layout(rng: np.random.Generator, axes: tuple[int, ...]) -> None:
    arrays = state(rng, tuple(range(2, 2 + len(axes))), "float64")
    memory = [np.abs(a) for a in (*arrays, arrays[3], arrays[0])]
    p, g, m, v, vhat, ema = (a.transpose(axes) for a in memory)
    reference = oracle.adam_step(*memory[:4], step=4)
    for grad in (g, np.ascontiguousarray(g)):
        ours = [np.copy(a, order="K") for a in (p, m, v)]
        adam_step(ours[0], grad, *ours[1:], step=4)
        assert_all_same_bits(ours, [a.transpose(axes) for a in reference])
    adam_step(p, g, m, v, step=4, vhat=vhat, ema=ema)
    assert_all_same_bits([m, v], [a.transpose(axes) for a in reference[1:3]])


@pytest.mark.parametrize("strides", [(8, 8), (80, 8), (-8, 0), (3, 5)], ids=str)
def test_strides_of_single_elements_mean_nothing(strides: tuple[int, int]) -> None:
    p = np.lib.stride_tricks.as_strided(np.ones(1), (1, 1), strides)
    assert Adam(lr=0.5).apply_gradients([(np.ones((1, 1)), p)]) == 1
    np.testing.assert_allclose(p, 0.5, rtol=1e-6)


def test_parameters_that_touch_but_do_not_overlap(rng: np.random.Generator) -> None:
    buffer = values(rng, 300, "float32")
    params = [buffer[200:], buffer[:100], buffer[100:200].reshape(10, 10), buffer[50:50]]
    grads = [values(rng, p.shape, "float32") for p in params]
    reference = oracle.OracleAdam(params)
    reference.step(grads)
    Adam().get_updates(grads, params)
    assert_all_same_bits(params, reference.params)


def test_empty_arrays_never_overlap() -> None:
    # Empty arrays may overlap anything, even the middle of an array that is written.
    buffer = np.ones(8)
    params = [buffer[4:4], buffer, buffer[4:4], np.empty(0)]
    Adam().get_updates([np.ones(p.shape) for p in params], params)
    assert np.all(buffer < 1)
    m = [np.zeros(p.shape) for p in params]
    adam_step(params, [np.ones(p.shape) for p in params], m, [*m[:1], np.zeros(8), *m[2:]], step=1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (1, 1, 1), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("clipnorm", [None, 0.5])
def test_shape(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, clipnorm: float | None
) -> None:
    p, g, m, v = state(rng, shape, dtype)
    reference = oracle.OracleAdam([p], clipnorm=clipnorm)
    optimizer = Adam(clipnorm=clipnorm)
    for count in (1, 2):
        reference.step([g])
        assert optimizer.apply_gradients([(g, p)]) == count
    assert_all_same_bits([p], reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())
    expected = oracle.adam_step(p, g, m, v, step=4)
    assert_all_same_bits(step_by_function(p, g, m, v), expected)


def test_empty_arrays_among_others(rng: np.random.Generator) -> None:
    shapes = [(0,), (3,), (0, 7), (), (2, 0)]
    params = [values(rng, shape, "float64") for shape in shapes]
    grads = [values(rng, shape, "float64") for shape in shapes]
    reference = oracle.OracleAdam(params, clipnorm=0.1)
    reference.step(grads)
    Adam(clipnorm=0.1).get_updates(grads, params)
    assert_all_same_bits(params, reference.params)


class Tagged(np.ndarray[Any, np.dtype[Any]]):
    """A subclass that a step must preserve and not replace by its base class."""

    tag = "mine"


@pytest.mark.parametrize("step", STEPS)
def test_subclasses(rng: np.random.Generator, step: Step) -> None:
    p, g, m, v = state(rng, SHAPE, "float32")
    expected = oracle.adam_step(p, g, m, v, step=4)
    tagged = [a.view(Tagged) for a in (p, g, m, v)]
    step(tagged[0], tagged[1], tagged[2], tagged[3])
    assert_same_bits(p, expected[0])


def test_subclasses_come_back_from_get_updates(rng: np.random.Generator) -> None:
    p = values(rng, SHAPE, "float32").view(Tagged)
    updates = Adam().get_updates([np.ones_like(p)], [p])
    assert updates[3] is p


@pytest.mark.parametrize("dtype", FLOATS)
def test_memory_mapped_parameter(rng: np.random.Generator, tmp_path: Path, dtype: str) -> None:
    p, g, _, _ = state(rng, SHAPE, dtype)
    file = np.lib.format.open_memmap(tmp_path / "p.npy", mode="w+", dtype=p.dtype, shape=SHAPE)
    file[...] = p
    np.save(tmp_path / "g.npy", g)
    grad = np.load(tmp_path / "g.npy", mmap_mode="r")
    reference = oracle.OracleAdam([p])
    reference.step([g])
    Adam().get_updates([grad], [file])
    file.flush()
    assert_same_bits(np.load(tmp_path / "p.npy"), reference.params[0])
    assert_same_bits(np.load(tmp_path / "g.npy"), g)


def test_other_arrays_of_the_same_shapes_take_their_turn(rng: np.random.Generator) -> None:
    # Moments belong to the position in the list, not to the array.
    shapes = [(3,), (2, 2)]
    ours, others = ([values(rng, shape, "float64") for shape in shapes] for _ in range(2))
    optimizer, reference = Adam(), oracle.OracleAdam(ours)
    for params in [ours, others, others, ours, [ours[0], others[1]]]:
        grads = [values(rng, shape, "float64") for shape in shapes]
        reference.params = [p.copy() for p in params]
        reference.step(grads)
        optimizer.get_updates(grads, params)
        assert_all_same_bits(params, reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


def test_new_arrays_at_every_step(rng: np.random.Generator) -> None:
    # A new array may get the address of a freed one, or another address.
    p = values(rng, 1000, "float32")
    optimizer, reference = Adam(), oracle.OracleAdam([p])
    for _ in range(20):
        p = p.copy()
        g = values(rng, 1000, "float32")
        reference.step([g])
        optimizer.get_updates([g], [p])
    assert_all_same_bits([p], reference.params)


# -- ways to pass gradients -------------------------------------------------------------------


def test_parameters_in_another_layout_that_are_refused(rng: np.random.Generator) -> None:
    p, g = (values(rng, SHAPE, "float32") for _ in range(2))
    adam = Adam(use_ema=True)
    adam.apply_gradients([(g, p)])
    live, kept = adam.weights, p.copy()
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape"):
        adam.apply_gradients([(g[1:], np.asfortranarray(p))])
    assert all(map(np.shares_memory, adam.weights[1:], live[1:]))
    adam.swap_ema()
    adam.swap_ema()
    assert_same_bits(p, kept)


def test_state_in_another_layout_is_saved(rng: np.random.Generator, tmp_path: Path) -> None:
    dense = values(rng, (3, 4, 5), "float64").transpose(1, 2, 0)
    adam, path = Adam(use_ema=True), tmp_path / "adam"
    adam.apply_gradients([(values(rng, (4, 5, 3), "float64"), dense)])
    adam.save(path)
    for like in (dense, dense.copy()):
        loaded = Adam.load(path, [like])
        assert_all_same_bits([*loaded.weights, *loaded.ema], [*adam.weights, *adam.ema])


class ArrayLike:
    """Another library's array with the `__array__` protocol of NumPy 1."""

    def __init__(self, a: Array) -> None:
        self._a = a

    def __array__(self, dtype: Any = None) -> Array:
        return self._a if dtype is None else self._a.astype(dtype)


class NewArrayLike(ArrayLike):
    """The same with NumPy 2's protocol. Like jax's arrays, its memory is read-only."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        a = super().__array__(dtype)
        a = a.copy() if copy else a
        a.flags.writeable = False
        return a


class BufferLike:
    """An object that only has `__array_interface__`."""

    def __init__(self, a: Array) -> None:
        self._a = a
        self.__array_interface__ = a.__array_interface__


@pytest.mark.parametrize("kind", [ArrayLike, NewArrayLike, BufferLike])
@pytest.mark.parametrize("method", ["get_updates", "apply_gradients", "adam_step"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_another_library(
    rng: np.random.Generator, kind: Any, method: str, dtype: str
) -> None:
    params = [values(rng, shape, dtype) for shape in [(2, 3), (5,), ()]]
    grads = [values(rng, p.shape, dtype) for p in params]
    reference = oracle.OracleAdam(params)
    reference.step(grads)
    likes: Any = [kind(g.copy()) for g in grads]
    if method == "get_updates":
        Adam().get_updates(likes, params)
    elif method == "apply_gradients":
        Adam().apply_gradients(list(zip(likes, params, strict=True)))
    else:
        m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
        adam_step(params, likes, m, v, step=1)
    assert_all_same_bits(params, reference.params)


@pytest.mark.parametrize("scalar", [np.float32(0.5), np.float64(0.5)], ids=["float32", "float64"])
@pytest.mark.parametrize("method", ["get_updates", "apply_gradients", "adam_step"])
def test_numpy_scalar_as_the_gradient_of_a_0d_parameter(scalar: Any, method: str) -> None:
    p = np.array(1, scalar.dtype)
    expected = oracle.adam_step(p, np.asarray(scalar), p * 0, p * 0, step=1)
    if method == "get_updates":
        Adam().get_updates([scalar], [p])
    elif method == "apply_gradients":
        Adam().apply_gradients([(scalar, p)])
    else:
        adam_step(p, scalar, np.zeros_like(p), np.zeros_like(p), step=1)
    assert_same_bits(p, expected[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grads", [[0.1, [0.3, -0.5]], [1, (2, -3)], [True, [0.1, 1]]], ids=str)
def test_plain_numbers_as_gradients(grads: Any, dtype: str) -> None:
    params = [np.array(1, dtype), np.array([1, 2], dtype)]
    reference = oracle.OracleAdam(params)
    reference.step([np.array(g, dtype) for g in grads])
    Adam().get_updates(grads, params)
    assert_all_same_bits(params, reference.params)


PAIRS: dict[str, Callable[[list[Array], list[Array]], Any]] = {
    "list of tuples": lambda g, p: list(zip(g, p, strict=True)),
    "list of lists": lambda g, p: [[a, b] for a, b in zip(g, p, strict=True)],
    "tuple": lambda g, p: tuple(zip(g, p, strict=True)),
    "zip": lambda g, p: zip(g, p, strict=True),
    "generator": lambda g, p: (pair for pair in zip(g, p, strict=True)),
    "iterator": lambda g, p: iter(list(zip(g, p, strict=True))),
    "dict values": lambda g, p: dict(enumerate(zip(g, p, strict=True))).values(),
}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_grads_and_vars_container(
    rng: np.random.Generator, make: Callable[[list[Array], list[Array]], Any]
) -> None:
    params = [values(rng, shape, "float32") for shape in [(2, 3), (5,), ()]]
    reference = oracle.OracleAdam(params)
    optimizer = Adam()
    for count in (1, 2):  # the first call is checked in full, the second compared with the first
        grads = [values(rng, p.shape, "float32") for p in params]
        reference.step(grads)
        assert optimizer.apply_gradients(make(grads, params)) == count
    assert_all_same_bits(params, reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


@pytest.mark.parametrize("of_params", [list, tuple])
@pytest.mark.parametrize("of_grads", [list, tuple])
def test_sequence_types(rng: np.random.Generator, of_params: Any, of_grads: Any) -> None:
    arrays = [state(rng, shape, "float32") for shape in [(2, 3), (5,)]]
    p, g, m, v = ([a[i] for a in arrays] for i in range(4))
    reference = oracle.OracleAdam(p)
    reference.step(g)
    params = of_params([a.copy() for a in p])
    optimizer = Adam()
    optimizer.get_updates(of_grads(g), params)
    assert_all_same_bits(params, reference.params)
    assert_all_same_bits(optimizer.get_gradients(of_grads(g), params), g)
    expected = [oracle.adam_step(*a, step=4) for a in arrays]
    adam_step(of_params(p), of_grads(g), of_grads(m), of_params(v), step=4)
    assert_all_same_bits(p, [e[0] for e in expected])
    assert_all_same_bits(m, [e[1] for e in expected])
    assert_all_same_bits(v, [e[2] for e in expected])


def test_adam_step_of_mixed_dtypes(rng: np.random.Generator) -> None:
    arrays = [state(rng, (7, 3), dtype) for dtype in [*FLOATS, *FLOATS]]
    expected = [oracle.adam_step(*a, step=4, lr=0.1, epsilon=0.0) for a in arrays]
    p, g, m, v = ([a[i] for a in arrays] for i in range(4))
    assert adam_step(p, g, m, v, step=4, lr=0.1, epsilon=0.0) is None
    for i, e in enumerate(expected):
        assert_all_same_bits([p[i], m[i], v[i]], e)


@pytest.mark.parametrize("limits", [{"clipnorm": 0.01}, {"clipvalue": 0.01}, {}], ids=str)
def test_gradients_are_never_changed(rng: np.random.Generator, limits: dict[str, Any]) -> None:
    params = [values(rng, shape, "float32") for shape in [(40, 30), (5,)]]
    grads = [values(rng, p.shape, "float32") for p in params]
    kept = [g.copy() for g in grads]
    optimizer = Adam(**limits)
    returned = optimizer.get_gradients(grads, params)
    optimizer.get_updates(grads, params)
    optimizer.apply_gradients(list(zip(grads, params, strict=True)))
    assert_all_same_bits(grads, kept)
    if limits:
        for mine in returned:
            mine[...] = 0  # clipped gradients belong to the caller
        assert_all_same_bits(grads, kept)


# -- hyper-parameters that are numbers --------------------------------------------------------


class Rate(float, enum.Enum):
    QUARTER = 0.25


class Steps(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("lr", np.float32(0.25), 0.25),
        ("lr", np.float64(0.25), 0.25),
        ("lr", 1, 1.0),
        ("lr", np.int32(1), 1.0),
        ("lr", 0, 0.0),
        ("epsilon", 0, 0.0),
        ("epsilon", 0.0, 0.0),
        ("decay", 1, 1.0),
        ("decay", np.float64(0), 0.0),
        ("beta_1", np.float32(0.75), 0.75),
        ("beta_2", np.float64(0.75), 0.75),
        ("lr", np.array(0.25), 0.25),
        ("lr", np.array(0.25, ">f4"), 0.25),
        ("lr", np.float16(0.25), 0.25),
        ("lr", np.longdouble(0.25), 0.25),
        ("lr", Fraction(1, 4), 0.25),
        ("lr", Decimal("0.25"), 0.25),
        ("lr", Rate.QUARTER, 0.25),
        ("decay", Steps.TWO, 2.0),
        ("decay", np.array(2), 2.0),
        ("beta_1", 0, 0.0),
        ("beta_1", np.float32(0), 0.0),
        ("beta_2", 0.0, 0.0),
        ("beta_1", np.nextafter(0, 1), 5e-324),
        ("beta_2", np.nextafter(1, 0), 1 - 2**-53),
        ("clipnorm", np.float32(0.5), 0.5),
        ("clipvalue", 1, 1.0),
    ],
)
def test_kinds_of_numbers(name: str, value: Any, plain: float) -> None:
    made, changed = Adam(**{name: value}), Adam()
    setattr(changed, name, value)
    for optimizer in (made, changed):
        assert getattr(optimizer, name) == plain
        assert optimizer.get_config()[name] == plain
        # JSON takes Python's numbers but not NumPy's.
        assert json.loads(json.dumps(optimizer.get_config())) == optimizer.get_config()
        p = np.arange(1.0, 4.0)
        options: dict[str, Any] = {name: plain}
        reference = oracle.OracleAdam([p], **options)
        for _ in range(3):
            reference.step([np.array([1.0, -2.0, 0.5])])
            optimizer.get_updates([np.array([1.0, -2.0, 0.5])], [p])
        assert_all_same_bits([p], reference.params)


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("gradient_accumulation_steps", np.int64(2), 2),
        ("gradient_accumulation_steps", np.array(2), 2),
        ("gradient_accumulation_steps", Steps.TWO, 2),
        ("ema_overwrite_frequency", np.uint8(2), 2),
        ("loss_scale", np.array(8), 8.0),
        ("loss_scale", np.array(2.0**127, "float32"), 2.0**127),
        *((name, np.True_, True) for name in ("amsgrad", "zero_grad", "bias_corrected_epsilon")),
        *((name, np.array(True), True) for name in ("use_ema", "maximize", "skip_nonfinite")),
        ("flush_denormals", np.False_, False),
    ],
)
def test_kinds_of_counts_and_switches(name: str, value: Any, plain: float) -> None:
    needed: dict[str, Any] = {"use_ema": True} if name == "ema_overwrite_frequency" else {}
    made, changed = Adam(**{name: value}, **needed), Adam(**needed)
    setattr(changed, name, value)
    for optimizer in (made, changed):
        assert getattr(optimizer, name) == plain
        assert type(getattr(optimizer, name)) is type(plain)
        assert json.loads(json.dumps(optimizer.get_config()))[name] == plain


def test_tensors_as_settings() -> None:
    torch: Any = pytest.importorskip("torch", reason="what is said of tensors needs torch")
    adam = Adam(
        lr=torch.tensor(0.25),
        epsilon=torch.tensor(0.5, dtype=torch.bfloat16),
        l2=torch.tensor([2.0]),
        amsgrad=torch.tensor(True),
        gradient_accumulation_steps=torch.tensor(2),
    )
    settings = (adam.lr, adam.epsilon, adam.l2, adam.amsgrad, adam.gradient_accumulation_steps)
    assert settings == (0.25, 0.5, 2.0, True, 2)
    for name, bad in [
        ("lr", torch.tensor(True)),
        ("lr", torch.tensor([0.5, 0.5])),
        ("lr", torch.tensor(0.5j)),
        ("gradient_accumulation_steps", torch.tensor(True)),
        ("gradient_accumulation_steps", torch.tensor(2.0)),
        ("maximize", torch.tensor(1)),
        ("maximize", torch.tensor([True, False])),
    ]:
        with pytest.raises(TypeError, match=f"^{name} must be "):
            setattr(adam, name, bad)


@pytest.mark.parametrize("off", [None, 0, 0.0])
@pytest.mark.parametrize("name", ["clipnorm", "clipvalue"])
def test_clip_that_is_off(name: str, off: float | None) -> None:
    limit: dict[str, Any] = {name: 0.01}
    optimizer = Adam(**limit)
    setattr(optimizer, name, off)
    for unclipped in (optimizer, Adam(**{name: off})):  # type: ignore[arg-type]
        p, g = np.ones(3), np.full(3, 1e6)
        assert_same_bits(unclipped.get_gradients([g], [p])[0], g)
        unclipped.get_updates([g], [p])
        assert_same_bits(unclipped.weights[1], np.full(3, (1 - 0.9) * 1e6))


@pytest.mark.parametrize(
    "step", [np.int64(4), np.uint8(4), np.array(4), 4], ids=lambda s: type(s).__name__
)
def test_step_counts_that_are_ints(rng: np.random.Generator, step: Any) -> None:
    p, g, m, v = state(rng, SHAPE, "float64")
    expected = oracle.adam_step(p, g, m, v, step=4)
    adam_step(p, g, m, v, step=step)
    assert_all_same_bits([p, m, v], expected)


@pytest.mark.parametrize(
    ("asked", "got"), [(np.int64(1), 1), (np.uint8(3), 3), (4096, 4096)], ids=str
)
def test_thread_counts_that_are_ints(asked: Any, got: int) -> None:
    with running():
        fusedadam.set_num_threads(asked)
        assert fusedadam.get_num_threads() == got


def test_empty_instruction_set_variable_counts_as_unset() -> None:
    best = output_of(
        "import fusedadam; print(fusedadam.active_isa())", environment={"FUSEDADAM_ISA": ""}
    )
    assert best == fusedadam.supported_isas()[0]


# -- losses for autograd ----------------------------------------------------------------------

INPUTS = np.linspace(-1, 1, 20).reshape(4, 5)
TARGETS = np.linspace(0, 1, 12).reshape(4, 3)


def two_layer_loss(params: Any) -> Any:
    weight, bias, scale = params
    predicted = scale * anp.tanh(anp.dot(INPUTS, weight) + bias)
    return anp.mean((predicted - TARGETS) ** 2)


def two_layer_params(dtype: str) -> list[Array]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(s).astype(dtype) for s in [(5, 3), (3,), ()]]


def plain_autograd(loss: Callable[[Any], Any], params: Sequence[Array]) -> list[Array]:
    gradients: list[Array] = autograd.grad(loss)([np.array(p) for p in params])
    return gradients


# The data of the loss are float64. A float32 parameter still gets a float32 gradient: the user
# chose the parameter's dtype, but not that of the gradient.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("container", [list, tuple])
def test_autograd_loss(dtype: str, container: Any) -> None:
    params = container(two_layer_params(dtype))
    reference = oracle.OracleAdam(params, lr=0.05)
    optimizer = Adam(lr=0.05)
    first = two_layer_loss(params)
    for _ in range(20):
        grads = plain_autograd(two_layer_loss, reference.params)
        assert {g.dtype for g in grads} == {np.dtype(dtype)}
        assert_all_same_bits(optimizer.get_gradients(two_layer_loss, params), grads)
        reference.step(grads)
        updates = optimizer.get_updates(two_layer_loss, params)
        assert [u is p for u, p in zip(updates[3::3], params, strict=True)] == [True] * 3
    assert_all_same_bits(params, reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())
    assert two_layer_loss(params) < 0.5 * first


def test_autograd_loss_of_mixed_dtypes() -> None:
    params = [
        p.astype(t) for p, t in zip(two_layer_params("float64"), [*FLOATS, "float32"], strict=True)
    ]
    reference = oracle.OracleAdam(params, clipnorm=0.05)
    reference.step(plain_autograd(two_layer_loss, params))
    Adam(clipnorm=0.05).get_updates(two_layer_loss, params)
    assert_all_same_bits(params, reference.params)


FLOAT64_LOSSES: dict[str, Callable[[Any], Any]] = {
    "times float64 data": lambda p: anp.sum(p[0] * np.ones((2, 3))),
    "plus float64 data": lambda p: anp.sum((p[0] + np.ones((2, 3))) ** 2),
    "float64 scalar": lambda p: np.float64(0.5) * anp.sum(p[0] ** 2),
    "matrix product": lambda p: anp.sum(anp.tanh(np.ones((4, 2)) @ p[0])),
    "elements": lambda p: p[0][0, 1] * np.float64(2) + anp.sum(p[0][1]),
    "einsum": lambda p: anp.sum(anp.einsum("ij,jk->ik", np.ones((4, 2)), p[0]) ** 2),
    "joined": lambda p: anp.sum(anp.concatenate([p[0], np.ones((1, 3))]) ** 2),
}


@pytest.mark.parametrize("loss", FLOAT64_LOSSES.values(), ids=FLOAT64_LOSSES)
def test_autograd_loss_in_float64_of_a_float32_parameter(loss: Callable[[Any], Any]) -> None:
    p = np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)
    reference = oracle.OracleAdam([p])
    reference.step([g.astype("float32") for g in plain_autograd(loss, [p])])
    Adam().get_updates(loss, [p])
    assert_same_bits(p, reference.params[0])


def test_autograd_gradient_against_one_found_by_hand() -> None:
    # d/dw sum(w**2 / 2) = w, d/db exp(sum(b)) = exp(sum(b))
    w, b = np.linspace(-2, 2, 6).reshape(2, 3), np.array([0.25, -0.5])
    grads = Adam().get_gradients(lambda p: anp.sum(p[0] ** 2 / 2) + anp.exp(anp.sum(p[1])), [w, b])
    assert_same_bits(grads[0], w)
    np.testing.assert_allclose(grads[1], np.exp(-0.25), rtol=1e-15)


def test_autograd_loss_that_leaves_a_parameter_out() -> None:
    # autograd's gradient of the unused parameter is zero. Its moments decay, so it still moves.
    used, unused = np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0], dtype="float32")
    optimizer = Adam()
    optimizer.get_updates([np.ones(2), np.ones(3, "float32")], [used, unused])
    reference = oracle.OracleAdam([used, unused])
    reference.m, reference.v = ([w.copy() for w in optimizer.weights[i : i + 2]] for i in (1, 3))
    reference.set_count(1)
    reference.step([2 * used, np.zeros(3, "float32")])
    optimizer.get_updates(lambda p: anp.sum(p[0] ** 2), [used, unused])
    assert_all_same_bits([used, unused], reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


class Bounded(np.ndarray[Any, np.dtype[Any]]):
    @staticmethod
    def constraint(p: Array) -> Array:
        return np.clip(p, -0.5, 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_autograd_loss_of_subclasses(dtype: str) -> None:
    # autograd itself does not support subclasses of ndarray, which constrained parameters are.
    params = [two_layer_params(dtype)[0].view(Bounded), *two_layer_params(dtype)[1:]]
    reference = oracle.OracleAdam(params)
    reference.step(plain_autograd(two_layer_loss, params))
    Adam().get_updates(two_layer_loss, params)
    assert_same_bits(np.asarray(params[0]), np.clip(reference.params[0], -0.5, 0.5))
    assert_all_same_bits(params[1:], reference.params[1:])


def test_autograd_loss_of_a_memory_mapped_parameter(tmp_path: Path) -> None:
    p = np.linspace(-1, 1, 6).reshape(2, 3)
    file = np.lib.format.open_memmap(tmp_path / "p.npy", mode="w+", dtype=p.dtype, shape=p.shape)
    file[...] = p
    reference = oracle.OracleAdam([p])
    reference.step([2 * p])
    Adam().get_updates(lambda q: anp.sum(q[0] ** 2), [file])
    assert_same_bits(np.asarray(file), reference.params[0])


def test_autograd_loss_is_called_once_a_step() -> None:
    calls = []

    def loss(params: Any) -> Any:
        calls.append(len(params))
        return anp.sum(params[0] ** 2)

    optimizer = Adam()
    p = np.ones(3)
    for _ in range(3):
        optimizer.get_updates(loss, [p])
    assert calls == [1, 1, 1]


def test_callable_objects_are_losses_too() -> None:
    class Loss:
        def __call__(self, params: Any) -> Any:
            return anp.sum(params[0] ** 2)

        def method(self, params: Any) -> Any:
            return self(params)

    p = np.array([1.0, -2.0])
    for loss in (Loss(), Loss().method):
        assert_same_bits(Adam().get_gradients(loss, [p])[0], 2 * p)


def test_loss_that_leaves_every_parameter_out_is_not_silent() -> None:
    p = np.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UserWarning, ValueError)):
            Adam().get_updates(lambda _: 3.0, [p])
    assert_same_bits(p, np.ones(3))
