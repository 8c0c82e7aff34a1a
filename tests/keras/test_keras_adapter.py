# SPDX-License-Identifier: MIT
"""The Keras 3 adapter: equal to the oracle to the bit, and to Keras' own optimizers but roundings.

Keras computes lr_t from powers of a rounded beta, which cancel against 1: in float32, that costs up
to 2,000 roundings in the first steps. A mistake is far larger than the tolerance of a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from at_once import together
from extremes import column, few, product
from fusedadam import _core
from helpers import FLOATS, Array, assert_all_same_bits, running, values
from interrupts import interrupted
from keras_adapter import LR, SHAPES, Trained, adapter, array, by_kind, keras, torch, variable

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
    before = keras.config.floatx()
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx(before)


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
        self.sides = [(self.theirs, self.their_variables), (self.optimizer, self.variables)]

    def call(self, grads: Sequence[Any], count: int | None = None) -> None:
        if not self.theirs.built:
            self.theirs.build(self.their_variables)
        self.theirs.apply(self.tensors(grads)[:count], self.their_variables[:count])
        super().call(grads, count)

    def check(self) -> None:
        super().check()
        self.check_keras()

    def check_keras(self) -> None:
        theirs, ours = (by_kind(*side) for side in self.sides)
        paths = [[v.path for v in optimizer.variables] for optimizer, _ in self.sides]
        assert paths[0] == paths[1]
        assert int(self.optimizer.iterations) == int(self.theirs.iterations)
        assert float(self.optimizer.learning_rate) == float(self.theirs.learning_rate)
        for kind, arrays in theirs.items():
            near(ours[kind], arrays, kind)

    def set(self, **settings: Any) -> None:
        for optimizer, _ in self.sides:
            for name, value in settings.items():
                setattr(optimizer, name, value)


# -- the options ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
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


# -- unusual calls ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("options", SHARED, ids=str)
def test_gradients_that_do_not_exist(options: dict[str, Any]) -> None:
    beside = Beside(**options)

    def some() -> list[Any]:
        grads = beside.gradients()
        keep = beside.rng.random(len(grads)) < 0.6
        keep[beside.rng.integers(len(grads))] = True
        return [g if k else None for g, k in zip(grads, keep, strict=True)]

    beside.train(CALLS, some)


@pytest.mark.parametrize("options", SHARED, ids=str)
def test_some_of_the_variables(options: dict[str, Any]) -> None:
    beside = Beside(**options)
    for count in (4, 2, 2, 4, 1, 3, 4, 4):
        beside.call(beside.gradients(), count)
        beside.check()


@pytest.mark.parametrize("options", SHARED, ids=str)
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


@pytest.mark.parametrize("scale", [2.0**127, 3e38, 2.0**-127, 2.0**-140])
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
    steps = []

    class Counting:
        def __init__(self, *args: Any) -> None:
            self.plan = _core.TensorPlan(*args)

        def step(self, params: Any, *args: Any) -> None:
            steps.append(len(params))
            self.plan.step(params, *args)

    monkeypatch.setattr(adapter, "TensorPlan", Counting)
    trained = Trained(**options)
    trained.optimizer.exclude_from_weight_decay(var_names=["v1"])
    trained.reference.excluded = {1}
    trained.train(6)
    assert steps == [len(SHAPES)] * 6


MOVES: dict[str, Callable[[Any], Any]] = {
    "another value": lambda v: setattr(
        v, "_value", torch.nn.Parameter(v._value.detach().clone(), v.trainable)
    ),
    "data": lambda v: setattr(v._value, "data", v._value.detach().clone()),
    "share_memory_": lambda v: v._value.share_memory_(),
    "set_": lambda v: v._value.detach().set_(v._value.detach().clone()),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_values_that_are_replaced_or_moved(move: Callable[[Any], Any]) -> None:
    trained = Trained(amsgrad=True, use_ema=True)
    for count in (40, 8, 9):
        trained.train(2)
        trained.optimizer._iterations.assign(count)
        trained.reference.set_count(count)
        for v in trained.variables + trained.optimizer.variables:
            move(v)
        trained.places.clear()


def test_optimizer_built_anew_steps_what_it_has_now() -> None:
    trained = Trained(starts=[np.ones(3, "float32")])
    trained.train(1)
    optimizer = trained.optimizer
    optimizer.built = False
    optimizer._momentums, optimizer._velocities = [], []
    optimizer._iterations.assign(0)
    trained.reference.build([array(trained.variables[0])])
    trained.reference.iterations = 0
    trained.places.clear()
    trained.train(2)


def test_autograd_is_told() -> None:
    trained = Trained()
    loss = (trained.variables[0].value ** 2).sum()
    trained.train(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stateless() -> None:
    # Like Keras' own, it updates only the tensors that it is given.
    beside = Beside(use_ema=True, weight_decay=0.1)
    beside.train(3)
    grads = beside.tensors(beside.gradients())
    results = []
    for optimizer, variables in beside.sides:
        state = [v._value.detach().clone() for v in optimizer.variables]
        given = [v._value.detach().clone() for v in variables]
        results.append(optimizer.stateless_apply(state, grads, given))
    for theirs, ours in zip(*results, strict=True):
        near([y.numpy() for y in ours], [x.numpy() for x in theirs])
    beside.check()
    beside.train(2)


def test_interrupt_leaves_the_scale_of_losses_as_it_was() -> None:
    trained = Trained(starts=[np.ones(3, "float32")], loss_scale_factor=4.0)
    optimizer = trained.optimizer
    trained.train(1)
    # An interrupt while Keras enters a name scope leaves the scope entered.
    not_within = tuple(
        str(Path(path).parent) for path in (torch.__file__, keras.src.backend.__file__)
    )
    seen: set[Any] = set()
    call: tuple[Any, Any] = [torch.ones(3)], trained.variables
    while interrupted(lambda: optimizer.apply(*call), seen, 1, not_within):
        assert optimizer.loss_scale_factor == 4.0
        assert optimizer._prepared.loss_scale is None
    assert len(seen) > 50


def test_counts_for_a_keras_that_leaves_the_counting_to_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = [variable(np.ones(3, np.float32))]
    for counts_calls in (False, True):
        monkeypatch.setattr(adapter, "_COUNTS_CALLS", counts_calls)
        optimizer = adapter.Adam()
        optimizer.build(variables)
        optimizer._backend_apply_gradients([torch.ones(3)], variables)
        assert int(optimizer.iterations) == counts_calls


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
    trained = started(Trained(dtype, starts=[p], **options), 3, m=m, v=v, **vhat)
    with running(isa=isa), np.errstate(all="ignore"):
        trained.call([g])
    trained.check()


def test_count_ends_with_32_bits() -> None:
    # Keras' own step turns all parameters into NaN here, because its count becomes negative.
    trained = Trained("float64", starts=[np.array([1.0, -2.0])], beta_2=1 - 2.0**-30)
    started(trained, 2**31 - 3)
    trained.train(3)
    assert int(trained.optimizer.iterations) == -(2**31)
    message = r"^iterations must be >= 0 and <= 2\*\*53\. Received: iterations=-2147483648"
    with pytest.raises(ValueError, match=message):
        trained.optimizer.apply([torch.ones(2).double()], trained.variables)
    trained.check()


# -- storage in fewer bits, and threads -------------------------------------------------------

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
    # As in Keras, the other gradients become 0, and inf * 0 is NaN.
    after = array(trained.variables[0]).astype("float32")
    assert after.tolist()[::2] == [1, 1]
    assert np.isnan(after[1])
    assert int(trained.optimizer.iterations) == 1


THREADED: list[dict[str, Any]] = [
    {},
    {"clipnorm": 0.5, "amsgrad": True},
    {"loss_scale_factor": 256.0, "global_clipnorm": 0.5},
    {"gradient_accumulation_steps": 2, "use_ema": True},
]


@pytest.mark.parametrize("size", [1_000, 40_000])  # the second is split among threads
def test_threads(size: int) -> None:
    """Step different optimizers at once, each from two threads.

    Steps of one optimizer are serialized. The gradients are constant, so their order does not
    matter.
    """
    starts = [values(np.random.default_rng(i), n, "float32") for i, n in enumerate((size, 15))]
    models, alone = ([Trained(starts=starts, **options) for options in THREADED] for _ in range(2))
    grads = [torch.from_numpy(g) for g in models[0].gradients()]

    def step(model: Trained, count: int) -> None:
        for _ in range(count):
            model.optimizer.apply(list(grads), model.variables)

    for model in models:
        model.optimizer.build(model.variables)
    with running(threads=2):
        together(2 * len(models), lambda i: step(models[i // 2], 5))
    for model, expected in zip(models, alone, strict=True):
        step(expected, 10)
        every = ([*m.variables, *m.optimizer.variables] for m in (model, expected))
        ours, theirs = ([array(v) for v in each] for each in every)
        assert_all_same_bits(ours, theirs)
