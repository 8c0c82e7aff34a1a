# SPDX-License-Identifier: MIT
"""The contract of `tf.keras.optimizers.Adam` of TensorFlow 1.4, point by point.

The expected numbers were computed independently of this project.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from fusedadam import Adam, Optimizer, adam_step
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, values
from training import Training

DEFAULTS = {"lr": 0.001, "beta_1": 0.9, "beta_2": 0.999, "decay": 0.0, "epsilon": 1e-8}
FULL: dict[str, Any] = {
    "lr": 0.25,
    "beta_1": 0.8,
    "beta_2": 0.99,
    "decay": 0.125,
    "epsilon": 1e-6,
} | {"clipnorm": 2.0, "clipvalue": 0.5}
MORE: dict[str, Any] = (
    {"amsgrad": True, "weight_decay": 0.02, "l2": 0.03, "clipnorm": 3.0, "loss_scale": "dynamic"}
    | {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2, "maximize": True}
    | {"gradient_accumulation_steps": 3, "zero_grad": True, "skip_nonfinite": True}
)


def trained(**options: Any) -> Training:
    """An optimizer after three steps of two parameters, with its oracle."""
    made = Training([((2, 3), "float32"), ((4,), "float64")], **options)
    made.step(3)
    return made


# -- construction and configuration -----------------------------------------------------------


def test_adam_is_an_optimizer() -> None:
    assert issubclass(Adam, Optimizer)
    adam = Adam()
    assert (adam.clipnorm, adam.clipvalue, adam.flush_denormals) == (None, None, True)
    assert (adam.iterations, adam.weights, adam.get_weights()) == (0, [], [])


# Arguments, and what the configuration has besides or instead of the defaults.
CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (FULL, FULL),
    (MORE, MORE),
    ({"clipnorm": 0.5}, {"clipnorm": 0.5}),
    ({"clipvalue": 5e-324}, {"clipvalue": 5e-324}),
    ({"clipnorm": None, "clipvalue": None, "flush_denormals": True}, {}),
    ({"flush_denormals": False}, {"flush_denormals": False}),
    ({"lr": 1 / 3, "beta_1": 0.1 + 0.2}, {"lr": 1 / 3, "beta_1": 0.1 + 0.2}),
    ({"learning_rate": 0.25}, {"lr": 0.25}),
    # keras 2.1.3 to 2.3: `if epsilon is None: epsilon = K.epsilon()`, which is 1e-7.
    ({"epsilon": None}, {"epsilon": 1e-7}),
]


@pytest.mark.parametrize(("options", "said"), CONFIGS, ids=str)
def test_configuration(options: dict[str, Any], said: dict[str, Any]) -> None:
    adam, config = Adam(**options), {**DEFAULTS, **said}
    adam.get_config()["lr"] = 5.0  # a copy
    assert adam.get_config() == config
    assert type(adam.get_config()) is dict
    assert {name: getattr(adam, name) for name in config} == config
    assert adam.learning_rate == adam.lr
    shown = ", ".join(f"{name}={value!r}" for name, value in adam.get_config().items())
    assert repr(adam) == f"Adam({shown})"
    changed = Adam()
    for name, value in options.items():
        setattr(changed, name, value)
    by_json = Adam.from_config(json.loads(json.dumps(adam.get_config())))
    evaluated = eval(repr(adam), {"Adam": Adam})
    for other in (changed, by_json, evaluated, Adam.from_config(options)):
        assert type(other) is Adam
        assert other.get_config() == config
        assert repr(other) == repr(adam)


def test_order_of_positional_arguments() -> None:
    config = Adam(0.1, 0.2, 0.3, 0.4, 0.5).get_config()
    assert config == {"lr": 0.1, "beta_1": 0.2, "beta_2": 0.3, "epsilon": 0.4, "decay": 0.5}


def test_config_holds_plain_python_numbers_as_they_were_given() -> None:
    given: dict[str, Any] = {"beta_1": np.float32(0.5), "clipnorm": np.int64(2), "decay": 0}
    config = Adam(lr=np.float64(0.1), **given).get_config()
    assert {type(x) for x in config.values()} <= {int, float}
    assert (config["lr"], config["beta_1"], config["clipnorm"]) == (0.1, 0.5, 2)
    assert repr(Adam(lr=0.001).get_config()["lr"]) == "0.001"  # not rounded to float32


def test_subclasses_are_made_and_shown_from_their_configuration() -> None:
    class Mine(Adam):
        pass

    assert type(Mine.from_config(FULL)) is Mine
    assert repr(Mine()).startswith("Mine(lr=0.001, beta_1=0.9, ")

    class OfTheBase(Adam):
        @classmethod
        def from_config(cls, config: Any) -> OfTheBase:
            return super(Adam, cls).from_config(config)

        def __repr__(self) -> str:
            return super(Adam, self).__repr__()

    made = OfTheBase.from_config({"lr": 0.5})
    assert made.lr == 0.5
    assert repr(made).startswith("OfTheBase(lr=0.5, beta_1=0.9, ")


def test_learning_rate_is_a_synonym() -> None:
    adam = Adam(learning_rate=0.25)
    adam.learning_rate = 0.5
    assert adam.lr == 0.5
    adam.lr = 0.75
    assert adam.learning_rate == 0.75
    for lr in (0.5, 0.001):  # 0.001 is the default
        with pytest.raises(TypeError, match="learning_rate"):
            Adam(lr=lr, learning_rate=0.5)


# test_bad_input.py checks the rest of the message.
@pytest.mark.parametrize("name", ["momentum", "clip_norm", "name", "Lr"])
def test_unknown_keyword(name: str) -> None:
    message = rf"^Unexpected keyword argument passed to optimizer: {name}\b"
    options: dict[str, Any] = {name: 0.5}
    for make in (Adam, lambda **config: Adam.from_config(config)):
        with pytest.raises(TypeError, match=message):
            make(**options)


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "lr": [-1.0, -5e-324, NAN, INF, -INF],
    "learning_rate": [-1.0, NAN, INF],
    "beta_1": [1.0, -0.5, 1.5, NAN, INF],
    "beta_2": [1.0, -0.5, 1.5, NAN, INF],
    "epsilon": [-1e-8, NAN, INF],
    "decay": [-0.5, NAN, INF],
    "clipnorm": [-2.0],
    "clipnorm_per_tensor": [-2.0],
    "clipvalue": [-2.0],
}
ACCEPTED = {
    "lr": [0.0, 1e300, 1],
    "learning_rate": [0.0, 2.0],
    "beta_1": [0.0, 0, 5e-324, 1 - 2**-53],
    "beta_2": [0.0, 0, 5e-324, 1 - 2**-53],
    "epsilon": [0.0, 1.0],
    "decay": [0.0, 3.0],
    "clipnorm": [0.0, 1.0, 3],
    "clipnorm_per_tensor": [0.0, 1.5],
    "clipvalue": [0.0, 1.0, 3],
}


@pytest.mark.parametrize(("name", "value"), [(n, x) for n, xs in REFUSED.items() for x in xs])
def test_out_of_range(name: str, value: float) -> None:
    message = rf"^(lr|{name}) must .*Received: (lr|{name})={re.escape(repr(value))}"
    if name.startswith("clip"):
        message = rf"^Expected {name} >= 0, received: -2\.0$"
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=message):
        Adam(**options)
    adam = Adam()
    with pytest.raises(ValueError, match=message):
        setattr(adam, name, value)
    assert adam.get_config() == DEFAULTS


@pytest.mark.parametrize(("name", "value"), [(n, x) for n, xs in ACCEPTED.items() for x in xs])
def test_in_range(name: str, value: Any) -> None:
    adam, changed = Adam(**{name: value}), Adam()
    setattr(changed, name, value)
    assert getattr(adam, name) == getattr(changed, name) == value


# -- the step ---------------------------------------------------------------------------------

# Take parameters and options; return a function that takes one step with gradients, and returns
# the parameters and the weights after it.
Step: TypeAlias = Callable[[Sequence[Array]], tuple[list[Array], list[Array]]]
Route: TypeAlias = Callable[..., Step]


def by_apply(params: list[Array], **options: Any) -> Step:
    adam = Adam(**options)

    def step(grads: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        adam.apply_gradients(zip(grads, params, strict=True))
        return params, adam.weights

    return step


def by_updates(params: list[Array], **options: Any) -> Step:
    adam = Adam(**options)

    def step(grads: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        adam.get_updates(grads, params)
        return params, adam.weights

    return step


def by_oracle(params: list[Array], **options: Any) -> Step:
    adam = oracle.OracleAdam(params, **options)

    def step(grads: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        adam.step(grads)
        return adam.params, adam.weights()

    return step


routes = pytest.mark.parametrize("route", [by_apply, by_updates])
routes_and_oracle = pytest.mark.parametrize("route", [by_apply, by_updates, by_oracle])


@routes_and_oracle
@pytest.mark.parametrize(
    ("decay", "p0", "p1"),
    [
        (0.0, [0.99700001, 1.99700001], [2.99700007, 3.99700007]),
        (0.5, [0.99783334, 1.99783334], [2.99783339, 3.99783339]),
    ],
)
def test_three_steps_of_two_parameters(
    route: Route, decay: float, p0: list[float], p1: list[float]
) -> None:
    step = route([np.array([1.0, 2.0]), np.array([3.0, 4.0])], decay=decay)
    for _ in range(3):
        params, weights = step([np.array([0.1, 0.1]), np.array([0.01, 0.01])])
    np.testing.assert_allclose(params, [p0, p1], rtol=0, atol=5e-9)
    assert weights[0] == 3
    np.testing.assert_allclose(weights[1], 0.0271, rtol=1e-14)
    np.testing.assert_allclose(weights[3], 2.997001e-05, rtol=1e-14)


@routes_and_oracle
def test_three_steps_with_small_and_large_gradients(route: Route) -> None:
    step = route([np.ones(4)], lr=0.001, epsilon=1e-8)
    gradients = [[0.1, -0.2, 0.3, 0], [-0.1, 0.2, 0.3, 1e-8], [1e3, -1e-3, 0, 1e-8]]
    expected = [
        [0.9990000031622677, 1.0009999984188638, 0.9990000010540915, 1.0],
        [0.999052634623498, 1.000947366898775, 0.9980000017996333, 0.9999771896539448],
        [0.9984138267800025, 1.000908943061599, 0.9972269994779159, 0.999940450265042],
    ]
    for g, p in zip(gradients, expected, strict=True):
        # Half a unit in the last printed digit, plus the rounding of a few operations.
        np.testing.assert_allclose(step([np.array(g)])[0][0], p, rtol=0, atol=3e-16)


def test_epsilon_is_not_divided_by_the_bias_correction() -> None:
    p = np.zeros(1)
    by_apply([p])([np.array([1e-8])])
    # Algorithm 1 of the paper does divide it, and would move p by lr / 2 here.
    m, root_v = 0.1 * 1e-8, 0.001**0.5 * 1e-8
    assert p[0] == pytest.approx(-0.001 * (0.001**0.5 / 0.1) * m / (root_v + 1e-8), rel=1e-12)
    assert 16 < 0.0005 / -p[0] < 16.5


def test_epsilon_of_none_is_that_of_keras() -> None:
    gradient, zeros = np.array([1e-8, -1e-7, 1e-6]), [np.zeros(3), np.zeros(3)]
    p, q, r = np.ones((3, 3))
    by_apply([p], epsilon=None)([gradient])
    adam_step(q, gradient, *zeros, step=1, epsilon=None)
    by_apply([r], epsilon=1e-7)([gradient])
    assert_all_same_bits([p, q], [r, r])


def test_decay_counts_from_before_the_step() -> None:
    starts = [np.array([1.0, -2.0])], [np.array([1.0, -2.0])]
    (plain, decayed), g = starts, [np.array([0.3, -0.4])]
    steps = by_apply(plain, lr=0.5), by_apply(decayed, lr=0.5, decay=1.0)
    for step in steps:
        step(g)
    assert_all_same_bits(decayed, plain)  # the first step uses the whole lr
    after_one = plain[0].copy()
    for step in steps:
        step(g)
    moved = decayed[0] - after_one, plain[0] - after_one
    np.testing.assert_allclose(moved[0], moved[1] / 2, rtol=1e-14)


def test_lr_may_be_set_at_any_time() -> None:
    training = trained()
    for name, lr in (("lr", 0.0), ("learning_rate", 0.5)):
        setattr(training.optimizer, name, lr)
        training.reference.lr = lr
        training.step()
        training.check()


class Bounded(np.ndarray[Any, np.dtype[Any]]):
    """An array whose values never exceed 1/2."""

    @staticmethod
    def constraint(p: Array) -> Array:
        limited: Array = np.minimum(p, p.dtype.type(0.5))
        return limited


class Unbounded(np.ndarray[Any, np.dtype[Any]]):
    """Declares that it has no constraint, as Keras layers do."""

    constraint = None


@routes
@pytest.mark.parametrize("dtype", FLOATS)
def test_constraint_holds_after_each_step(
    rng: np.random.Generator, route: Route, dtype: str
) -> None:
    start = values(rng, (3, 4), dtype)
    start[0, 0] = 0.495
    bounded, unbounded, plain = (start.copy().view(t) for t in (Bounded, Unbounded, np.ndarray))
    step, expected = route([bounded, unbounded, plain], lr=0.01), by_oracle([start], lr=0.01)
    memory, g = bounded.ctypes.data, np.full((3, 4), -0.2, dtype)
    for _ in range(2):
        step([g, g, g])
        (p,), _ = expected([g])
        assert_all_same_bits([np.asarray(unbounded), plain], [p, p])
        assert_same_bits(np.asarray(bounded), np.minimum(p, np.dtype(dtype).type(0.5)), "bounded")
    assert p[0, 0] > 0.5
    assert bounded.ctypes.data == memory


def with_constraint(constraint: Any) -> Array:
    kind: Any = type("Constrained", (np.ndarray,), {"constraint": constraint})
    made: Array = np.ones(3).view(kind)
    return made


def test_constraint_is_applied_to_the_stepped_value() -> None:
    seen = []

    def constraint(owner: Array, p: Array) -> Array:
        seen.append(np.array(p))
        assert owner is p
        return p * 0

    p = with_constraint(constraint)
    by_updates([p], lr=0.25)([np.ones(3)])
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], 0.75, rtol=1e-6)
    np.testing.assert_array_equal(p, 0.0)


@pytest.mark.parametrize(
    ("constraint", "error", "message", "left"),
    [
        (1.0, TypeError, r"params\[0\]\.constraint must be callable. Received: float", 1.0),
        (
            lambda _, p: np.asarray(p)[:2],
            ValueError,
            r"the step has been taken. Received: shape=\(2,\)",
            0.75,
        ),
    ],
    ids=["no function", "another shape"],
)
def test_constraint_that_is_refused(
    constraint: Any, error: type[Exception], message: str, left: float
) -> None:
    p = with_constraint(constraint)
    with pytest.raises(error, match=message):
        by_updates([p], lr=0.25)([np.ones(3)])
    np.testing.assert_allclose(p, left, rtol=1e-6)


# -- gradients and clipping -------------------------------------------------------------------


def gradients_13() -> list[Array]:
    """Return gradients whose global norm is 13."""
    return [np.array([3.0, 4.0]), np.array([-12.0])]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clipnorm": 0.5}, [[0.11538462, 0.15384615], [-0.46153846]]),
        ({"clipnorm": 13.0}, [[3.0, 4.0], [-12.0]]),
        ({"clipnorm": 14.0}, [[3.0, 4.0], [-12.0]]),
        ({"clipvalue": 3.5}, [[3.0, 3.5], [-3.5]]),
        ({"clipnorm": 6.5, "clipvalue": 1.75}, [[1.5, 1.75], [-1.75]]),
        ({"clipnorm": 0, "clipvalue": 0}, [[3.0, 4.0], [-12.0]]),
        ({}, [[3.0, 4.0], [-12.0]]),
    ],
    ids=str,
)
def test_clipping(options: dict[str, Any], expected: list[list[float]]) -> None:
    def loss(params: list[Any]) -> Any:
        return sum(anp.sum(g * p) for g, p in zip(gradients_13(), params, strict=True))

    adam, grads, params = Adam(**options), gradients_13(), [np.zeros(2), np.zeros(1)]
    clipped = adam.get_gradients(grads, params)
    assert type(clipped) is list
    for c, e in zip(clipped, expected, strict=True):
        np.testing.assert_allclose(c, e, rtol=0, atol=5e-9)
    assert_all_same_bits(adam.get_gradients(loss, params), clipped)
    assert (adam.iterations, adam.weights) == (0, [])  # asking for gradients is not a step
    for route in (by_apply, by_updates):
        _, weights = route([np.zeros(2), np.zeros(1)], **options)(grads)
        assert_all_same_bits(weights[1:3], [(1 - 0.9) * c for c in clipped])
    assert_all_same_bits(grads, gradients_13(), "the caller's gradients")


@pytest.mark.parametrize("position", [0, 1])
def test_a_missing_gradient_is_an_error_and_changes_nothing(position: int) -> None:
    training = trained()
    grads: list[Any] = training.grads()
    grads[position] = None
    before = training.visible()
    fresh = Adam()
    for adam in (training.optimizer, fresh):
        for method in (adam.get_gradients, adam.get_updates):
            with pytest.raises(ValueError, match=r"^An operation has `None` for gradient\. \w+"):
                method(grads, training.params)
    training.assert_as(before)
    assert (fresh.iterations, fresh.weights) == (0, [])


# -- updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_get_updates_returns_the_updated_values_in_keras_order(amsgrad: bool) -> None:
    training = trained(amsgrad=amsgrad)
    grads = training.grads()
    training.reference.step(grads)
    updates = training.optimizer.get_updates(grads, training.params)
    training.check()
    assert type(updates) is list
    assert_same_bits(updates[0], np.array(4, np.int64), "iterations")
    weights = training.optimizer.weights
    kinds = [weights[1:3], weights[3:5], training.params]  # m, v and p
    if amsgrad:
        kinds.insert(0, weights[5:7])
    expected = [array for group in zip(*kinds, strict=True) for array in group]
    assert_all_same_bits(updates[1:], expected)
    for update, live in zip(updates[1:], expected, strict=True):
        assert np.shares_memory(update, live)
    assert updates[len(kinds)] is training.params[0]
    assert updates[-1] is training.params[1]


def test_apply_gradients_takes_any_iterable_and_returns_the_count() -> None:
    training = trained()
    pairs = list(zip(training.grads(), training.params, strict=True))
    assert [training.optimizer.apply_gradients(iter(pairs)) for _ in range(2)] == [4, 5]
    assert training.optimizer.iterations == 5


# -- the cases of Keras' own tests ------------------------------------------------------------


class SoftmaxNet:
    """Two layers, ten inputs and two classes, as small as the network of Keras' own tests."""

    def __init__(self, rng: np.random.Generator) -> None:
        def glorot(n: int, k: int) -> Array:
            limit = (6 / (n + k)) ** 0.5
            return rng.uniform(-limit, limit, (n, k))

        self.params = [glorot(10, 10), np.zeros(10), glorot(10, 2), np.zeros(2)]

    @staticmethod
    def logits(params: list[Any], x: Array) -> Any:
        w1, b1, w2, b2 = params
        return anp.dot(anp.maximum(anp.dot(x, w1) + b1, 0.0), w2) + b2

    @classmethod
    def loss(cls, x: Array, y: Array) -> Callable[[list[Any]], Any]:
        """Return the mean cross-entropy of a batch as a function of the parameters."""

        def cross_entropy(params: list[Any]) -> Any:
            z = cls.logits(params, x)
            z = z - anp.max(z, axis=1, keepdims=True)
            log_p = z - anp.log(anp.sum(anp.exp(z), axis=1, keepdims=True))
            return -anp.mean(log_p[np.arange(len(y)), y])

        return cross_entropy

    def accuracy(self, x: Array, y: Array) -> float:
        return float(np.mean(np.argmax(self.logits(self.params, x), axis=1) == y))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 1e-3, "amsgrad": True, "weight_decay": 1e-3},
        {"clipnorm": 0.5, "clipvalue": 0.5, "loss_scale": "dynamic"},
        {"clipnorm_per_tensor": 0.5, "use_ema": True, "ema_momentum": 0.9},
    ],
    ids=str,
)
def test_softmax_network_learns(rng: np.random.Generator, options: dict[str, Any]) -> None:
    y = rng.integers(0, 2, 1000)
    x = rng.uniform(0, 4, (2, 10))[y] + rng.standard_normal((1000, 10))  # one mean for each class
    net, second, adam = SoftmaxNet(rng), SoftmaxNet(rng), Adam(**options)
    assert net.accuracy(x, y) < 0.7
    for i in [*range(0, 1000, 16)] * 2:  # 63 steps per epoch
        adam.get_updates(net.loss(x[i : i + 16], y[i : i + 16]), net.params)
    assert net.accuracy(x, y) >= 0.75
    assert adam.iterations == 126
    adam.get_updates(second.loss(x, y), second.params)
    assert adam.iterations == adam.get_weights()[0] == 127


def test_interleaved_sets_of_updates_share_their_moments(rng: np.random.Generator) -> None:
    adam, sets = Adam(), [[np.ones(6), np.ones(2)], [np.zeros(6), np.zeros(2)]]
    shared = oracle.OracleAdam(sets[0])
    current = [[p.copy() for p in params] for params in sets]
    for i in (0, 1) * 3:
        grads = [values(rng, p.shape, "float64") for p in sets[i]]
        adam.get_updates(grads, sets[i])
        shared.params = current[i]
        shared.step(grads)
        current[i] = shared.params
    assert_all_same_bits([*sets[0], *sets[1]], [*current[0], *current[1]])
    assert_all_same_bits(adam.get_weights(), shared.weights(), "weights")
