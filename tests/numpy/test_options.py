# SPDX-License-Identifier: MIT
"""What is particular to each option: when it takes effect, its state from call to call, its forms.

That steps with it equal the oracle is tested in test_numerics.py.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import json
import math
import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from fusedadam import Adam, _core, adam_step
from fusedadam._core import AdamOptions
from helpers import Array, assert_all_same_bits, halving
from training import Training

NAN, INF = float("nan"), float("inf")
TORCH_REASON = "what is said of tensors needs torch"


NAMED: dict[str, Callable[[Array, Array], Any]] = {
    "views": lambda p, q: [p[...], q.reshape(1)],
    "the array and a view": lambda p, q: [p, p[...], q],
    "an iterator": lambda p, q: iter((q, p)),
}


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED)
def test_parameters_that_do_not_decay(named: Callable[[Array, Array], Any]) -> None:
    training = Training(weight_decay=0.5, l2=0.5)
    training.optimizer.build(training.params)
    training.optimizer.exclude_from_weight_decay(named(*training.params[1:3]))
    training.reference.excluded = {1, 2}
    training.step(2)
    training.check()


def test_averages_are_live_begin_as_the_parameters_and_are_swapped_in_place() -> None:
    training = Training(use_ema=True, ema_momentum=0.5, gradient_accumulation_steps=2)
    adam = training.optimizer
    for _ in range(2):
        adam.build(training.params)  # begins averages and means anew
        training.reference.build(training.params)
        ema = adam.ema
        assert_all_same_bits(ema, training.params)
        assert all(average.size == 0 or average.ctypes.data % 64 == 0 for average in ema)
        training.step(5)
    adam.ema.clear()  # the list is the caller's
    for _ in range(3):
        training.check()
        assert_all_same_bits(ema, training.reference.ema)
        adam.swap_ema()
        training.reference.swap_ema()


def test_tensors() -> None:
    torch: Any = pytest.importorskip("torch", reason=TORCH_REASON)
    adam = Adam(lr=0.5, weight_decay=0.5, use_ema=True, loss_scale=8.0)
    params = [torch.ones(3, requires_grad=True), torch.ones(3)]
    adam.exclude_from_weight_decay([params[0]])
    for _ in range(2):
        adam.apply_gradients([(torch.zeros(3), p) for p in params])
    assert [p.tolist() for p in params] == [[1.0] * 3, [0.5625] * 3]
    stale = (params[0] ** 2).sum()
    adam.swap_ema()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    (g,) = torch.autograd.grad(adam.scale_loss((3 * params[0]).sum()), params[0])
    assert g.tolist() == [24.0] * 3
    (own,) = adam.get_gradients((3 * params[0]).sum(), params[:1])
    assert own.tolist() == [3.0] * 3


def test_tensors_as_settings() -> None:
    torch: Any = pytest.importorskip("torch", reason=TORCH_REASON)
    good: dict[str, tuple[Any, Any]] = {
        "lr": (torch.tensor(0.25), 0.25),
        "epsilon": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        "l2": (torch.tensor([2.0]), 2.0),
        "amsgrad": (torch.tensor(True), True),
        "gradient_accumulation_steps": (torch.tensor(2), 2),
    }
    adam = Adam(**{name: tensor for name, (tensor, _) in good.items()})
    assert {name: getattr(adam, name) for name in good} == {
        n: plain for n, (_, plain) in good.items()
    }
    bad: dict[str, list[Any]] = {
        "lr": [True, [0.5, 0.5], 0.5j],
        "gradient_accumulation_steps": [True, 2.0],
        "maximize": [1, [True, False]],
    }
    for name, each in bad.items():
        for value in each:
            with pytest.raises(TypeError, match=f"^{name} must be "):
                setattr(adam, name, torch.tensor(value))


def loss(params: Any) -> Any:
    return sum(anp.sum((p - 0.3) ** 2) for p in params)


@pytest.mark.parametrize(("scale", "factor"), [(None, 1.0), (2, 2.0), ("dynamic", 2.0**15)])
def test_scale_loss(scale: Any, factor: float) -> None:
    adam = Adam(loss_scale=scale)
    assert (adam.loss_scale, adam.current_loss_scale) == (scale, factor)
    assert type(adam.current_loss_scale) is float
    assert adam.scale_loss(0.25) == 0.25 * factor
    assert adam.scale_loss(np.float32(0.25)) == 0.25 * factor
    np.testing.assert_array_equal(adam.scale_loss(np.array([1.0, 2.0])), [factor, 2 * factor])
    params = [np.array([1.0, 2.0])]
    assert adam.scale_loss(loss)(params) == loss(params) * factor
    grads = adam.get_gradients(loss, params)  # scaled and unscaled
    np.testing.assert_allclose(grads, Adam().get_gradients(loss, params))


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
    assert calls(adam, p, "." * 1999 + "x" + "." * 1998)[1998:] == [start / 4, *[start / 8] * 1999]
    for twin in (copy.deepcopy(adam), pickle.loads(pickle.dumps(adam)), adam):
        assert (twin.iterations, twin.skipped_steps) == (5998, 4)
        assert calls(twin, p, "...") == [start / 8, start / 4, start / 4]
    assert calls(adam, p, "x" * 20)[-6:] == [1.0] * 6
    again = Adam.from_config(adam.get_config())  # the scale is no setting
    assert (again.current_loss_scale, again.skipped_steps) == (start, 0)


def test_dynamic_scale_has_a_largest_value() -> None:
    adam, p = Adam(loss_scale="dynamic"), np.zeros(1)
    counts = {**_core.AdamProgress().as_dict(), "dynamic_loss_scale": 2.0**126}
    adam.__setstate__({**adam.__getstate__(), "_progress": _core.AdamProgress(counts)})
    assert calls(adam, p, "." * 4000) == [2.0**126] * 1999 + [2.0**127] * 2001


def test_gradients_of_the_optimizers_own_are_not_zeroed() -> None:
    # autograd may return arrays of the loss itself.
    kept, p = np.array([1.0, -2.0]), np.zeros(2)
    Adam(zero_grad=True).get_updates(lambda params: anp.sum(params[0] * kept), [p])
    np.testing.assert_array_equal(kept, [1.0, -2.0])
    assert p[0] < 0 < p[1]


class Cosine:
    """A schedule as a callable object, as libraries define them."""

    def __call__(self, iterations: Any) -> Any:
        return np.float32(0.5 + 0.5 * math.cos(iterations))


@functools.wraps(halving)
def quartering(iterations: int) -> float:
    return halving(2 * iterations)


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_schedule_may_be_any_callable_set_at_any_time(name: str) -> None:
    asked: list[int] = []

    def schedule(iterations: int) -> float:
        asked.append(iterations)
        return 0.5 / (1 + iterations)

    options: dict[str, Any] = {name: schedule}
    training = Training()
    training.optimizer, training.reference.lr = Adam(**options), lambda i: 0.5 / (1 + i)
    training.step(3)
    assert asked == [0, 1, 2]
    assert {type(i) for i in asked} == {int}
    lrs: list[Any] = [halving, 0.5, Cosine(), lambda _: 1, lambda _: np.float64(0.25)]
    for lr in lrs:
        setattr(training.optimizer, name, lr)
        training.reference.lr = (lambda i, lr=lr: float(lr(i))) if callable(lr) else lr
        assert training.optimizer.lr == training.optimizer.learning_rate == lr
        training.step(2)
        training.check()


def test_schedule_is_saved_by_its_name() -> None:
    config = Adam(lr=halving, decay=0.5).get_config()
    assert config["lr"] == "helpers:halving"
    again = Adam.from_config(json.loads(json.dumps(config)))
    assert again.lr is halving
    assert again.get_config() == config


@pytest.mark.parametrize(
    "schedule",
    [lambda _: 0.5, Cosine(), quartering],
    ids=["lambda", "instance", "under the name of another"],
)
def test_schedule_without_a_name_works_but_cannot_be_saved(schedule: Any) -> None:
    adam, p = Adam(lr=schedule), np.zeros(2)
    adam.apply_gradients([(np.ones(2), p)])
    assert p[0] < 0
    with pytest.raises(ValueError, match=r"(?s)\blr\b.*Received: "):
        adam.get_config()
    assert repr(schedule) in repr(adam)
    assert adam.lr is schedule


@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.3, "decay": 0.1}, {"lr": halving, "decay": 0.7}], ids=str
)
def test_current_lr_is_that_of_the_next_step(options: dict[str, Any]) -> None:
    adam, p = Adam(**options), np.zeros(1)
    for i in range(4):
        lr = options.get("lr", 0.001)
        expected = oracle.decayed(lr(i) if callable(lr) else lr, options.get("decay", 0.0), i)
        assert adam.current_lr == expected
        adam.apply_gradients([(np.ones(1), p)])
    adam.lr = 0.25
    assert adam.current_lr == oracle.decayed(0.25, options.get("decay", 0.0), 4)
    adam.lr = lambda _: -1.0
    with pytest.raises(ValueError, match=r"^lr must be finite and >= 0. Received: lr=-1.0$"):
        _ = adam.current_lr


class Rate(float, enum.Enum):
    QUARTER = 0.25


class Steps(enum.IntEnum):
    TWO = 2


NUMBERS: list[tuple[str, Any, float]] = [
    *(("lr", T(0.25), 0.25) for T in (np.float16, np.float32, np.float64, np.longdouble)),
    *(("lr", 1, 1.0), ("lr", np.int32(1), 1.0), ("lr", 0, 0.0), ("lr", Steps.TWO, 2.0)),
    *(("lr", np.array(0.25), 0.25), ("lr", np.array(0.25, ">f4"), 0.25), ("lr", np.array(2), 2.0)),
    *(("lr", Fraction(1, 4), 0.25), ("lr", Decimal("0.25"), 0.25), ("lr", Rate.QUARTER, 0.25)),
    *((name, np.float32(0.25), 0.25) for name in ("clipnorm", "weight_decay", "clipvalue")),
    *(("beta_1", 0, 0.0), ("beta_2", np.float32(0.75), 0.75), ("epsilon", 0, 0.0)),
    *(("beta_1", 5e-324, 5e-324), ("beta_2", np.nextafter(1, 0), 1 - 2**-53)),
    *(("loss_scale", np.array(8), 8.0), ("loss_scale", np.array(2.0**127, "f4"), 2.0**127)),
    *(("gradient_accumulation_steps", two, 2) for two in (np.int64(2), np.array(2), Steps.TWO)),
    *((name, np.True_, True) for name in ("amsgrad", "zero_grad", "bias_corrected_epsilon")),
    *(("use_ema", np.array(True), True), ("flush_denormals", np.False_, False)),
]


@pytest.mark.parametrize(("name", "value", "plain"), NUMBERS)
def test_kinds_of_numbers(name: str, value: Any, plain: float) -> None:
    made, changed = Adam(**{name: value}), Adam()
    setattr(changed, name, value)
    for optimizer in (made, changed):
        assert getattr(optimizer, name) == optimizer.get_config()[name] == plain
        assert type(getattr(optimizer, name)) is type(plain)
        # JSON takes Python's numbers but not NumPy's.
        assert json.loads(json.dumps(optimizer.get_config())) == optimizer.get_config()


def test_signature_names_every_option_with_its_default() -> None:
    defaults = AdamOptions().as_dict()
    by_name = dict(inspect.signature(Adam).parameters)
    assert by_name.pop("kwargs").kind is inspect.Parameter.VAR_KEYWORD
    assert by_name.pop("learning_rate").default == by_name["lr"].default
    assert {n: p.default for n, p in by_name.items()} == defaults
    positional = ["lr", "beta_1", "beta_2", "epsilon", "decay"]
    assert list(by_name)[:5] == positional
    for name, parameter in by_name.items():
        by_keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert by_keyword == (name not in positional), name
        assert isinstance(getattr(Adam, name).__doc__, str)
    of_arrays = {"params", "grads", "m", "v", "step", "vhat", "ema", "packed", "low_bits"}
    parameters = inspect.signature(adam_step).parameters
    for name in parameters.keys() - of_arrays:
        assert parameters[name].default == defaults[name], name
