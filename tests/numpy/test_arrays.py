# SPDX-License-Identifier: MIT
"""Arrays as they may be given: layouts, dtypes, memory and containers, against the oracle."""

from __future__ import annotations

import copy
import itertools
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from forms import FORMS, LAYOUTS, Form, Tagged
from fusedadam import Adam, adam_step
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, read_only, state, values
from processor_state import MODES, needs_fenv, processor_restored
from training import Training

SHAPE = (12, 10)
# The second size is more than the 32,768 elements from which a step uses several threads.
sizes = pytest.mark.parametrize("size", [100, 40_000])
dtypes = pytest.mark.parametrize("dtype", FLOATS)
halves = pytest.mark.parametrize("half", ["float16", "bfloat16"])


# -- gradients --------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        *(pytest.param(form, SHAPE, id=name) for name, form in FORMS.items()),
        *(pytest.param(form, (190, 200), id=f"large, {name}") for name, form in LAYOUTS.items()),
    ],
)
def test_gradient_of_any_form(
    rng: np.random.Generator, dtype: str, form: Form, shape: tuple[int, int]
) -> None:
    p, g, m, v = state(rng, shape, dtype)
    given, kept = form(g), np.asarray(form(g)).copy()
    rounded = kept.astype(dtype)
    ours = [a.copy() for a in (p, m, v)]
    adam_step(ours[0], given, *ours[1:], step=4)
    assert_all_same_bits(ours, oracle.adam_step(p, rounded, m, v, step=4), "by adam_step")
    limited: list[dict[str, Any]] = [{}, {"clipnorm": 1.5, "clipvalue": 0.25}]
    for limits in limited:
        training = Training([(shape, dtype)], **limits)
        for by in ("apply_gradients", "get_updates", "step"):
            [returned] = training.optimizer.get_gradients([given], training.params)
            assert_all_same_bits([returned], training.reference.gradients([rounded]), str(limits))
            training.call_by(by, [given], as_seen=[rounded])
            training.check()
            if limits:
                returned[...] = 0  # clipped gradients belong to the caller
    np.testing.assert_array_equal(np.asarray(given), kept)


def test_gradients_of_all_dtypes_in_the_same_memory() -> None:
    buffer, training = np.zeros(64, "uint8"), Training([((8,), "float32")])
    for dtype in ("float16", "float32", "float16", "bfloat16", "float64", "bfloat16", "float16"):
        grad = buffer[: 8 * np.dtype(dtype).itemsize].view(dtype)
        grad[...] = 0.5
        training.call_by("apply_gradients", [grad], as_seen=[np.full(8, 0.5, "float32")])
        training.check()


@dtypes
@pytest.mark.parametrize(
    "value", [0.1, 3, True, np.float64(0.1), np.float16(0.1), np.int32(-2)], ids=repr
)
def test_numbers_as_gradients(dtype: str, value: Any) -> None:
    training = Training([((), dtype), ((1,), dtype), ((0, 3), dtype), ((2,), dtype)])
    grads: list[Any] = [value, [value], np.full((0, 3), value), (value, -2)]
    training.call_by("apply_gradients", grads, as_seen=[np.array(g, dtype) for g in grads])
    training.check()


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
    expected = oracle.adam_step(p, rounded, m, v, step=1)
    reference = oracle.OracleAdam([p])
    reference.step([rounded])
    q, table, dense, sparse = p.copy(), p.copy(), Adam(), Adam()
    with processor_restored() as processor:
        processor.set(*modes)
        [returned] = dense.get_gradients([given], [q])
        dense.apply_gradients([(given, q)])
        sparse.apply_sparse(np.arange(len(p)), given, table)
        adam_step(p, given, m, v, step=1)
        processor.restore()
    assert_all_same_bits([p, m, v], expected)
    assert_all_same_bits([returned, q, table], [rounded, *reference.params * 2])


@halves
def test_half_gradients_are_not_copied(half: str) -> None:
    p, g = np.ones(1_000_000, "float32"), np.ones(1_000_000).astype(half)
    adam = Adam(clipnorm=1.0)
    adam.apply_gradients([(g, p)])
    tracemalloc.start()
    adam.apply_gradients([(g, p)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < p.size


# -- gradients in memory that the step writes -------------------------------------------------


@sizes
@pytest.mark.parametrize("shift", [-1000, -17, -1, 0, 1, 17])
def test_gradient_that_overlaps_its_parameter(
    rng: np.random.Generator, shift: int, size: int
) -> None:
    buffer = values(rng, 1000 + size + 1000, "float32")
    p, g = buffer[1000 : 1000 + size], buffer[1000 + shift : 1000 + shift + size]
    for by_function in (True, False):
        m, v = np.zeros((2, size), "float32")
        around = buffer.copy()
        around[1000 : 1000 + size] = oracle.adam_step(p.copy(), g.copy(), m, v, step=1)[0]
        if by_function:
            adam_step(p, g, m, v, step=1)
        else:
            Adam().apply_gradients([(g, p)])
        assert_same_bits(buffer, around, f"the parameter and around it, {by_function=}")


@pytest.mark.parametrize("which", ["m", "v"])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_adam_step_gradient_that_overlaps_a_moment(
    rng: np.random.Generator, which: str, shift: int
) -> None:
    buffer = np.abs(values(rng, 102, "float32"))
    p, _, m, v = state(rng, 100, "float32")
    moments: dict[str, Any] = {"m": m, "v": v, which: buffer[1:-1]}
    g = buffer[1 + shift : 101 + shift]
    expected = oracle.adam_step(p, g.copy(), moments["m"], moments["v"], step=4)
    adam_step(p, g, **moments, step=4)
    assert_all_same_bits([p, moments["m"], moments["v"]], expected)


@halves
def test_half_gradient_in_the_upper_half_of_its_parameter(half: str) -> None:
    training = Training([((8,), "float32")])
    (p,) = training.params
    training.reference.step([p.view(half)[8:].copy()])
    training.optimizer.apply_gradients([(p.view(half)[8:], p)])
    training.check()


@sizes
@pytest.mark.parametrize("order", [[1, 0], [0, 1], [0, 0]], ids=str)
def test_gradients_that_are_parameters(size: int, order: list[int]) -> None:
    training = Training([((size,), "float32")] * 2)
    for _ in range(3):
        params = training.params
        training.reference.step([params[i].copy() for i in order])
        training.optimizer.get_updates([params[i] for i in order], params)
        training.check()
        training.params = [p.copy() for p in params]  # for bound parameters, and for new ones
    for moment in training.optimizer.weights[1:]:
        training.reference.step([moment.copy(), moment.copy()])
        training.optimizer.get_updates([moment, moment], training.params)
        training.check()


def test_overlaps_are_looked_for_anew_with_new_parameters_or_settings() -> None:
    buffer = np.linspace(-1, 1, 101, dtype="float32")
    p, g = buffer[1:], buffer[:-1]
    training = Training([((100,), "float32")])
    training.call([g])
    training.call([g])
    training.params, training.reference.params = [p], [p.copy()]
    training.optimizer.zero_grad = True
    for _ in range(2):
        with pytest.raises(ValueError, match=r"grads\[0\] must not overlap"):
            training.optimizer.apply_gradients([(g, p)])
    training.optimizer.zero_grad = False
    training.reference.step([g.copy()])
    training.optimizer.apply_gradients([(g, p)])
    training.check()


def test_gradient_where_the_last_one_lay_but_transposed() -> None:
    training = Training([((6, 6), "float32")])
    (g,) = training.grads()
    training.call([g])
    training.call([g.T])
    training.check()


# Raised by NumPy 2.5 and later.
@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")
def test_gradient_changed_in_place_between_steps() -> None:
    training = Training([((4, 5), "float32")], lr=0.5)
    (g,), (p,) = training.grads(), training.params
    training.call([g])
    g.resize((5, 4), refcheck=False)
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape"):
        training.optimizer.apply_gradients([(g, p)])
    g.resize((4, 5), refcheck=False)
    g.dtype = np.dtype("S4")  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"grads\[0\] must be .* same_kind"):
        training.optimizer.apply_gradients([(g, p)])
    g.dtype = np.dtype("int32")  # type: ignore[misc]
    training.call_by("apply_gradients", [g], as_seen=[g.astype("float32")])
    training.check()


# -- layouts of parameters --------------------------------------------------------------------


class LaidOut(Training):
    """The first parameter has permuted axes, and the oracle sees its memory.

    Sums over elements (for norms) and dithers use memory order. Nothing else depends on the layout.
    """

    def __init__(self, axes: tuple[int, ...], dtype: str, size: int = 3, **options: Any) -> None:
        extents = tuple(size + 2 * i for i in range(len(axes)))
        other = "float32" if "moments" in options else "float64"
        super().__init__([(extents, dtype), ((5,), other)], seed=8, **options)
        self.axes = axes
        self.params = self.laid(self.params)
        assert not self.params[0].flags.c_contiguous

    def laid(self, arrays: Sequence[Array]) -> list[Array]:
        return [arrays[0].transpose(self.axes), *arrays[1:]]

    def step(self, count: int = 1) -> None:
        memory = self.reference.params
        for _ in range(count):
            grads = [values(self.rng, a.shape, str(a.dtype)) for a in memory]
            given = self.laid([g.copy() for g in grads])
            if self.reference.iterations % 2:
                given[0] = np.ascontiguousarray(given[0])
            left = self.laid(self.reference.step(grads))
            self.optimizer.apply_gradients(list(zip(given, self.params, strict=True)))
            assert_all_same_bits(given, left, "grads after the call")
            self.check()

    def check(self) -> None:
        slots, kept = self.optimizer._state.slots, self.optimizer.weights[1:] + self.optimizer.ema
        assert_all_same_bits(self.params, self.laid(self.reference.params), "params")
        for kind in {"m", "v", "vhat", "ema", "packed"} & slots.keys():
            assert_all_same_bits(slots[kind], self.laid(getattr(self.reference, kind)), kind)
        for low in slots.get("low_bits", [])[:1]:
            assert_same_bits(low, self.reference.low_bits[0].transpose(self.axes), "low_bits")
        assert self.optimizer.iterations == self.reference.iterations
        in_memory = np.argsort(self.axes)
        assert all(a.transpose(in_memory).flags.c_contiguous for a in kept if a.ndim > 1)


AXES = [(1, 0), (2, 0, 1), (0, 2, 1), (3, 1, 0, 2)]
LAID_OUT: list[tuple[str, dict[str, Any]]] = [
    ("float64", {}),
    ("float32", {"use_ema": True, "ema_overwrite_frequency": 3, "weight_decay": 0.1}),
    ("float64", {"gradient_accumulation_steps": 2, "clipnorm": 0.5, "amsgrad": True}),
    ("float32", {"clipnorm_per_tensor": 0.1, "loss_scale": "dynamic", "zero_grad": True}),
    ("bfloat16", {"moments": "packed", "low_bits": "int8", "clipnorm": 0.5, "use_ema": True}),
]
laid_out = pytest.mark.parametrize(("dtype", "options"), LAID_OUT, ids=str)


def with_weights(training: LaidOut) -> Adam:
    """Set the weights of another optimizer, where they are the whole state."""
    optimizer = training.optimizer
    if optimizer.ema or optimizer.loss_scale is not None:
        return optimizer
    other = Adam.from_config(optimizer.get_config())
    other.build(training.params)
    other.set_weights(optimizer.get_weights())
    return other


def saved(training: Training, path: Path) -> Path:
    training.optimizer.save(path)
    return path


CONTINUED: dict[str, Callable[[LaidOut, Path], Adam]] = {
    "save": lambda t, path: Adam.load(saved(t, path), [read_only(p) for p in t.params]),
    "in place": lambda t, path: t.optimizer.load(saved(t, path), t.params),
    "pickle": lambda t, _: pickle.loads(pickle.dumps(t.optimizer)),
    "deepcopy": lambda t, _: copy.deepcopy(t.optimizer),
    "weights": lambda t, _: with_weights(t),
}


@pytest.mark.parametrize("axes", AXES, ids=str)
@laid_out
def test_parameter_of_any_dense_layout(
    dtype: str, options: dict[str, Any], axes: tuple[int, ...], path: Path
) -> None:
    training = LaidOut(axes, dtype, **options)
    for continued in CONTINUED.values():
        training.step(4)  # completes any mean
        training.optimizer = continued(training, path)
    training.step(3)
    for _ in range(2 if "use_ema" in options else 0):
        training.optimizer.swap_ema()
        training.reference.swap_ema()
        training.check()
    training.optimizer = CONTINUED["save"](training, path)  # within a mean
    training.step(3)


@pytest.mark.usefixtures("threads")
@laid_out
def test_large_parameter_in_fortran_order(dtype: str, options: dict[str, Any]) -> None:
    LaidOut((1, 0), dtype, 190, **options).step(4)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "use_ema": True}], ids=str)
def test_layout_may_change_between_steps(options: dict[str, Any], path: Path) -> None:
    training = Training([((3, 4, 5), "float32")], **options)
    optimizer = training.optimizer
    for axes in [(0, 1, 2), (2, 1, 0), (2, 1, 0), (0, 2, 1), (0, 1, 2)]:
        memory, live = np.ascontiguousarray(training.params[0].transpose(axes)), optimizer.weights
        p = memory.transpose(np.argsort(axes))
        with pytest.raises(ValueError, match=r"grads\[0\] must have the shape"):
            optimizer.apply_gradients([(np.ones((1, 4, 5)), p)])
        assert all(map(np.shares_memory, optimizer.weights[1:], live[1:]))
        if options and live:
            optimizer.swap_ema()
            optimizer.swap_ema()
        training.params = [p]
        training.step()
        training.check()
        assert {w.strides for w in optimizer.weights[1:]} == {p.strides}
        for like in (p, p.copy()):
            loaded = Adam.load(saved(training, path), [like])
            expected = [*optimizer.weights, *optimizer.ema]
            assert_all_same_bits([*loaded.weights, *loaded.ema], expected)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_adam_step_of_any_dense_layout(rng: np.random.Generator, axes: tuple[int, ...]) -> None:
    arrays = state(rng, tuple(range(2, 2 + len(axes))), "float64")
    memory = [np.abs(a) for a in (*arrays, arrays[3], arrays[0])]
    expected = oracle.adam_step(*memory[:4], step=4, vhat=memory[4], ema=memory[5])
    orders: list[Any] = ["K", "C"]
    for order, of_grad in itertools.product(orders, repeat=2):
        p, _, m, v, vhat, ema = (np.copy(a.transpose(axes), order=order) for a in memory)
        g = np.copy(memory[1].transpose(axes), order=of_grad)
        adam_step(p, g, m, v, step=4, vhat=vhat, ema=ema, zero_grad=True)
        left = [np.transpose(a, np.argsort(axes)) for a in (p, m, v, vhat, ema, g)]
        assert_all_same_bits(left, [*expected, 0 * memory[0]], f"orders {order} and {of_grad}")


@pytest.mark.parametrize("strides", [(8, 8), (80, 8), (-8, 0), (3, 5)], ids=str)
def test_strides_of_single_elements_mean_nothing(strides: tuple[int, int]) -> None:
    p = np.lib.stride_tricks.as_strided(np.ones(1), (1, 1), strides)
    assert Adam(lr=0.5).apply_gradients([(np.ones((1, 1)), p)]) == 1
    np.testing.assert_allclose(p, 0.5, rtol=1e-6)


# -- memory of parameters ---------------------------------------------------------------------


def test_parameters_that_touch_but_do_not_overlap() -> None:
    # Empty arrays may overlap anything, even the middle of an array that is written.
    sizes = [(100,), (100,), (10, 10), (0,), (0,)]
    training = Training([(size, "float32") for size in sizes], zero_grad=True)
    buffer, before = np.zeros(300, "float32"), training.params
    parts = [buffer[200:], buffer[:100], buffer[100:200].reshape(10, 10), buffer[50:50], buffer[:0]]
    for part, p in zip(parts, before, strict=True):
        part[...] = p
    training.params = parts
    grads, empty = training.grads(), parts[1][7:7]
    training.call([*grads[:3], empty, empty])
    training.check()
    m, v = ([np.zeros_like(p) for p in parts] for _ in range(2))
    grads = training.grads()
    m[3] = grads[3] = empty
    adam_step(parts, grads, m, v, step=1, zero_grad=True)


def test_subclasses(rng: np.random.Generator) -> None:
    p, g, m, v = state(rng, SHAPE, "float32")
    expected = oracle.adam_step(p, g, m, v, step=1)
    adam_step(p.view(Tagged), g, m.view(Tagged), v.view(Tagged), step=1)
    assert_all_same_bits([p, m, v], expected)


# -- containers -------------------------------------------------------------------------------


@pytest.mark.parametrize("of_pairs", [tuple, lambda pairs: dict(enumerate(pairs)).values()])
def test_grads_and_vars_container(of_pairs: Callable[[Any], Any]) -> None:
    training = Training()
    for count in (1, 2):  # the first call is checked in full, the second compared with the first
        grads = training.grads()
        training.reference.step(grads)
        pairs = zip(grads, training.params, strict=True)
        assert training.optimizer.apply_gradients(of_pairs(pairs)) == count
        training.check()


@pytest.mark.parametrize(("of_params", "of_grads"), [(list, tuple), (tuple, list)])
def test_sequence_types(of_params: Any, of_grads: Any) -> None:
    training = Training()
    grads, params = training.grads(), of_params(training.params)
    m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
    expected = [p.copy() for p in params]
    adam_step(of_params(expected), of_grads(grads), of_grads(m), of_params(v), step=1)
    adam = training.optimizer
    assert_all_same_bits(adam.get_gradients(of_grads(grads), params), grads)
    training.reference.step(grads)
    adam.get_updates(of_grads(grads), params)
    training.check()
    assert_all_same_bits([*params, *adam.weights[1:]], [*expected, *m, *v])
