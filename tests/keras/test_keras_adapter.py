# SPDX-License-Identifier: MIT
"""The Keras 3 adapter: equal to the oracle to the bit, and to Keras' own optimizers but roundings.

Keras computes lr_t from powers of a rounded beta, which cancel against 1: in float32, that costs up
to 2,000 roundings in the first steps. A mistake is far larger than the tolerance of a thousandth.
"""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
from extremes import column, few, product
from helpers import FLOATS, Array, assert_all_same_bits, running
from keras_adapter import (
    LR,
    ON_JAX,
    Calls,
    Trained,
    adapter,
    array,
    by_kind,
    floatx,
    keras,
    stored_variables,
    tensor,
    variable,
)

# Raised by Keras itself when it converts a variable to an array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CALLS = 11  # two cycles of the longest accumulation, and one call

EVERYTHING: dict[str, Any] = (
    {"amsgrad": True, "weight_decay": 0.1, "global_clipnorm": 0.5, "use_ema": True}
    | {"ema_momentum": 0.9, "ema_overwrite_frequency": 5, "loss_scale_factor": 128.0}
    | {"gradient_accumulation_steps": 3}
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3},
    {"learning_rate": 0.0},
    {"amsgrad": True},
    {"weight_decay": 0.1, "clipnorm": 0.0},
    {"weight_decay": 0.0},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"global_clipnorm": 1e6},
    {"clipvalue": 0.01},
    {"use_ema": True},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 4},
    {"use_ema": True, "ema_momentum": 1.0},
    {"use_ema": True, "ema_momentum": 0.0, "ema_overwrite_frequency": 1},
    {"loss_scale_factor": 256.0},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 5},
    {"loss_scale_factor": 3.0, "global_clipnorm": 0.5},
    {"loss_scale_factor": 3.0, "clipnorm": 0.5, "amsgrad": True},
    {"loss_scale_factor": 3.0, "clipvalue": 0.01, "gradient_accumulation_steps": 3},
    {"gradient_accumulation_steps": 3, "global_clipnorm": 0.5, "weight_decay": 0.1},
    {"gradient_accumulation_steps": 3, "use_ema": True},
    {"gradient_accumulation_steps": 3, "use_ema": True, "ema_overwrite_frequency": 2},
    EVERYTHING,
    {"name": "AdamW"},
    {"name": "AdamW", "weight_decay": 0.3, "clipnorm": 0.5, "use_ema": True},
]
# With and without averages and accumulation, which the package and Keras share between them.
SHARED: list[dict[str, Any]] = [
    {},
    {"global_clipnorm": 0.5, "weight_decay": 0.1},
    {"use_ema": True, "ema_overwrite_frequency": 4},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3, "use_ema": True},
]


@pytest.fixture(params=FLOATS)
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """The dtype of the variables and of Keras' own computations."""
    with floatx(request.param):
        yield request.param


def near(actual: Sequence[Any], expected: Sequence[Any], what: str = "") -> None:
    """Compare with Keras, to a thousandth of an update or of the value."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        atol = 1e-3 * LR * max(1, np.max(np.abs(b), initial=0, where=np.isfinite(b)))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol, err_msg=f"{what}[{i}]")


class Beside(Trained):
    """The same variables stepped by Keras, by this package and by the oracle."""

    def __init__(self, dtype: str = "float32", name: str = "Adam", **options: Any) -> None:
        super().__init__(dtype, name, **options)
        self.theirs = getattr(keras.optimizers, name)(**self.options)
        starts = self.reference.params
        self.their_variables = [variable(p, name=f"v{i}") for i, p in enumerate(starts)]
        # JAX compiles Keras' accumulation again at each call of its own.
        compiled = ON_JAX and bool(options.get("gradient_accumulation_steps"))
        self.their_apply = Calls(self.theirs, self.their_variables, compiled=compiled)
        self.sides = [(self.theirs, self.their_variables), (self.optimizer, self.variables)]

    def call(self, grads: Sequence[Any], count: int | None = None) -> None:
        if not self.theirs.built:
            self.theirs.build(self.their_variables)
        tensors = self.tensors(grads)[:count]
        if self.their_apply.compiled:
            tensors += [None] * (len(grads) - len(tensors))
        self.their_apply(tensors)
        steps = self.theirs.gradient_accumulation_steps
        if ON_JAX and steps and int(self.theirs._iterations) % steps == 0:
            # On other backends, Keras resets also those of variables that now lack a gradient.
            self.theirs._backend_reset_gradient_accumulators()
        super().call(grads, count)

    def check(self) -> None:
        super().check()
        self.check_keras()

    def check_keras(self) -> None:
        theirs, ours = (by_kind(*side) for side in self.sides)
        paths = [[v.path for v in stored_variables(optimizer)] for optimizer, _ in self.sides]
        assert paths[0] == paths[1]
        assert int(self.optimizer.iterations) == int(self.theirs.iterations)
        assert float(self.optimizer.learning_rate) == float(self.theirs.learning_rate)
        for kind, arrays in theirs.items():
            near(ours[kind], arrays, kind)

    def set(self, **settings: Any) -> None:
        self.places.clear()  # without a memory for gradients that are scaled
        for optimizer, _ in self.sides:
            for name, value in settings.items():
                setattr(optimizer, name, value)


# -- the options ------------------------------------------------------------------------------


# JAX takes long to compile all.
ROWS = [(d, o) for d in FLOATS for o in OPTIONS if not ON_JAX or d == "float32" or o is EVERYTHING]


@pytest.mark.parametrize(("dtype", "options"), ROWS, ids=str, indirect=["dtype"])
def test_options_mean_the_same(dtype: str, options: dict[str, Any]) -> None:
    Beside(dtype, **options).train(CALLS)


@pytest.mark.parametrize(("how", "after"), [("var_list", 0), ("var_names", 3)])
def test_excluded_from_weight_decay(how: str, after: int) -> None:
    beside = Beside(name="AdamW", weight_decay=0.5)
    beside.train(after)
    for optimizer, variables in beside.sides:
        excluded = [variables[0], variables[2]] if how == "var_list" else ["v0", "v2"]
        optimizer.exclude_from_weight_decay(**{how: excluded})
    beside.reference.excluded = {0, 2}
    beside.train(3)


def test_settings_changed_between_steps(dtype: str) -> None:
    beside = Beside(dtype, clipnorm=0.5)
    for settings in (
        {"learning_rate": LR / 2},
        {"clipnorm": None, "clipvalue": 0.01},
        {"clipvalue": -1.0, "weight_decay": 0.1},
        {"beta_1": 0.5, "beta_2": 0.75, "epsilon": 1e-4},
        {"loss_scale_factor": 4.0},
        {},
    ):
        beside.train(2)
        beside.set(**settings)


def test_amsgrad_switched_off() -> None:
    beside = Beside(amsgrad=True)
    beside.train(3)
    beside.set(amsgrad=False)
    beside.reference.vhat = []
    frozen = by_kind(*beside.sides[1])["velocity_hat"]
    beside.train(1)
    assert_all_same_bits(by_kind(*beside.sides[1])["velocity_hat"], frozen)


@pytest.mark.parametrize("accumulate", [None, 3])
def test_schedule(accumulate: int | None) -> None:
    # Schedules count calls, including those that only accumulate.
    schedule = keras.optimizers.schedules.ExponentialDecay(0.25, 4, 0.5, staircase=True)
    beside = Beside(learning_rate=schedule, gradient_accumulation_steps=accumulate)
    beside.train(CALLS)
    assert float(beside.optimizer.learning_rate) == 0.25 * 0.5 ** (CALLS // 4)


def test_learning_rate_of_a_function() -> None:
    results = []
    for rate in (LR, lambda: LR, lambda: np.float32(LR)):
        variables = [variable(np.ones(3, "float32"))]
        optimizer = adapter.Adam(rate)
        optimizer.apply([tensor(np.ones(3, "float32"))], variables)
        results.append(array(variables[0]))
    assert_all_same_bits(results[1:], results[:1] * 2)


# -- unusual calls ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("options", SHARED, ids=str)
def test_gradients_that_do_not_exist(options: dict[str, Any]) -> None:
    beside = Beside(**options)
    kept = itertools.cycle([(1, 0, 1, 1, 0), (0, 1, 1, 0, 1), (0, 1, 0, 0, 0)])

    def some() -> list[Any]:
        return [g if k else None for g, k in zip(beside.gradients(), next(kept), strict=True)]

    beside.train(CALLS, some)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("options", SHARED, ids=str)
def test_some_of_the_variables(options: dict[str, Any]) -> None:
    beside = Beside(**options)
    for count in (4, 2, 2, 4, 1, 3, 4, 4):
        beside.call(beside.gradients(), count)
        beside.check()


# On JAX, Keras cannot overwrite by averages then.
@pytest.mark.parametrize(
    "options", [o for o in SHARED if not (ON_JAX and "ema_overwrite_frequency" in o)], ids=str
)
def test_variables_overwritten_with_gradients(options: dict[str, Any]) -> None:
    beside = Beside(**options)
    beside.is_exact = False
    for _, variables in beside.sides:
        variables[1].overwrite_with_gradient = True
    beside.train(7)
    assert_all_same_bits([array(beside.variables[1])], [array(beside.their_variables[1])])


def test_calls_without_variables() -> None:
    beside = Beside()
    beside.train(1)
    ours, variables = beside.sides[1]
    ours.apply([], variables)
    own = list(ours.variables)
    ours.build(variables)
    assert all(a is b for a, b in zip(ours.variables, own, strict=True))
    # It steps those that it was built with.
    grads = beside.gradients()
    beside.theirs.apply(beside.tensors(grads), beside.their_variables)
    ours.apply(beside.tensors(grads))
    beside.check_keras()


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, np.nan),
        ({"clipvalue": 0.5}, np.inf),
        ({"clipnorm": 0.5}, np.nan),
        ({"clipnorm": 0.5}, -np.inf),
        ({"global_clipnorm": 0.5}, np.inf),
        ({"global_clipnorm": 0.5, "loss_scale_factor": 4.0, "use_ema": True}, np.nan),
        ({"clipnorm": 1e6, "loss_scale_factor": 4.0}, np.inf),
        ({"clipnorm": 0.5, "gradient_accumulation_steps": 2, "weight_decay": 0.1}, np.inf),
    ],
    ids=str,
)
def test_gradients_that_are_not_finite(options: dict[str, Any], value: float) -> None:
    # A norm of NaN turns everything that it clips into NaN.
    beside = Beside(**options)
    beside.train(4)
    grads = beside.gradients()
    grads[0][1, 1] = value
    with np.errstate(all="ignore"):
        for _ in range(2):
            beside.call(grads)
        theirs, ours = (by_kind(*side) for side in beside.sides)
    finite = all(np.all(np.isfinite(p)) for p in theirs["v"] + theirs["momentum"])
    assert finite == ("clipvalue" in options)
    # On this backend, Keras resets accumulators by multiplying with 0, which keeps NaN.
    assert not any(np.any(a) for a in ours.pop("gradient_accumulator"))
    for kind, arrays in ours.items():
        near(arrays, theirs[kind], kind)
    assert int(beside.optimizer._iterations) == 6


# XLA multiplies by the inverse, and flushes subnormal numbers.
@pytest.mark.parametrize(
    "scale", [2.0**126, 2.0**-126] if ON_JAX else [2.0**127, 3e38, 2.0**-127, 2.0**-140]
)
def test_loss_scale_of_any_float32(dtype: str, scale: float) -> None:
    beside = Beside(dtype, loss_scale_factor=scale, clipnorm=0.5, amsgrad=True)
    for _ in range(3):
        # A few binary orders of magnitude below 1, so that the scaled gradients are finite.
        grads = [np.sign(g) * np.minimum(np.abs(g), 1) * scale for g in beside.gradients()]
        beside.call([np.asarray(g, dtype) for g in grads])
        beside.check_keras()


# -- how a step is carried out ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True, "weight_decay": 0.1, "clipnorm": 0.5, "loss_scale_factor": 4.0},
        {"use_ema": True, "ema_overwrite_frequency": 2, "global_clipnorm": 0.5},
        {"gradient_accumulation_steps": 3, "clipvalue": 0.5, "loss_scale_factor": 4.0},
    ],
    ids=str,
)
def test_one_call_and_none_of_keras_arithmetic(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in (
        *("update_step", "_clip_gradients", "_apply_weight_decay"),
        *("_update_model_variables_moving_average", "_backend_increment_gradient_accumulators"),
        "_overwrite_model_variables_with_average_value",
    ):
        monkeypatch.setattr(adapter.Adam, name, refuse)
    # On JAX, the program of all steps has one call.
    name, calls = ("xla.step", 1) if ON_JAX else ("_core.TensorPlan.step", 6)
    step = pkgutil.resolve_name(f"fusedadam.{name}")
    counted = mock.Mock()
    monkeypatch.setattr(f"fusedadam.{name}", lambda *args, **kw: (counted(), step(*args, **kw))[1])
    trained = Trained(**options)
    trained.optimizer.exclude_from_weight_decay(var_names=["v1"])
    trained.reference.excluded = {1}
    trained.train(6)
    assert counted.call_count == calls


def test_stateless() -> None:
    # Like Keras' own, it updates only the tensors that it is given.
    beside = Beside(use_ema=True, weight_decay=0.1)
    beside.train(3)
    grads = beside.tensors(beside.gradients())
    results = []
    for optimizer, variables in beside.sides:
        every = stored_variables(optimizer)
        state, given = ([tensor(array(v)) for v in each] for each in (every, variables))
        state += [v.value for v in optimizer.variables[len(every) :]]
        params, state = optimizer.stateless_apply(state, grads, given)
        results.append([array(x) for x in (*params, *state[: len(every)])])
    near(results[1], results[0])
    beside.check()
    beside.train(2)


# -- extreme floats, and counts near the limit of Keras' 32-bit counter -----------------------


def started(trained: Trained, count: int, **state: Array) -> Trained:
    """Set the state of the only variable, and the count."""
    trained.optimizer.build(trained.variables)
    trained.optimizer._iterations.assign(count)
    trained.reference.set_count(count)
    names = {"m": "_momentums", "v": "_velocities", "vhat": "_velocity_hats"}
    for kind, value in state.items():
        getattr(trained.optimizer, names[kind])[0].assign(value)
        setattr(trained.reference, kind, [value])
    return trained


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"epsilon": 0.0}, {"amsgrad": True}, {"weight_decay": 0.1}, {"clipvalue": 1.0}),
        {"loss_scale_factor": 2.0**20},
    ],
    ids=str,
)
def test_special_numbers(dtype: str, options: dict[str, Any], isa: str) -> None:
    numbers = few(dtype)
    p, g, m, v = product([numbers] * 4)
    vhat = {"vhat": column(numbers, [1, 1, 1, 1], 0, 4)} if options.get("amsgrad") else {}
    with running(isa=isa), floatx(dtype), np.errstate(all="ignore"):
        trained = started(Trained(dtype, starts=[p], **options), 3, m=m, v=v, **vhat)
        trained.call([g])
        trained.check()


def test_count_ends_with_32_bits() -> None:
    # Keras' own step turns all parameters into NaN here, because its count becomes negative.
    starts = [np.array([1.0, -2.0], np.float32)]
    trained = started(Trained(starts=starts, beta_2=1 - 2.0**-20), 2**31 - 3)
    trained.train(3)
    assert int(trained.optimizer.iterations) == -(2**31)
    message = r"^iterations must be >= 0 and <= 2\*\*53\. Received: iterations="
    if ON_JAX:
        message = "count must be >= 0. Received: "
    with pytest.raises((ValueError, RuntimeError), match=f"{message}-2147483648"):
        trained.optimizer.apply([tensor(np.ones(2, np.float32))], trained.variables)
    trained.check()


# -- storage in fewer bits --------------------------------------------------------------------

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bfloat16", {}),
    "bf16, nearest": ("bfloat16", {"rounding": "nearest"}),
    "bf16, float32 moments": ("bfloat16", {"moments": "float32", "low_bits": "int16"}),
    "7 bytes": ("bfloat16", {"moments": "packed", "low_bits": "int8", "seed": 3}),
    "f16": ("float16", {"moments": "packed"}),
    "f32, packed": ("float32", {"moments": "packed"}),
}
formats = pytest.mark.parametrize(("dtype", "stored"), FORMATS.values(), ids=FORMATS)


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"weight_decay": 0.1}, {"global_clipnorm": 0.1}),
        {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 2},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
@formats
def test_storage(dtype: str, stored: dict[str, Any], options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    starts = [rng.standard_normal(shape).astype("float32") for shape in ((70,), (3, 5))]
    trained = Trained(dtype, starts=starts, epsilon=1e-7, **stored, **options)
    trained.train(4, lambda: [rng.standard_normal(p.shape) for p in starts])


@formats
def test_norm_of_stored_variables_that_is_not_finite(dtype: str, stored: dict[str, Any]) -> None:
    trained = Trained(dtype, starts=[np.ones(4, "float32")], global_clipnorm=1.0, **stored)
    trained.call([np.array([1.0, np.inf, 1.0, 1.0])])
    # The other gradients become 0, and inf * 0 is NaN. On JAX all become NaN, as in Keras.
    after = array(trained.variables[0]).astype("float32")
    np.testing.assert_array_equal(after[::2], np.nan if ON_JAX else 1)
    assert np.isnan(after[1])
    assert int(trained.optimizer.iterations) == 1
