# SPDX-License-Identifier: MIT
"""Each option alone: the bits of its stage, and its state from call to call."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import pickle
import pydoc
import re
from collections.abc import Callable
from typing import Any

import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from fusedadam import Adam, adam_step, global_norm
from fusedadam._core import AdamOptions
from helpers import (
    FLOATS,
    Array,
    Placed,
    assert_all_same_bits,
    assert_same_bits,
    halving,
    state,
    values,
)
from training import FEW, ShapesAndDtypes, Training

NAN, INF = float("nan"), float("inf")
TORCH_REASON = "what is said of tensors needs torch"

# Sizes around vector widths and tiles, zero-dimensional, empty, and large enough for threads.
SHAPES: ShapesAndDtypes = [
    ((3, 5), "float32"),
    ((), "float64"),
    ((0,), "float32"),
    ((1023,), "float64"),
    ((), "float32"),
    ((1025,), "float32"),
    ((9, 33), "float64"),
]
LARGE: ShapesAndDtypes = [*SHAPES, ((70_001,), "float32"), ((7, 5_001), "float64")]

ALONE: list[dict[str, Any]] = [
    {"bias_corrected_epsilon": True, "epsilon": 1e-3},
    {"amsgrad": True},
    {"amsgrad": True, "beta_2": 0.5},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decay": 0.5},
    {"weight_decay": 0.0},
    {"l2": 0.1},
    {"clipnorm_per_tensor": 1.0},
    {"clipnorm_per_tensor": 1e-30},
    {"clipnorm_per_tensor": 1e30},
    {"clipnorm_per_tensor": 0.0},
    {"use_ema": True},
    {"use_ema": True, "ema_momentum": 0.0},
    {"use_ema": True, "ema_momentum": 1.0},
    {"use_ema": True, "ema_momentum": 1 / 3, "ema_overwrite_frequency": 2},
    {"use_ema": True, "ema_overwrite_frequency": 1},
    {"loss_scale": 1.0},
    {"loss_scale": 3.0},
    {"loss_scale": 2.0**-127},
    {"loss_scale": 2.0**127},
    {"loss_scale": 1 / 3, "clipnorm": 1.0},
    {"loss_scale": 100, "clipnorm_per_tensor": 0.01, "clipvalue": 0.005},
    {"loss_scale": "dynamic"},
    {"loss_scale": "dynamic", "clipnorm": 1e-3},
    {"skip_nonfinite": True},
    {"gradient_accumulation_steps": 1},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3, "clipnorm": 0.5},
    {"gradient_accumulation_steps": 3, "loss_scale": 7.0, "clipnorm_per_tensor": 0.5},
    {"zero_grad": True},
    {"zero_grad": True, "gradient_accumulation_steps": 2},
    {"maximize": True},
    {"maximize": True, "clipnorm": 1.0, "clipvalue": 0.1},
    {"maximize": True, "l2": 0.1, "weight_decay": 0.1},
    {"lr": halving},
    {"lr": halving, "decay": 0.5, "weight_decay": 0.1},
]
# The norm pass and the step pass must agree on these, however the tensors are divided.
TOGETHER: list[dict[str, Any]] = [
    {"clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True, "zero_grad": True},
    {
        "amsgrad": True,
        "weight_decay": 0.1,
        "l2": 0.2,
        "clipnorm_per_tensor": 0.5,
        "clipvalue": 0.01,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "loss_scale": "dynamic",
        "gradient_accumulation_steps": 2,
        "zero_grad": True,
        "maximize": True,
        "flush_denormals": False,
    },
]


# -- against the oracle -----------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", [*ALONE, *TOGETHER], ids=str)
def test_option_equals_oracle(options: dict[str, Any]) -> None:
    training = Training(SHAPES, excluded=[1, 5], **options)
    for _ in range(7):
        training.step()
        training.check()


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize(
    "options",
    [
        *TOGETHER,
        {"clipnorm_per_tensor": 1.0},
        {"gradient_accumulation_steps": 2, "clipnorm": 1.0},
        {"use_ema": True, "amsgrad": True},
        {"skip_nonfinite": True},
    ],
    ids=str,
)
def test_options_on_several_threads_equal_oracle(options: dict[str, Any]) -> None:
    training = Training(LARGE, excluded=[7], **options)
    training.step(4)
    training.check()


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"loss_scale": "dynamic"}], ids=str)
@pytest.mark.parametrize("position", [0, 1023, 70_000])
def test_one_bad_element_among_many(options: dict[str, Any], position: int) -> None:
    training = Training(LARGE, clipnorm=1.0, **options)
    training.step()
    bad = training.grads()
    bad[7][position] = -INF
    training.call(bad)
    training.check()
    assert training.optimizer.skipped_steps == 1
    training.step()
    training.check()


@pytest.mark.parametrize("options", [*ALONE, *TOGETHER], ids=str)
def test_every_route_is_the_same_step(options: dict[str, Any]) -> None:
    training, twin = Training(**options), Training(**options)
    for _ in range(4):
        grads = training.grads()
        copies = [g.copy() for g in grads]
        training.call(grads)
        updates = twin.optimizer.get_updates(copies, twin.params)
        assert updates[0] == training.optimizer.iterations
        assert_all_same_bits(copies, grads, "grads after the call")
        assert_all_same_bits(twin.params, training.params, "params")
        assert_all_same_bits(twin.optimizer.weights, training.optimizer.weights, "weights")
        assert_all_same_bits(twin.optimizer.ema, training.optimizer.ema, "ema")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [*ALONE, *TOGETHER], ids=str)
def test_odd_numbers_everywhere(
    rng: np.random.Generator, dtype: str, options: dict[str, Any]
) -> None:
    info = np.finfo(dtype)
    last, tiny, largest = (
        float(x) for x in (info.smallest_subnormal, info.smallest_normal, info.max)
    )
    magnitudes = [0.0, last, tiny / 2, tiny, 1.0625 * tiny, 0.1, 1.0, largest]
    finite = [*magnitudes, *(-x for x in magnitudes)]
    odd = np.array([*finite, INF, -INF, NAN], dtype)
    optimizer = Adam(**options)
    params = [rng.choice(odd, 3001), rng.choice(odd, 5)]
    reference = oracle.OracleAdam(params, **options)
    optimizer.build(params)
    reference.m, reference.v = ([rng.choice(odd, p.shape) for p in params] for _ in range(2))
    if reference.amsgrad:
        reference.vhat = [rng.choice(odd, p.shape) for p in params]
    optimizer.set_weights(reference.weights())
    for ours, theirs in zip(optimizer.ema, reference.ema, strict=True):
        theirs[...] = rng.choice(odd, theirs.shape)
        ours[...] = theirs
    # Include finite gradients, because infinities may skip all other steps.
    for choice in (finite, finite, odd, odd):
        grads = [rng.choice(np.array(choice, dtype), p.shape) for p in params]
        left = reference.step(grads)
        optimizer.apply_gradients(zip(grads, params, strict=True))
        assert_all_same_bits(grads, left, "grads")
        assert_all_same_bits(params, reference.params, "params")
        assert_all_same_bits(optimizer.get_weights(), reference.weights(), "weights")
        assert_all_same_bits(optimizer.ema, reference.ema, "ema")
    assert optimizer.skipped_steps == reference.skipped_steps


@pytest.mark.parametrize("options", TOGETHER, ids=str)
def test_options_may_change_between_steps(options: dict[str, Any]) -> None:
    training = Training(excluded=[2], use_ema=True, gradient_accumulation_steps=2, amsgrad=True)
    changes: list[dict[str, Any]] = [
        {name: value}
        for name, value in options.items()
        if name not in ("use_ema", "gradient_accumulation_steps", "amsgrad")
    ]
    changes += [
        {"lr": halving},
        {"weight_decay": None},
        {"l2": 0.0},
        {"loss_scale": 8.0},
        {"ema_momentum": 0.25},
        {"loss_scale": "dynamic"},
        {"lr": 0.125},
        {"loss_scale": None},
    ]
    for change in changes:
        for name, value in change.items():
            setattr(training.optimizer, name, value)
            setattr(training.reference, name, value)
            assert getattr(training.optimizer, name) == value
        training.step(2)
        training.check()


# -- adam_step --------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("n", [0, 1, 3, 7, 8, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2049])
def test_adam_step_of_any_length_and_alignment(
    rng: np.random.Generator, n: int, offset: int, dtype: str
) -> None:
    arrays = [*state(rng, n, dtype), np.abs(values(rng, n, dtype)), values(rng, n, dtype)]
    placed = [Placed(x, offset + i) for i, x in enumerate(arrays)]
    p, g, m, v, vhat, ema = (x.array for x in placed)
    options: dict[str, Any] = {"step": 3, "lr": 0.1, "decay": 0.5, "weight_decay": 0.3, "l2": 0.2}
    adam_step(
        p, g, m, v, vhat=vhat, ema=ema, clipnorm=0.7, maximize=True, zero_grad=True, **options
    )
    (clipped,) = oracle.clip([arrays[1]], clipnorm=0.7, sign=-1.0)
    expected = oracle.adam_step(
        arrays[0], clipped, arrays[2], arrays[3], vhat=arrays[4], ema=arrays[5], **options
    )
    assert_all_same_bits([p, m, v, vhat, ema], expected, "[p, m, v, vhat, ema]")
    assert_same_bits(g, np.zeros_like(g), "g")
    for x in placed:
        x.assert_canaries_alive()


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.25},
        {"weight_decay": 0.1},
        {"l2": 0.1},
        {"clipnorm": 0.5},
        {"clipnorm_per_tensor": 0.5},
        {"clipvalue": 0.01},
        {"zero_grad": True},
        {"maximize": True},
        {"amsgrad": True},
        {"use_ema": True},
        {"use_ema": True, "ema_momentum": 0.5, "amsgrad": True, "clipnorm": 0.5, "l2": 1.0},
    ],
    ids=str,
)
def test_adam_step_of_a_list(rng: np.random.Generator, options: dict[str, Any], step: int) -> None:
    arrays = [state(rng, shape, dtype) for shape, dtype in SHAPES]
    p, g, m, v = (list(column) for column in zip(*arrays, strict=True))
    reference = oracle.OracleAdam(p, **options)
    reference.set_count(step - 1)
    reference.m, reference.v = ([x.copy() for x in column] for column in (m, v))
    given = dict(options)
    if given.pop("amsgrad", False):
        reference.vhat = [values(rng, *of) for of in SHAPES]
        given["vhat"] = [x.copy() for x in reference.vhat]
    if given.pop("use_ema", False):
        reference.ema = [values(rng, *of) for of in SHAPES]
        given["ema"] = [x.copy() for x in reference.ema]
    left = reference.step(g)
    adam_step(p, g, m, v, step=step, **given)
    assert_all_same_bits(p, reference.params, "params")
    assert_all_same_bits([*m, *v], reference.weights()[1 : 1 + 2 * len(p)], "moments")
    assert_all_same_bits(given.get("vhat", []), reference.vhat, "vhat")
    assert_all_same_bits(given.get("ema", []), reference.ema, "ema")
    assert_all_same_bits(g, left, "grads")


# -- AMSGrad ----------------------------------------------------------------------------------


def test_vhat_is_the_largest_v_so_far() -> None:
    training = Training(amsgrad=True, beta_2=0.5)
    n = len(FEW)
    largest = [np.zeros_like(p) for p in training.params]
    for _ in range(5):
        training.step()
        v, vhat = training.optimizer.weights[1 + n : 1 + 2 * n], training.optimizer.weights[-n:]
        largest = [np.asarray(np.maximum(old, new)) for old, new in zip(largest, v, strict=True)]
        assert_all_same_bits(vhat, largest)


def test_there_is_no_vhat_without_amsgrad() -> None:
    training = Training()
    training.step()
    assert len(training.optimizer.weights) == 1 + 2 * len(FEW)


# -- weight decay -----------------------------------------------------------------------------


def test_weight_decay_is_apart_from_the_moments(rng: np.random.Generator) -> None:
    start, g = values(rng, 20, "float64"), values(rng, 20, "float64")
    plain, decayed = start.copy(), start.copy()
    adam, adam_w = Adam(lr=0.5), Adam(lr=0.5, weight_decay=0.5)
    adam.apply_gradients([(g, plain)])
    adam_w.apply_gradients([(g, decayed)])
    assert_all_same_bits(adam_w.weights, adam.weights)
    np.testing.assert_allclose(decayed, plain - 0.25 * start, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("way", ["the array", "a view", "both", "an iterator"])
@pytest.mark.parametrize("when", ["before the first step", "after it", "after build"])
def test_parameters_that_do_not_decay(way: str, when: str) -> None:
    training = Training(weight_decay=0.5, l2=0.5)
    if when == "after it":
        training.step()
    elif when == "after build":
        training.optimizer.build(training.params)
    p, q = training.params[1], training.params[2]
    named: dict[str, Any] = {
        "the array": [p, q],
        "a view": [p[...], q.reshape(1)],
        "both": [p, p[...], q],
        "an iterator": iter((q, p)),
    }
    training.optimizer.exclude_from_weight_decay(named[way])
    training.reference.excluded = {1, 2}
    training.step(2)
    training.check()


def test_a_later_exclusion_replaces_the_earlier() -> None:
    training = Training(weight_decay=0.5, excluded=[0])
    training.step()
    for excluded in ([2], [0, 1], []):
        training.optimizer.exclude_from_weight_decay([training.params[i] for i in excluded])
        training.reference.excluded = set(excluded)
        training.step()
        training.check()


def test_exclusion_belongs_to_a_position() -> None:
    training = Training(weight_decay=0.5, excluded=[1])
    training.step()
    training.params = [p.copy() for p in training.params]  # another model of the same shapes
    training.step()
    training.check()
    training.optimizer.build(training.params)
    training.reference.build(training.params)
    training.step()
    training.check()


def test_exclusion_counts_once_there_is_a_decay() -> None:
    training = Training(excluded=[0])
    training.step()
    training.optimizer.weight_decay = training.reference.weight_decay = 0.5
    training.step()
    training.check()


def test_tensor_that_does_not_decay() -> None:
    torch: Any = pytest.importorskip("torch", reason=TORCH_REASON)
    start = [np.full(3, 2.0), np.full(2, 4.0)]
    params = [torch.tensor(p, requires_grad=True) for p in start]
    adam = Adam(weight_decay=0.5)
    adam.exclude_from_weight_decay([params[0]])
    reference = oracle.OracleAdam(start, weight_decay=0.5, excluded=[0])
    grads = [np.ones(3), np.ones(2)]
    adam.apply_gradients(zip(grads, params, strict=True))
    reference.step(grads)
    assert_all_same_bits([p.detach().numpy() for p in params], reference.params)


# -- clipping each gradient by its own norm ---------------------------------------------------


def test_clipnorm_per_tensor_is_of_each_by_itself() -> None:
    grads = [np.array([3.0, 4.0]), np.array([12.0], "float32"), np.array([-2.5])]
    clipped = Adam(clipnorm_per_tensor=2.5).get_gradients(grads, grads)
    assert_all_same_bits(
        clipped, [np.array([1.5, 2.0]), np.array([2.5], "float32"), np.array([-2.5])]
    )


def test_a_nan_keeps_only_its_own_tensor_from_being_clipped() -> None:
    grads = [np.array([3.0, 4.0, NAN]), np.array([3.0, 4.0]), np.array([INF, 1.0])]
    params = [np.zeros_like(g) for g in grads]
    clipped = Adam(clipnorm_per_tensor=2.5).get_gradients(grads, params)
    expected = [np.array([3.0, 4.0, NAN]), np.array([1.5, 2.0]), np.array([NAN, 0.0])]
    assert_all_same_bits(clipped, expected)


# -- averages ---------------------------------------------------------------------------------


def test_average_of_known_parameters() -> None:
    # Zero gradients: weight decay alone moves p to 3/4, 9/16 and 27/64.
    p, zero = np.ones(1), np.zeros(1)
    adam = Adam(lr=0.5, weight_decay=0.5, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    seen = []
    for _ in range(3):
        adam.apply_gradients([(zero, p)])
        seen.append((float(p[0]), float(adam.ema[0][0])))
    assert seen == [(0.75, 0.75), (0.65625, 0.65625), (0.4921875, 0.57421875)]


def test_averages_are_live_and_begin_as_the_parameters() -> None:
    training = Training(use_ema=True, ema_momentum=0.5)
    adam = training.optimizer
    assert adam.ema == []
    adam.build(training.params)
    ema = adam.ema
    assert_all_same_bits(ema, training.params)
    for average, p in zip(ema, training.params, strict=True):
        assert not np.shares_memory(average, p)
        assert average.flags.writeable
        assert average.size == 0 or average.ctypes.data % 64 == 0
    training.step(3)
    assert_all_same_bits(ema, training.reference.ema)
    ema[0][...] = 0.5
    training.reference.ema[0][...] = 0.5
    training.step()
    training.check()
    training.optimizer.ema.clear()
    training.check()


def test_no_averages_without_use_ema() -> None:
    training = Training()
    training.step()
    assert training.optimizer.ema == []


def test_averages_are_not_in_the_weights() -> None:
    training = Training(use_ema=True)
    training.step()
    assert len(training.optimizer.weights) == 1 + 2 * len(FEW)


def test_build_again_starts_the_averages_again() -> None:
    training = Training(use_ema=True, ema_momentum=0.5)
    training.step(2)
    adam = training.optimizer
    adam.build(training.params)
    assert_all_same_bits(adam.ema, training.params)
    training.reference.build(training.params)
    training.step(2)
    training.check()


def test_swap_ema_is_in_place_and_its_own_inverse() -> None:
    training = Training(use_ema=True, ema_momentum=0.5)
    training.step(3)
    adam, params = training.optimizer, training.params
    addresses = [a.ctypes.data for a in (*params, *adam.ema)]
    values_before, averages = [p.copy() for p in params], [e.copy() for e in adam.ema]
    adam.swap_ema()
    assert_all_same_bits(params, averages)
    assert_all_same_bits(adam.ema, values_before)
    adam.swap_ema()
    assert_all_same_bits(params, values_before)
    assert_all_same_bits(adam.ema, averages)
    assert [a.ctypes.data for a in (*params, *adam.ema)] == addresses
    training.step()
    training.check()


@pytest.mark.usefixtures("threads")
def test_swap_ema_of_large_arrays() -> None:
    training = Training(LARGE, use_ema=True)
    training.step(2)
    training.optimizer.swap_ema()
    training.reference.swap_ema()
    training.check()


def test_swap_ema_of_tensors() -> None:
    torch: Any = pytest.importorskip("torch", reason=TORCH_REASON)
    p = torch.ones(3, requires_grad=True)
    adam = Adam(lr=0.5, use_ema=True, ema_momentum=0.5)
    for _ in range(2):
        adam.apply_gradients([(np.ones(3, "float32"), p)])
    value, average = p.tolist(), adam.ema[0].tolist()
    assert value != average
    stale = (p**2).sum()
    adam.swap_ema()
    assert (p.tolist(), adam.ema[0].tolist()) == (average, value)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# -- the loss scale ---------------------------------------------------------------------------


def loss(params: Any) -> Any:
    return sum(anp.sum((p - 0.3) ** 2) for p in params)


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**-10, "dynamic"])
@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.5, "clipvalue": 0.1}], ids=str)
def test_scale_that_is_a_power_of_two_changes_no_bit(
    rng: np.random.Generator, scale: Any, options: dict[str, Any]
) -> None:
    start = [values(rng, 10, "float64"), values(rng, (2, 3), "float64")]
    plain, scaled = ([p.copy() for p in start] for _ in range(2))
    adam, beside = Adam(**options), Adam(loss_scale=scale, **options)
    for _ in range(3):
        assert_all_same_bits(beside.get_gradients(loss, scaled), adam.get_gradients(loss, plain))
        adam.get_updates(loss, plain)
        beside.get_updates(loss, scaled)
    assert_all_same_bits(scaled, plain)
    assert_all_same_bits(beside.weights, adam.weights)


def test_gradients_given_are_those_of_the_scaled_loss() -> None:
    p = np.zeros(2)
    adam = Adam(loss_scale=8.0, beta_1=0.5)
    assert_all_same_bits(adam.get_gradients([np.array([8.0, -4.0])], [p]), [np.array([1.0, -0.5])])
    adam.apply_gradients([(np.array([8.0, -4.0]), p)])
    np.testing.assert_array_equal(adam.weights[1], [0.5, -0.25])


def test_current_loss_scale() -> None:
    assert Adam().current_loss_scale == 1.0
    assert Adam(loss_scale=3).current_loss_scale == 3.0
    adam = Adam(loss_scale="dynamic")
    assert adam.current_loss_scale == 2.0**15
    assert type(adam.current_loss_scale) is float
    assert adam.loss_scale == "dynamic"


@pytest.mark.parametrize(("scale", "factor"), [(None, 1.0), (8.0, 8.0), ("dynamic", 2.0**15)])
def test_scale_loss(scale: Any, factor: float) -> None:
    adam = Adam(loss_scale=scale)
    assert adam.scale_loss(0.25) == 0.25 * factor
    assert adam.scale_loss(np.float32(0.25)) == 0.25 * factor
    np.testing.assert_array_equal(adam.scale_loss(np.array([1.0, 2.0])), [factor, 2 * factor])
    scaled = adam.scale_loss(loss)
    assert callable(scaled)
    params = [np.array([1.0, 2.0])]
    assert scaled(params) == loss(params) * factor


def test_scale_loss_of_a_tensor() -> None:
    torch: Any = pytest.importorskip("torch", reason=TORCH_REASON)
    p = torch.ones(2, requires_grad=True)
    adam = Adam(loss_scale=8.0)
    (g,) = torch.autograd.grad(adam.scale_loss((3 * p).sum()), p)
    assert g.tolist() == [24.0, 24.0]
    assert_all_same_bits(adam.get_gradients((3 * p).sum(), [p]), [np.full(2, 3.0, "float32")])


def test_small_gradients_survive_in_the_scaled_loss() -> None:
    # 1e-42 is subnormal in float32. Multiplied by 2**40, it keeps all digits.
    exact = 1e-42
    p = np.zeros(1, "float32")
    scaled = np.array([exact * 2.0**40], "float32")
    adam = Adam(loss_scale=2.0**40, clipnorm=exact / 2)
    (clipped,) = adam.get_gradients([scaled], [p])
    assert clipped[0] == np.float32(exact / 2)


def calls(adam: Adam, p: Array, outcomes: str) -> list[float]:
    """Call with good (.) and bad (x) gradients in turn. Return the scale after each call."""
    scales = []
    good, bad = np.ones_like(p), np.full_like(p, NAN)
    for outcome in outcomes:
        adam.apply_gradients([(good if outcome == "." else bad, p)])
        scales.append(adam.current_loss_scale)
    return scales


def test_dynamic_scale_grows_after_2000_good_steps_and_halves_on_a_bad_one() -> None:
    adam, p = Adam(loss_scale="dynamic"), np.zeros(1, "float32")
    start = 2.0**15
    assert calls(adam, p, "." * 2000) == [start] * 1999 + [2 * start]
    assert calls(adam, p, "xx.x") == [start, start / 2, start / 2, start / 4]
    assert (adam.iterations, adam.skipped_steps) == (2001, 3)
    # The count starts over after a bad step.
    assert calls(adam, p, "." * 2000) == [start / 4] * 1999 + [start / 2]
    assert calls(adam, p, "." * 1999 + "x" + "." * 1999) == [
        *[start / 2] * 1999,
        *[start / 4] * 2000,
    ]
    assert calls(adam, p, "x" * 20)[-6:] == [1.0] * 6


def test_dynamic_scale_has_a_largest_value() -> None:
    adam, p = Adam(loss_scale="dynamic"), np.zeros(1)
    seen = calls(adam, p, "." * (2000 * 116))
    assert seen[-1] == seen[-4001] == 2.0**127
    assert math.log2(seen[2000 * 100]) == 115


def test_dynamic_scale_is_that_of_the_step() -> None:
    training = Training(loss_scale="dynamic", clipnorm=1e-4)
    for outcome in ".x..xx.":
        grads = training.grads()
        if outcome == "x":
            grads[1][2] = INF
        training.call(grads)
        training.check()


# -- skipped steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"skip_nonfinite": True},
        {"loss_scale": "dynamic"},
        {"skip_nonfinite": True, "clipnorm": 1.0, "clipvalue": 0.5, "loss_scale": 2.0},
        {"skip_nonfinite": True, "clipnorm_per_tensor": 1.0, "amsgrad": True, "use_ema": True},
        {"skip_nonfinite": True, "zero_grad": True, "weight_decay": 0.5},
    ],
    ids=str,
)
def test_step_with_a_gradient_that_is_not_finite_is_skipped_whole(
    options: dict[str, Any], position: int, bad: float
) -> None:
    training = Training(**options)
    training.step(2)
    adam = training.optimizer
    before = [a.copy() for a in (*training.params, *adam.weights, *adam.ema)]
    grads = training.grads()
    grads[position].flat[-1] = bad
    training.call(grads)
    assert_all_same_bits([*training.params, *adam.weights, *adam.ema], before)
    assert (adam.iterations, adam.skipped_steps) == (2, 1)
    training.check()
    training.step(2)
    training.check()
    assert type(adam.skipped_steps) is int


def test_finite_gradients_whose_squares_overflow_are_stepped() -> None:
    p, g = np.zeros(3), np.array([1e200, -1e300, 1.0])
    adam = Adam(skip_nonfinite=True)
    assert adam.apply_gradients([(g, p)]) == 1
    assert adam.skipped_steps == 0
    largest = np.full(3, np.finfo("float32").max, "float32")
    assert adam.get_config()["skip_nonfinite"] is True
    beside = Adam(loss_scale="dynamic")
    beside.apply_gradients([(largest, np.zeros(3, "float32"))])
    assert (beside.iterations, beside.skipped_steps) == (1, 0)


def test_without_the_option_nothing_is_skipped() -> None:
    p = np.zeros(2)
    adam = Adam()
    assert adam.apply_gradients([(np.array([NAN, 1.0]), p)]) == 1
    assert adam.skipped_steps == 0
    assert np.isnan(p[0])


def test_first_step_that_is_skipped() -> None:
    training = Training(skip_nonfinite=True, use_ema=True)
    training.call([np.full_like(g, NAN) for g in training.grads()])
    assert (training.optimizer.iterations, training.optimizer.skipped_steps) == (0, 1)
    training.check()
    training.step(2)
    training.check()


# -- accumulation -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_one_step_for_so_many_gradients(rng: np.random.Generator, count: int) -> None:
    # Sums of small integers and divisions by 2 or 4 are exact, and so is the mean.
    grads = [rng.integers(-50, 50, 8).astype("float32") for _ in range(count)]
    p, q = np.ones(8, "float32"), np.ones(8, "float32")
    adam = Adam(gradient_accumulation_steps=count)
    returned: list[int] = []
    for g in grads:
        if len(returned) < count:
            assert_same_bits(p, np.ones(8, "float32"))
        returned.append(adam.apply_gradients([(g, p)]))
    assert returned == [0] * (count - 1) + [1]
    plain = Adam()
    plain.apply_gradients([(np.mean(grads, axis=0), q)])
    assert_same_bits(p, q)
    assert_all_same_bits(adam.weights, plain.weights)


def test_norm_is_that_of_the_mean() -> None:
    p = np.zeros(2)
    adam = Adam(gradient_accumulation_steps=2, clipnorm=2.5, beta_1=0.5)
    adam.apply_gradients([(np.array([6.0, 0.0]), p)])
    adam.apply_gradients([(np.array([0.0, 8.0]), p)])
    # The mean (3, 4) has the norm 5. m is half of what remains after clipping.
    np.testing.assert_array_equal(adam.weights[1], [0.75, 1.0])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_bad_gradient_within_a_mean_skips_its_step(at: int) -> None:
    training = Training(gradient_accumulation_steps=3, skip_nonfinite=True)
    training.step(3)
    for i in range(3):
        grads = training.grads()
        if i == at:
            grads[0][1, 1] = INF
        training.call(grads)
        assert training.optimizer.skipped_steps == (i == 2)
        training.check()
    training.step(7)
    training.check()
    assert (training.optimizer.iterations, training.optimizer.skipped_steps) == (3, 1)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    p = np.zeros(1)
    adam = Adam(gradient_accumulation_steps=2, skip_nonfinite=True)
    for g in (INF, -INF):
        adam.apply_gradients([(np.array([g]), p)])
    assert (adam.iterations, adam.skipped_steps) == (0, 1)


def test_sum_that_overflows_is_skipped() -> None:
    largest = np.finfo("float32").max
    p = np.zeros(1, "float32")
    adam = Adam(gradient_accumulation_steps=2, skip_nonfinite=True)
    for _ in range(2):
        adam.apply_gradients([(np.array([largest]), p)])
    assert (adam.iterations, adam.skipped_steps) == (0, 1)


def test_build_within_a_mean_begins_it_anew() -> None:
    training = Training(gradient_accumulation_steps=3)
    training.step(5)
    training.optimizer.build(training.params)
    training.reference.build(training.params)
    training.step(4)
    training.check()
    assert training.optimizer.iterations == 2


@pytest.mark.usefixtures("threads")
def test_gradients_of_any_layout_are_accumulated(rng: np.random.Generator) -> None:
    p = values(rng, (40, 60), "float32")
    adam = Adam(gradient_accumulation_steps=3, clipnorm=1.0)
    reference = oracle.OracleAdam([p], gradient_accumulation_steps=3, clipnorm=1.0)
    for _ in range(2):
        layouts = [
            values(rng, (60, 40), "float32").T,
            values(rng, (80, 180), "float32")[::2, ::-3],
            np.broadcast_to(values(rng, 60, "float32"), (40, 60)),
        ]
        for g in layouts:
            reference.step([g])
            adam.apply_gradients([(g, p)])
    assert_same_bits(p, reference.params[0])


def test_callable_losses_are_accumulated(rng: np.random.Generator) -> None:
    p = values(rng, 6, "float64")
    adam = Adam(gradient_accumulation_steps=2, loss_scale=4.0)
    reference = oracle.OracleAdam([p], gradient_accumulation_steps=2, loss_scale=4.0)
    for _ in range(4):
        reference.step([4.0 * (2.0 * (p - 0.3))])
        adam.get_updates(loss, [p])
        np.testing.assert_allclose(p, reference.params[0], rtol=1e-14)
        reference.params = [p.copy()]
    assert adam.iterations == 2


# -- zeroed gradients -------------------------------------------------------------------------


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize(
    "options",
    [{}, {"clipnorm": 1.0}, {"gradient_accumulation_steps": 2}, {"skip_nonfinite": True}],
    ids=str,
)
def test_gradients_are_zeroed(options: dict[str, Any]) -> None:
    training = Training(LARGE, zero_grad=True, **options)
    for bad in (1.0, NAN, 1.0):
        grads = training.grads()
        grads[0][0, 0] = bad
        training.call(grads)
        for g in grads:
            assert_same_bits(g, np.zeros_like(g))
    training.check()


def test_gradients_of_tensors_are_zeroed() -> None:
    torch: Any = pytest.importorskip("torch", reason=TORCH_REASON)
    p = torch.ones(3, requires_grad=True)
    (2 * p).sum().backward()
    adam, plain = Adam(zero_grad=True), oracle.OracleAdam([np.ones(3, "float32")])
    adam.apply_gradients([(p.grad, p)])
    plain.step([np.full(3, 2.0, "float32")])
    assert p.grad.tolist() == [0.0, 0.0, 0.0]
    assert_same_bits(p.detach().numpy(), plain.params[0])


def test_gradients_of_the_optimizers_own_are_left_to_it() -> None:
    kept = np.array([1.0, -2.0])
    p = np.zeros(2)
    Adam(zero_grad=True).get_updates(lambda params: anp.sum(params[0] * kept), [p])
    np.testing.assert_array_equal(kept, [1.0, -2.0])
    assert p[0] < 0 < p[1]


def test_asking_for_gradients_zeroes_none() -> None:
    g = np.array([3.0, 4.0])
    adam = Adam(zero_grad=True, clipnorm=2.5)
    assert_all_same_bits(adam.get_gradients([g], [np.zeros(2)]), [np.array([1.5, 2.0])])
    np.testing.assert_array_equal(g, [3.0, 4.0])


# -- ascent -----------------------------------------------------------------------------------


def test_maximize_is_descent_of_the_negated_gradient(rng: np.random.Generator) -> None:
    up, down = (np.zeros(30, "float32") for _ in range(2))
    ascent, descent = Adam(maximize=True, clipnorm=0.5), Adam(clipnorm=0.5)
    for _ in range(3):
        g = values(rng, 30, "float32")
        ascent.apply_gradients([(g, up)])
        descent.apply_gradients([(-g, down)])
    assert_same_bits(up, down)
    # Only the gradient is negated: weights decay in either case.
    p = np.ones(1)
    Adam(maximize=True, weight_decay=0.5, lr=0.5).apply_gradients([(np.zeros(1), p)])
    assert p[0] == 0.75


# -- get_gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*ALONE, *TOGETHER], ids=str)
def test_get_gradients_unscales_and_clips_and_no_more(options: dict[str, Any]) -> None:
    training = Training(**options)
    training.step(3)
    adam = training.optimizer
    before = [a.copy() for a in (*training.params, *adam.weights, *adam.ema)]
    grads = training.grads()
    kept = [g.copy() for g in grads]
    actual = adam.get_gradients(grads, training.params)
    assert_all_same_bits(actual, training.reference.gradients(grads))
    assert_all_same_bits(grads, kept, "the caller's gradients")
    grads[1][0] = NAN
    actual = adam.get_gradients(grads, training.params)
    assert_all_same_bits(actual, training.reference.gradients(grads), "with a NaN")
    assert_all_same_bits([*training.params, *adam.weights, *adam.ema], before)
    training.step()
    training.check()


# -- schedules --------------------------------------------------------------------------------


def test_schedule_is_asked_for_the_number_of_steps_taken() -> None:
    asked: list[int] = []

    def schedule(iterations: int) -> float:
        asked.append(iterations)
        return 0.5 / (1 + iterations)

    p, q = np.zeros(3), np.zeros(3)
    scheduled, plain = Adam(lr=schedule), Adam(lr=0.5, decay=1.0)
    for _ in range(3):
        scheduled.apply_gradients([(np.ones(3), p)])
        plain.apply_gradients([(np.ones(3), q)])
    assert asked == [0, 1, 2]
    assert {type(i) for i in asked} == {int}
    assert_same_bits(p, q)


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_schedule_may_be_set_at_any_time(name: str) -> None:
    options: dict[str, Any] = {name: halving}
    assert Adam(**options).lr is halving
    training = Training()
    lrs: list[Any] = [halving, 0.5, halving]
    for lr in lrs:
        setattr(training.optimizer, name, lr)
        training.reference.lr = lr
        assert training.optimizer.lr == training.optimizer.learning_rate == lr
        training.step(2)
        training.check()


class Cosine:
    """A schedule as a callable object, as libraries define them."""

    def __call__(self, iterations: Any) -> Any:
        return np.float32(0.5 + 0.5 * math.cos(iterations))


def test_schedule_may_be_any_callable_and_return_any_number() -> None:
    schedules: list[Callable[[int], Any]] = [Cosine(), lambda _: 1, lambda _: np.float64(0.25)]
    for schedule in schedules:
        training = Training(lr=schedule)
        training.reference.lr = lambda i, s=schedule: float(s(i))
        training.step(3)
        training.check()


def test_schedule_is_saved_by_its_name() -> None:
    adam = Adam(lr=halving, decay=0.5)
    config = adam.get_config()
    assert config["lr"] == "helpers:halving"
    again = Adam.from_config(json.loads(json.dumps(config)))
    assert again.lr is halving
    assert again.get_config() == config
    assert "halving" in repr(adam)


def local_schedule() -> Callable[[int], float]:
    def schedule(iterations: int) -> float:
        return 1.0 / (1 + iterations)

    return schedule


@functools.wraps(halving)
def quartering(iterations: int) -> float:
    return halving(2 * iterations)


@pytest.mark.parametrize(
    "schedule",
    [lambda _: 0.5, local_schedule(), Cosine(), quartering],
    ids=["lambda", "local", "instance", "under the name of another"],
)
def test_schedule_without_a_name_works_but_cannot_be_saved(
    schedule: Callable[[int], float],
) -> None:
    adam = Adam(lr=schedule)
    p = np.zeros(2)
    adam.apply_gradients([(np.ones(2), p)])
    assert p[0] < 0
    with pytest.raises(ValueError, match=r"(?s)\blr\b.*Received: "):
        adam.get_config()
    assert repr(schedule) in repr(adam)
    assert adam.lr is schedule


# -- configuration ----------------------------------------------------------------------------

SETTINGS: dict[str, tuple[Any, Any]] = {  # off, on
    "bias_corrected_epsilon": (False, True),
    "amsgrad": (False, True),
    "weight_decay": (None, 0.25),
    "l2": (0.0, 0.25),
    "clipnorm": (None, 0.5),
    "clipnorm_per_tensor": (None, 0.5),
    "clipvalue": (None, 0.5),
    "use_ema": (False, True),
    "ema_momentum": (0.99, 0.5),
    "ema_overwrite_frequency": (None, 3),
    "loss_scale": (None, 8.0),
    "skip_nonfinite": (False, True),
    "gradient_accumulation_steps": (None, 4),
    "zero_grad": (False, True),
    "maximize": (False, True),
    "flush_denormals": (True, False),
}
ALWAYS = {"lr", "beta_1", "beta_2", "decay", "epsilon"}


@pytest.mark.parametrize("name", SETTINGS)
def test_option_that_is_off_is_not_in_the_configuration(name: str) -> None:
    off, on = SETTINGS[name]
    assert getattr(Adam(), name) == off
    assert set(Adam(**{name: off}).get_config()) == ALWAYS
    needed: dict[str, Any] = {"use_ema": True} if name.startswith("ema_") else {}
    adam = Adam(**{name: on}, **needed)
    assert getattr(adam, name) == on
    assert set(adam.get_config()) == ALWAYS | {name, *needed}
    assert adam.get_config()[name] == on
    if name != "use_ema":
        setattr(adam, name, off)
        assert set(adam.get_config()) == ALWAYS | set(needed)


def test_every_option_round_trips_through_json() -> None:
    options = {name: on for name, (_, on) in SETTINGS.items() if name != "clipnorm"}
    for loss_scale in (8.0, "dynamic"):
        options["loss_scale"] = loss_scale
        config = Adam(**options).get_config()
        assert {name: config[name] for name in options} == options
        through_json = json.loads(json.dumps(config))
        assert through_json == config
        assert Adam.from_config(through_json).get_config() == config


def test_configuration_holds_plain_python_values() -> None:
    config = Adam(
        weight_decay=np.float32(0.5),
        ema_overwrite_frequency=np.int64(3),
        gradient_accumulation_steps=np.int32(2),
        loss_scale=np.float64(8),
        use_ema=True,
        clipnorm_per_tensor=np.float32(0.25),
    ).get_config()
    assert {type(x) for x in config.values()} <= {int, float, bool}
    assert type(config["ema_overwrite_frequency"]) is int
    assert type(config["gradient_accumulation_steps"]) is int


def test_dynamic_loss_scale_is_not_a_part_of_the_configuration() -> None:
    adam = Adam(loss_scale="dynamic")
    calls(adam, np.zeros(1), "xxx")
    again = Adam.from_config(adam.get_config())
    assert (again.current_loss_scale, again.skipped_steps) == (2.0**15, 0)


# -- completion and help ----------------------------------------------------------------------


def test_signature_names_every_option_with_its_default() -> None:
    signature = inspect.signature(Adam)
    by_name = dict(signature.parameters)
    kwargs = by_name.pop("kwargs")
    assert kwargs.kind is inspect.Parameter.VAR_KEYWORD
    learning_rate = by_name.pop("learning_rate")
    assert {n: p.default for n, p in by_name.items()} == AdamOptions().as_dict()
    assert learning_rate.default == by_name["lr"].default
    positional = ["lr", "beta_1", "beta_2", "epsilon", "decay"]
    assert list(by_name)[:5] == positional
    for name, parameter in by_name.items():
        by_keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert by_keyword == (name not in positional), name
        assert isinstance(getattr(Adam, name).__doc__, str)


def test_signature_of_the_function_has_the_same_defaults() -> None:
    defaults = AdamOptions().as_dict()
    of_arrays = {"params", "grads", "m", "v", "step", "vhat", "ema", "packed", "low_bits"}
    parameters = inspect.signature(adam_step).parameters
    for name in parameters.keys() - of_arrays:
        assert parameters[name].default == defaults[name], name


@pytest.mark.parametrize("documented", [Adam, adam_step, global_norm], ids=lambda f: f.__name__)
def test_help_reads_in_a_terminal(documented: Any) -> None:
    text = pydoc.plain(pydoc.render_doc(documented))
    assert documented.__name__ + "(" in text
    assert "\\" not in text
    assert ":math:" not in text
    if documented is not global_norm:
        assert "weight_decay: 'float | None' = None" in text


def test_arguments_that_a_subclass_passes_on() -> None:
    class Halved(Adam):
        def __init__(self, lr: float = 1.0, **kwargs: Any) -> None:
            super().__init__(lr / 2, **kwargs)

    adam = Halved(beta_1=0.5, clipnorm=2.0)
    assert (adam.lr, adam.beta_1, adam.clipnorm) == (0.5, 0.5, 2.0)
    with pytest.raises(TypeError, match="lr and learning_rate are the same argument"):
        Halved(learning_rate=0.5)


# -- the learning rate of the next step -------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.5}, {"lr": 0.3, "decay": 0.1}, {"lr": halving}, {"lr": halving, "decay": 0.7}],
    ids=str,
)
def test_current_lr_is_that_of_the_next_step(options: dict[str, Any]) -> None:
    # With betas of 0, no epsilon and gradients of 1, the size of a step is the learning rate.
    adam, p = Adam(**options, beta_1=0.0, beta_2=0.0, epsilon=0.0), np.zeros(1)
    for i in range(4):
        lr = options.get("lr", 0.001)
        expected = oracle.decayed(lr(i) if callable(lr) else lr, options.get("decay", 0.0), i)
        assert adam.current_lr == expected
        before = p.copy()
        adam.apply_gradients([(np.ones(1), p)])
        assert_same_bits(p, before - expected)
    adam.lr = 0.25
    assert adam.current_lr == oracle.decayed(0.25, options.get("decay", 0.0), 4)


def test_current_lr_of_a_schedule_that_has_none() -> None:
    adam = Adam(lr=lambda _: -1.0)
    with pytest.raises(ValueError, match=r"^lr must be finite and >= 0. Received: lr=-1.0$"):
        _ = adam.current_lr


# -- settings fixed once the state exists -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("amsgrad", True),
        ("use_ema", True),
        ("gradient_accumulation_steps", 2),
        ("amsgrad", False),
        ("use_ema", False),
        ("gradient_accumulation_steps", None),
    ],
)
@pytest.mark.parametrize("how", ["build", "step"])
def test_options_that_shape_the_state_cannot_change_once_it_exists(
    name: str, other: Any, how: str
) -> None:
    on = SETTINGS[name][1]
    current = SETTINGS[name][0] if other else on
    training = Training(**{name: current})
    adam = training.optimizer
    setattr(adam, name, other)  # no state yet
    setattr(adam, name, current)
    if how == "build":
        adam.build(training.params)
    else:
        training.step()
    with pytest.raises(ValueError, match=rf"(?s)\b{name}\b.*Received: "):
        setattr(adam, name, other)
    assert getattr(adam, name) == current
    setattr(adam, name, current)
    training.step(2)
    training.check()


def test_counters_cannot_be_assigned() -> None:
    adam = Adam()
    for name in ("skipped_steps", "current_loss_scale", "current_lr", "ema"):
        with pytest.raises(AttributeError):
            setattr(adam, name, 1)


@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_the_loss_scale_and_the_counts(copier: Callable[[Adam], Adam]) -> None:
    adam, p = Adam(loss_scale="dynamic"), np.zeros(1)
    calls(adam, p, "x" + "." * 1998)
    twin = copier(adam)
    assert (twin.iterations, twin.skipped_steps) == (1998, 1)
    assert calls(twin, p.copy(), "...") == calls(adam, p, "...") == [2.0**14, 2.0**15, 2.0**15]


def test_unknown_option_is_still_refused() -> None:
    message = re.escape("Unexpected keyword argument passed to optimizer: ema") + r"\b.*"
    options: dict[str, Any] = {"ema": True}
    with pytest.raises(TypeError, match=f"^{message}$"):
        Adam(**options)
