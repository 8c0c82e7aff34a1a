# SPDX-License-Identifier: MIT
"""The Keras 3 adapter beside Keras' own optimizers: same gradients, all variables compared.

The tolerance is derived step by step (`rounding.py`, and `Bounds` here).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import FLOATS, Array, values
from interrupts import interrupted
from rounding import Divergence

os.environ.setdefault("KERAS_BACKEND", "torch")
torch: Any = pytest.importorskip("torch")
keras: Any = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras runs on another backend: KERAS_BACKEND=torch", allow_module_level=True)

import fusedadam.keras

# Raised by Keras itself when it converts a variable to an array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPES: list[tuple[int, ...]] = [(6, 4), (4,), (), (0, 3), (3, 5)]
CALLS = 36
# Exact in float32, so that it is the same in both precisions.
LR = 2.0**-7

OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3},
    {"learning_rate": 0.0},
    {"amsgrad": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.0},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"global_clipnorm": 1e6},
    {"clipvalue": 0.01},
    {"clipnorm": 0.0, "weight_decay": 0.1},
    {"use_ema": True},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 4},
    {"use_ema": True, "ema_momentum": 1.0},
    {"use_ema": True, "ema_momentum": 0.0, "ema_overwrite_frequency": 1},
    {"loss_scale_factor": 256.0},
    {"loss_scale_factor": 3.0},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 5},
    # Combinations.
    {"loss_scale_factor": 3.0, "global_clipnorm": 0.5},
    {"loss_scale_factor": 3.0, "clipnorm": 0.5, "amsgrad": True},
    {"loss_scale_factor": 3.0, "clipvalue": 0.01, "gradient_accumulation_steps": 3},
    {"gradient_accumulation_steps": 3, "global_clipnorm": 0.5, "weight_decay": 0.1},
    {"gradient_accumulation_steps": 3, "use_ema": True},
    {"gradient_accumulation_steps": 3, "use_ema": True, "ema_overwrite_frequency": 2},
    {
        "amsgrad": True,
        "weight_decay": 0.1,
        "global_clipnorm": 0.5,
        "use_ema": True,
        "ema_momentum": 0.9,
        "ema_overwrite_frequency": 5,
        "loss_scale_factor": 128.0,
        "gradient_accumulation_steps": 3,
    },
]


@pytest.fixture(params=FLOATS)
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """The dtype of the variables and of Keras' own computations."""
    before = keras.config.floatx()
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx(before)


class Bounds(Divergence):
    """Bounds on the difference from Keras' own formula on its torch backend."""

    def __init__(self, p: Array) -> None:
        super().__init__(p)
        # Positive before the first step, too.
        self.p, self.m, self.v = (np.full(p.shape, self._tiny) for _ in range(3))
        self.ema = self.p.copy()

    def decay(self, p: Array) -> None:
        """Follow ``p (1 - wd lr)`` beside ``p - (lr wd) p``: five roundings at most."""
        self.p = self.p + 6 * self._u * np.abs(np.asarray(p, np.float64))

    def average(self, p: Array, ema: Array, momentum: float) -> None:
        """Follow the average. 1 - momentum is rounded differently too, which costs u in all."""
        p, ema = (np.abs(np.asarray(x, np.float64)) for x in (p, ema))
        self.ema = momentum * self.ema + (1 - momentum) * self.p + 6 * self._u * (p + ema)

    def lr_t_error(self, t: int, beta_1: float, beta_2: float) -> float:
        """Return the error of Keras' lr_t, whose powers of a rounded beta cancel against 1."""
        u = self._u

        def error(beta: float) -> float:
            return ((t + 4) * u * beta**t + u) / (1 - beta**t)

        return error(beta_1) + error(beta_2) / 2 + 6 * u


def near(actual: Any, expected: Any, what: str = "") -> None:
    """Compare values that no `Bounds` cover, to a thousandth of an update.

    In float32, that is about five times the error of Keras' lr_t in its first steps, where powers
    of beta_2 cancel against 1 (`Bounds.lr_t_error`).
    """
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * LR, err_msg=what)


class Beside:
    """The same variables stepped by Keras and by this package, with bounds on their difference."""

    def __init__(self, dtype: str, name: str = "Adam", **options: Any) -> None:
        self.dtype = dtype
        self.rng = np.random.default_rng(7)
        self.options = {"learning_rate": LR} | options
        starts = [values(self.rng, shape, dtype) for shape in SHAPES]
        classes = getattr(keras.optimizers, name), getattr(fusedadam.keras, name)
        self.optimizers = [c(**self.options, name="adam") for c in classes]
        self.variables: list[list[Any]] = [
            [variable(p, name=f"v{i}") for i, p in enumerate(starts)] for _ in classes
        ]
        self.bounds = [Bounds(p) for p in starts]
        self.sums = [np.zeros(p.shape) for p in starts]
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        """Return a setting, or the attribute with which Keras' optimizer replaces it."""
        return getattr(self.optimizers[0], name)

    def gradients(self) -> list[Any]:
        return [values(self.rng, shape, self.dtype) for shape in SHAPES]

    def train(self, calls: int, gradients: Callable[[], list[Any]] | None = None) -> None:
        for _ in range(calls):
            self.call((gradients or self.gradients)())
            self.check()

    def call(self, grads: Sequence[Any], count: int = len(SHAPES)) -> None:
        """Call both with the first `count` variables. A gradient may be None."""
        theirs = self.optimizers[0]
        if not theirs.built:
            for optimizer, variables in zip(self.optimizers, self.variables, strict=True):
                optimizer.build(variables)
        before = self.arrays(0)
        lr = float(theirs.learning_rate)
        for optimizer, variables in zip(self.optimizers, self.variables, strict=True):
            tensors = [None if g is None else torch.from_numpy(np.array(g)) for g in grads]
            optimizer.apply(tensors[:count], variables[:count])
        self._follow(grads[:count], before, self.arrays(0), lr)
        self.calls += 1

    def _follow(
        self,
        grads: Sequence[Any],
        before: dict[str, list[Array]],
        after: dict[str, list[Array]],
        lr: float,
    ) -> None:
        cycle = self.gradient_accumulation_steps or 1
        iterations, accumulated = divmod(self.calls, cycle)
        stepped = [i for i, g in enumerate(grads) if g is not None]
        for i in stepped:
            self.sums[i] = self.sums[i] + np.asarray(grads[i], np.float64)
        if accumulated + 1 == cycle:
            clipped = oracle.clip(
                [self.sums[i] for i in stepped],
                clipnorm=self.global_clipnorm,
                clipnorm_per_tensor=self.clipnorm,
                clipvalue=max(self.clipvalue or 0, 0),
                divisor=(self.loss_scale_factor or 1) * cycle,
            )
            for i, g in zip(stepped, clipped, strict=True):
                self._follow_one(i, g, before, after, iterations + 1, lr)
            self.sums = [np.zeros_like(s) for s in self.sums]
        if self.use_ema:
            momentum = self.ema_momentum if iterations else 0.0
            overwrite = self.ema_overwrite_frequency
            for i, bounds in enumerate(self.bounds):
                bounds.average(before["v"][i], before["average"][i], momentum)
                if overwrite and (iterations + 1) % overwrite == 0:
                    bounds.p = bounds.ema.copy()

    def _follow_one(
        self,
        i: int,
        g: Array,
        before: dict[str, list[Array]],
        after: dict[str, list[Array]],
        t: int,
        lr: float,
    ) -> None:
        bounds = self.bounds[i]
        # Keras divides by the loss scale and the count directly, this package by a factor.
        g_error = 8 * unit_roundoff(self.dtype) * np.abs(g)
        if self.clipnorm or self.global_clipnorm:
            # Keras sums the squares in the gradients' own precision (float64 here). On this backend
            # the norm passes through float32 even for float64 gradients.
            elements = sum(int(np.prod(shape)) for shape in SHAPES)
            g_error = g_error + (elements + 8) * unit_roundoff("float32") * np.abs(g)
        if self.weight_decay:
            bounds.decay(before["v"][i])
        bounds.step(
            (before["momentum"][i], before["velocity"][i]),
            (
                after["v"][i],
                after["momentum"][i],
                after["velocity_hat" if self.amsgrad else "velocity"][i],
            ),
            g,
            lr_t=oracle.lr_t(lr, self.beta_1, self.beta_2, t),
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            lr_t_error=bounds.lr_t_error(t, self.beta_1, self.beta_2),
            g_error=g_error,
        )

    def arrays(self, side: int) -> dict[str, list[Array]]:
        """All variables by kind. "v" holds those of the model."""
        optimizer, variables = self.optimizers[side], self.variables[side]
        kinds = {
            "momentum": optimizer._momentums,
            "velocity": optimizer._velocities,
            "velocity_hat": optimizer._velocity_hats if optimizer.amsgrad else [],
            "average": optimizer._model_variables_moving_average if optimizer.use_ema else [],
            "gradient_accumulator": (
                optimizer._accumulated_gradients if optimizer.gradient_accumulation_steps else []
            ),
        }
        arrays = {k: [array(v) for v in variables] for k, variables in kinds.items()}
        others = {v.name for v in optimizer.variables} & {"iteration", "learning_rate"}
        assert len(others) + sum(map(len, arrays.values())) == len(optimizer.variables)
        return {"v": [array(v) for v in variables]} | arrays

    def check(self) -> None:
        theirs, ours = self.optimizers
        assert [v.path for v in ours.variables] == [v.path for v in theirs.variables]
        assert int(ours.iterations) == int(theirs.iterations)
        assert float(ours.learning_rate) == float(theirs.learning_rate)
        a, b = self.arrays(1), self.arrays(0)
        for i, bounds in enumerate(self.bounds):
            what = f"call {self.calls}, variable {i}"
            x, y = ((s["v"][i], s["momentum"][i], s["velocity"][i]) for s in (a, b))
            bounds.check(x, y, what)
            if theirs.amsgrad:
                within(bounds.v, a["velocity_hat"][i], b["velocity_hat"][i], f"{what}: vhat")
            if theirs.use_ema:
                within(bounds.ema, a["average"][i], b["average"][i], f"{what}: average")
        for mine, its in zip(a["gradient_accumulator"], b["gradient_accumulator"], strict=True):
            np.testing.assert_array_equal(mine, its)


def variable(start: Array, **settings: Any) -> Any:
    """A variable with these values, the first shape of SHAPES in another memory layout.

    keras.initializers.Orthogonal makes such variables.
    """
    tensor = torch.empty(start.shape, dtype=getattr(torch, str(start.dtype)))
    if start.shape == SHAPES[0]:
        tensor = tensor.t().contiguous().t()
    made = keras.Variable(tensor.copy_(torch.from_numpy(start)), **settings)
    assert made._value.is_contiguous() == (start.shape != SHAPES[0])
    return made


def array(variable: Any) -> Array:
    """A copy of a variable's value."""
    return np.array(variable._value.detach().numpy())


def unit_roundoff(dtype: str) -> float:
    return float(np.finfo(dtype).eps) / 2


def within(bound: Array, a: Array, b: Array, what: str) -> None:
    error = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    worst = float(np.max(error / bound, initial=0.0))
    assert worst <= 1, f"{what} differs by {worst:.3g} times the bound"


# -- the options ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_mean_the_same(dtype: str, options: dict[str, Any]) -> None:
    Beside(dtype, **options).train(CALLS)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.3, "clipnorm": 0.5, "use_ema": True}], ids=str
)
def test_adamw(dtype: str, options: dict[str, Any]) -> None:
    beside = Beside(dtype, "AdamW", **options)
    assert beside.optimizers[1].weight_decay == options.get("weight_decay", 0.004)
    beside.train(CALLS)


@pytest.mark.parametrize("how", ["var_list", "var_names"])
@pytest.mark.parametrize("after", [0, 5])
def test_excluded_from_weight_decay(dtype: str, how: str, after: int) -> None:
    beside = Beside(dtype, "AdamW", weight_decay=0.5)
    beside.train(after)
    for optimizer, variables in zip(beside.optimizers, beside.variables, strict=True):
        excluded = [variables[0], variables[2]] if how == "var_list" else ["v0", "v2"]
        optimizer.exclude_from_weight_decay(**{how: excluded})
    still = [array(v) for v in beside.variables[1]]
    nothing = [np.zeros(shape, dtype) for shape in SHAPES]
    if not after:
        beside.call(nothing)
        moved = [
            bool(np.any(array(v) != s)) for v, s in zip(beside.variables[1], still, strict=True)
        ]
        assert moved == [False, True, False, False, True]
    beside.train(CALLS)


def test_settings_changed_between_steps(dtype: str) -> None:
    beside = Beside(dtype, clipnorm=0.5)
    for settings in (
        {"learning_rate": LR / 2},
        {"clipnorm": None, "clipvalue": 0.01},
        {"clipvalue": -1.0, "weight_decay": 0.1},
        {"beta_1": 0.5, "beta_2": 0.75, "epsilon": 1e-4},
        {"loss_scale_factor": 4.0},
    ):
        beside.train(3)
        for optimizer in beside.optimizers:
            for name, value in settings.items():
                setattr(optimizer, name, value)
    beside.train(3)


def test_interrupt_leaves_the_scale_of_losses_as_it_was(dtype: str) -> None:
    variable = keras.Variable(np.ones(3), dtype=dtype)
    optimizer = fusedadam.keras.Adam(loss_scale_factor=4.0)
    gradient = torch.ones(3, dtype=variable.value.dtype)
    optimizer.apply([gradient], [variable])
    # An interrupt while Keras enters a name scope leaves the scope entered.
    not_within = tuple(
        str(Path(path).parent) for path in (torch.__file__, keras.src.backend.__file__)
    )
    seen: set[Any] = set()
    while interrupted(lambda: optimizer.apply([gradient], [variable]), seen, 1, not_within):
        assert optimizer.loss_scale_factor == 4.0
        assert optimizer._prepared.loss_scale is None
    assert len(seen) > 50


def test_amsgrad_switched_off(dtype: str) -> None:
    beside = Beside(dtype, amsgrad=True)
    beside.train(3)
    grads = [torch.from_numpy(g) for g in beside.gradients()]
    for optimizer, variables in zip(beside.optimizers, beside.variables, strict=True):
        optimizer.amsgrad = False
        optimizer.apply(grads, variables)
    for x, y in zip(*beside.variables, strict=True):
        near(array(y), array(x))


def test_no_epsilon_and_a_subnormal_moment(dtype: str) -> None:
    # v is at least about 4,000 times the smallest subnormal number.
    g = {"float32": 1e-19, "float64": 1e-155}[dtype]
    moved = []
    for classes in (keras.optimizers, fusedadam.keras):
        p = keras.Variable(np.zeros(3, dtype))
        classes.Adam(learning_rate=LR, epsilon=0.0).apply([torch.full_like(p._value, g)], [p])
        moved.append(array(p))
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-3)


# -- learning rates ---------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [None, 3])
def test_schedule(dtype: str, accumulate: int | None) -> None:
    # Schedules count calls, including those that only accumulate.
    schedule = keras.optimizers.schedules.ExponentialDecay(0.25, 4, 0.5, staircase=True)
    beside = Beside(dtype, learning_rate=schedule, gradient_accumulation_steps=accumulate)
    beside.train(CALLS)
    assert float(beside.optimizers[1].learning_rate) == 0.25 * 0.5 ** (CALLS // 4)


def test_learning_rate_of_no_arguments(dtype: str) -> None:
    rates = {"now": 0.5}
    beside = Beside(dtype, learning_rate=lambda: rates["now"], weight_decay=0.1)
    beside.train(3)
    rates["now"] = 0.125
    beside.train(3)


# -- unusual calls ----------------------------------------------------------------------------

NEITHER_ALL = [
    {},
    {"global_clipnorm": 0.5, "weight_decay": 0.1},
    {"use_ema": True, "ema_overwrite_frequency": 4},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3, "use_ema": True},
]


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("options", NEITHER_ALL, ids=str)
def test_gradients_that_do_not_exist(dtype: str, options: dict[str, Any]) -> None:
    beside = Beside(dtype, **options)

    def some() -> list[Any]:
        grads = beside.gradients()
        keep = beside.rng.random(len(grads)) < 0.6
        keep[beside.rng.integers(len(grads))] = True
        return [g if k else None for g, k in zip(grads, keep, strict=True)]

    beside.train(CALLS, some)


def test_no_gradient_at_all(dtype: str) -> None:
    beside = Beside(dtype)
    beside.train(1)
    ours, variables = beside.optimizers[1], beside.variables[1]
    with pytest.raises(ValueError, match="No gradients provided"):
        ours.apply([None] * len(variables), variables)
    ours.apply([], variables)
    assert int(ours.iterations) == 1
    beside.train(3)


@pytest.mark.parametrize("options", NEITHER_ALL, ids=str)
def test_some_of_the_variables(dtype: str, options: dict[str, Any]) -> None:
    beside = Beside(dtype, **options)
    for count in (4, 2, 2, 4, 1, 3, 4, 4):
        beside.call(beside.gradients(), count)
        beside.check()


def test_gradients_for_the_variables_that_it_was_built_with(dtype: str) -> None:
    beside = Beside(dtype)
    beside.train(1)
    grads = beside.gradients()
    for optimizer in beside.optimizers:
        optimizer.apply([torch.from_numpy(np.array(g)) for g in grads])
    assert int(beside.optimizers[1].iterations) == 2
    for x, y in zip(*(beside.arrays(side)["momentum"] for side in (0, 1)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_unknown_variable(dtype: str) -> None:
    beside = Beside(dtype)
    beside.train(1)
    with pytest.raises(ValueError, match="Unknown variable"):
        beside.optimizers[1].apply([torch.ones(1)], [keras.Variable([1.0])])


@pytest.mark.parametrize("options", NEITHER_ALL, ids=str)
def test_constraints(dtype: str, options: dict[str, Any]) -> None:
    beside = Beside(dtype, **options)
    for variables in beside.variables:
        variables[0].constraint = keras.constraints.NonNeg()
    # Now the steps are large enough to matter.
    for optimizer in beside.optimizers:
        optimizer.learning_rate = 1.0
    beside.train(CALLS)
    assert np.count_nonzero(array(beside.variables[1][0]) == 0) > 3


@pytest.mark.parametrize("options", NEITHER_ALL, ids=str)
def test_variables_overwritten_with_gradients(dtype: str, options: dict[str, Any]) -> None:
    sides = []
    for classes in (keras.optimizers, fusedadam.keras):
        rng = np.random.default_rng(3)
        variables = [variable(values(rng, s, dtype)) for s in SHAPES]
        variables[1].overwrite_with_gradient = True
        optimizer = classes.Adam(learning_rate=LR, **options)
        for _ in range(7):
            grads = [torch.from_numpy(values(rng, s, dtype)) for s in SHAPES]
            optimizer.apply(grads, variables)
        sides.append([array(v) for v in variables + optimizer.variables])
    for x, y in zip(*sides, strict=True):
        near(x, y)
    np.testing.assert_array_equal(sides[0][1], sides[1][1])


def test_state_set_in_between(dtype: str) -> None:
    beside = Beside(dtype, amsgrad=True, use_ema=True)
    beside.train(5)
    bounds = beside.bounds
    for optimizer, variables in zip(beside.optimizers, beside.variables, strict=True):
        source = beside.optimizers[0]
        optimizer.set_weights([array(v) for v in source.variables])
        for mine, given in zip(variables, beside.variables[0], strict=True):
            mine.assign(array(given))
        optimizer._iterations.assign(40)
    beside.calls = 40
    beside.bounds = [Bounds(array(v)) for v in beside.variables[0]]
    beside.train(5)
    assert all(np.all(new.p <= old.p) for new, old in zip(beside.bounds, bounds, strict=True))


# -- nonfinite gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipvalue": 0.5},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"global_clipnorm": 0.5, "loss_scale_factor": 4.0, "use_ema": True},
        {"clipnorm": 1e6, "loss_scale_factor": 4.0},
        {"clipnorm": 0.5, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_gradients_that_are_not_finite(dtype: str, options: dict[str, Any], value: float) -> None:
    # A norm of NaN turns everything that it clips into NaN.
    beside = Beside(dtype, **options)
    beside.train(4)
    grads = beside.gradients()
    grads[0][1, 1] = value
    with np.errstate(all="ignore"):
        for optimizer, variables in zip(beside.optimizers, beside.variables, strict=True):
            for _ in range(2):
                optimizer.apply([torch.from_numpy(np.array(g)) for g in grads], variables)
        theirs, ours = beside.arrays(0), beside.arrays(1)
    assert (
        any(not np.all(np.isfinite(p)) for p in theirs["v"] + theirs["momentum"])
        or "clipvalue" in options
    )
    # On this backend, Keras resets accumulators by multiplying with 0, which keeps NaN.
    assert not any(np.any(a) for a in ours.pop("gradient_accumulator"))
    for kind, arrays in ours.items():
        for x, y in zip(arrays, theirs[kind], strict=True):
            near(x, y, kind)
    assert int(beside.optimizers[1]._iterations) == 6


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
    dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(dtype, **options)
    ours = beside.optimizers[1]
    ours.exclude_from_weight_decay(var_names=["v1"])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in (
        "update_step",
        "_clip_gradients",
        "_apply_weight_decay",
        "_update_model_variables_moving_average",
        "_overwrite_model_variables_with_average_value",
        "_backend_increment_gradient_accumulators",
    ):
        monkeypatch.setattr(fusedadam.keras.Adam, name, refuse)
    steps = []
    plan = fusedadam._core.TensorPlan

    class Counting:
        def __init__(self, *args: Any) -> None:
            self.plan = plan(*args)

        def step(self, params: Any, *args: Any) -> None:
            steps.append(len(params))
            self.plan.step(params, *args)

    monkeypatch.setattr(fusedadam.keras, "TensorPlan", Counting)
    for _ in range(6):
        grads = [torch.from_numpy(g) for g in beside.gradients()]
        ours.apply(grads, beside.variables[1])
    assert steps == [len(SHAPES)] * 6


@pytest.mark.parametrize("options", NEITHER_ALL, ids=str)
def test_in_place(dtype: str, options: dict[str, Any]) -> None:
    beside = Beside(dtype, **options)
    beside.train(1)
    ours, variables = beside.optimizers[1], beside.variables[1]
    tensors = [v._value for v in variables + ours.variables]
    addresses = [t.data_ptr() for t in tensors]
    beside.train(6)
    assert all(v._value is t for v, t in zip(variables + ours.variables, tensors, strict=True))
    assert [t.data_ptr() for t in tensors] == addresses
    assert all(t.requires_grad for t in tensors[: len(variables)])


MOVES: dict[str, Callable[[Any], Any]] = {
    "another value": lambda v: setattr(
        v, "_value", torch.nn.Parameter(v._value.detach().clone(), v.trainable)
    ),
    "data": lambda v: setattr(v._value, "data", v._value.detach().clone()),
    "share_memory_": lambda v: v._value.share_memory_(),
    "set_": lambda v: v._value.detach().set_(v._value.detach().clone()),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_values_that_are_replaced_or_moved(dtype: str, move: Callable[[Any], Any]) -> None:
    beside = Beside(dtype, amsgrad=True, use_ema=True)
    for _ in range(4):
        beside.train(2)
        for v in beside.variables[1] + beside.optimizers[1].variables:
            move(v)


def test_optimizer_built_anew_steps_what_it_has_now(dtype: str) -> None:
    start = values(np.random.default_rng(1), (3,), dtype)
    optimizer, fresh = (fusedadam.keras.Adam(LR) for _ in range(2))
    v, w = variable(start), variable(start)
    optimizer.apply([torch.ones_like(v._value)], [v])
    optimizer.built = False
    optimizer._momentums, optimizer._velocities = [], []
    v.assign(start)
    optimizer._iterations.assign(0)
    optimizer.build([v])
    fresh.build([w])
    for of, p in ((optimizer, v), (fresh, w)):
        of.apply([torch.ones_like(p._value)], [p])
    np.testing.assert_array_equal(array(v), array(w))
    np.testing.assert_array_equal(array(optimizer._momentums[0]), array(fresh._momentums[0]))


@pytest.mark.parametrize("scale", [2.0**127, 3e38, 2.0**-127, 2.0**-140])
def test_loss_scale_of_any_float32(dtype: str, scale: float) -> None:
    beside = Beside(dtype, loss_scale_factor=scale, clipnorm=0.5, amsgrad=True)
    for i in range(3):
        # A few binary orders of magnitude below 1, so that the scaled gradients are finite.
        grads = [
            np.asarray(np.sign(g) * np.minimum(np.abs(g), 1) * scale, dtype)
            for g in beside.gradients()
        ]
        for optimizer, variables in zip(beside.optimizers, beside.variables, strict=True):
            optimizer.apply([torch.from_numpy(g.copy()) for g in grads], variables)
        for mine, its in zip(*(beside.arrays(side)["v"] for side in (1, 0)), strict=True):
            near(mine, its, f"call {i}")


def test_gradients_are_only_read(dtype: str) -> None:
    beside = Beside(dtype, loss_scale_factor=4.0, clipnorm=0.5)
    beside.train(1)
    grads = [torch.from_numpy(g) for g in beside.gradients()]
    before = [g.clone() for g in grads]
    beside.optimizers[1].apply(grads, beside.variables[1])
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


def test_gradients_in_another_layout(dtype: str) -> None:
    beside = Beside(dtype)
    beside.train(1)
    grads = [torch.from_numpy(g) for g in beside.gradients()]
    for optimizer, variables, tensors in zip(
        beside.optimizers,
        beside.variables,
        (grads, [grads[0].t().contiguous().t(), *grads[1:]]),
        strict=True,
    ):
        optimizer.apply(tensors, variables)
    x, y = (beside.arrays(side)["momentum"][0] for side in (0, 1))
    np.testing.assert_allclose(y, x, rtol=1e-6)


def test_autograd_is_told(dtype: str) -> None:
    beside = Beside(dtype)
    beside.train(1)
    weight = beside.variables[1][0]
    loss = (weight.value**2).sum()
    beside.optimizers[1].apply(
        [torch.from_numpy(g) for g in beside.gradients()], beside.variables[1]
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stateless(dtype: str) -> None:
    # Like Keras' own, it updates only the tensors that it is given.
    beside = Beside(dtype, use_ema=True, weight_decay=0.1)
    beside.train(3)
    grads = [torch.from_numpy(g) for g in beside.gradients()]
    before = beside.arrays(1)
    results = []
    for optimizer, variables in zip(beside.optimizers, beside.variables, strict=True):
        state = [v._value.detach().clone() for v in optimizer.variables]
        given = [v._value.detach().clone() for v in variables]
        results.append(optimizer.stateless_apply(state, grads, given))
    for theirs, ours in zip(*results, strict=True):
        for x, y in zip(theirs, ours, strict=True):
            near(y.numpy(), x.numpy())
    after = beside.arrays(1)
    for kind, arrays in before.items():
        for x, y in zip(arrays, after[kind], strict=True):
            np.testing.assert_array_equal(y, x)
    assert int(beside.optimizers[1].iterations) == 3
    beside.train(2)


def test_build_again_changes_nothing() -> None:
    variables = [variable(np.ones(3, np.float32))]
    optimizer = fusedadam.keras.Adam()
    optimizer.build(variables)
    own = list(optimizer.variables)
    optimizer.build(variables)
    assert all(a is b for a, b in zip(optimizer.variables, own, strict=True))


def test_counts_for_a_keras_that_leaves_the_counting_to_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = [variable(np.ones(3, np.float32))]
    gradient = torch.ones(3)
    counts = []
    for counts_calls in (False, True):
        monkeypatch.setattr(fusedadam.keras, "_COUNTS_CALLS", counts_calls)
        optimizer = fusedadam.keras.Adam()
        optimizer.build(variables)
        optimizer._backend_apply_gradients([gradient], variables)
        counts.append(int(optimizer.iterations))
    assert counts == [0, 1]
