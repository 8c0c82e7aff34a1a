# SPDX-License-Identifier: MIT
"""The contract of `tf.keras.optimizers.Adam` of TensorFlow 1.4, point by point.

The expected numbers were computed independently of this project.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

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

ROUTES = ["apply_gradients", "get_updates"]
routes = pytest.mark.parametrize("route", ROUTES)
routes_and_oracle = pytest.mark.parametrize("route", [*ROUTES, "oracle"])


def stepper(route: str, params: list[Array], **options: Any) -> Callable[[Any], list[Array]]:
    """Return a function that takes a step with gradients, and returns [*params, *weights]."""
    reference, adam = oracle.OracleAdam(params, **options), Adam(**options)

    def step(grads: Sequence[Array]) -> list[Array]:
        if route == "oracle":
            reference.step(grads)
            return [*reference.params, *reference.weights()]
        if route == "get_updates":
            adam.get_updates(grads, params)
        else:
            adam.apply_gradients(zip(grads, params, strict=True))
        return [*params, *adam.weights]

    return step


@routes_and_oracle
@pytest.mark.parametrize(
    ("decay", "p0", "p1"),
    [
        (0.0, [0.99700001, 1.99700001], [2.99700007, 3.99700007]),
        (0.5, [0.99783334, 1.99783334], [2.99783339, 3.99783339]),
    ],
)
def test_three_steps_of_two_parameters(
    route: str, decay: float, p0: list[float], p1: list[float]
) -> None:
    step = stepper(route, [np.array([1.0, 2.0]), np.array([3.0, 4.0])], decay=decay)
    for _ in range(3):
        *params, iterations, m0, _, v0, _ = step([np.array([0.1, 0.1]), np.array([0.01, 0.01])])
    np.testing.assert_allclose(params, [p0, p1], rtol=0, atol=5e-9)
    assert iterations == 3
    np.testing.assert_allclose(m0, 0.0271, rtol=1e-14)
    np.testing.assert_allclose(v0, 2.997001e-05, rtol=1e-14)


@routes_and_oracle
def test_three_steps_with_small_and_large_gradients(route: str) -> None:
    step = stepper(route, [np.ones(4)], lr=0.001, epsilon=1e-8)
    gradients = [[0.1, -0.2, 0.3, 0], [-0.1, 0.2, 0.3, 1e-8], [1e3, -1e-3, 0, 1e-8]]
    expected = [
        [0.9990000031622677, 1.0009999984188638, 0.9990000010540915, 1.0],
        [0.999052634623498, 1.000947366898775, 0.9980000017996333, 0.9999771896539448],
        [0.9984138267800025, 1.000908943061599, 0.9972269994779159, 0.999940450265042],
    ]
    for g, p in zip(gradients, expected, strict=True):
        # Half a unit in the last printed digit, plus the rounding of a few operations.
        np.testing.assert_allclose(step([np.array(g)])[0], p, rtol=0, atol=3e-16)


def test_epsilon_is_not_divided_by_the_bias_correction() -> None:
    (p, *_) = stepper("apply_gradients", [np.zeros(1)])([np.array([1e-8])])
    # Algorithm 1 of the paper does divide it, and would move p by lr / 2 here.
    m, root_v = 0.1 * 1e-8, 0.001**0.5 * 1e-8
    assert p[0] == pytest.approx(-0.001 * (0.001**0.5 / 0.1) * m / (root_v + 1e-8), rel=1e-12)
    assert 16 < 0.0005 / -p[0] < 16.5


def test_epsilon_of_none_is_that_of_keras() -> None:
    gradient, p = np.array([1e-8, -1e-7, 1e-6]), np.ones(3)
    adam_step(p, gradient, np.zeros(3), np.zeros(3), step=1, epsilon=None)
    for epsilon in (None, 1e-7):
        assert_same_bits(
            stepper("apply_gradients", [np.ones(3)], epsilon=epsilon)([gradient])[0], p
        )


def test_decay_counts_from_before_the_step() -> None:
    g, moved = [np.array([0.3, -0.4])], []
    for decay in (0.0, 1.0):
        step = stepper("apply_gradients", [np.array([1.0, -2.0])], lr=0.5, decay=decay)
        first, second = (step(g)[0].copy() for _ in range(2))
        moved.append((first, second - first))
    assert_same_bits(moved[0][0], moved[1][0])  # the first step uses the whole lr
    np.testing.assert_allclose(moved[1][1], moved[0][1] / 2, rtol=1e-14)


def test_lr_may_be_set_at_any_time() -> None:
    training = trained()
    for name, lr in (("lr", 0.0), ("learning_rate", 0.5)):
        setattr(training.optimizer, name, lr)
        training.reference.lr = lr
        training.step()
        training.check()


def with_constraint(start: Array, constraint: Any) -> Array:
    """A copy whose class has a constraint, or None, as Keras layers declare that they have none."""
    kind: Any = type("Constrained", (np.ndarray,), {"constraint": constraint})
    made: Array = start.copy().view(kind)
    return made


@routes
@pytest.mark.parametrize("dtype", FLOATS)
def test_constraint_is_applied_to_the_stepped_value(
    rng: np.random.Generator, route: str, dtype: str
) -> None:
    start, g, seen = values(rng, (3, 4), dtype), np.full((3, 4), -0.2, dtype), []
    start[0, 0] = 0.495

    def constraint(owner: Array, p: Array) -> Array:
        assert owner is p
        seen.append(np.array(p))
        return np.asarray(np.minimum(p, p.dtype.type(0.5)))

    bounded, unbounded = with_constraint(start, constraint), with_constraint(start, None)
    step = stepper(route, [bounded, unbounded, start.copy()], lr=0.01)
    reference, memory = stepper("oracle", [start], lr=0.01), bounded.ctypes.data
    for count in (1, 2):
        left, p = [np.asarray(x) for x in step([g, g, g])[:3]], reference([g])[0]
        assert_all_same_bits(left, [np.minimum(p, p.dtype.type(0.5)), p, p])
        assert len(seen) == count
    assert p[0, 0] > 0.5
    assert seen[0][0, 0] > 0.5
    assert bounded.ctypes.data == memory


@pytest.mark.parametrize(
    ("constraint", "error", "message", "left"),
    [
        (1.0, TypeError, r"params\[0\]\.constraint must be callable. Received: float", 1.0),
        (lambda _, p: p[:2], ValueError, r"step has been taken. Received: shape=\(2,\)", 0.75),
    ],
    ids=["no function", "another shape"],
)
def test_constraint_that_is_refused(
    constraint: Any, error: type[Exception], message: str, left: float
) -> None:
    p = with_constraint(np.ones(3), constraint)
    with pytest.raises(error, match=message):
        stepper("get_updates", [p], lr=0.25)([np.ones(3)])
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
    for route in ROUTES:
        after = stepper(route, [np.zeros(2), np.zeros(1)], **options)(grads)
        assert_all_same_bits(after[3:5], [(1 - 0.9) * c for c in clipped])
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


def glorot(rng: np.random.Generator, n: int, k: int) -> Array:
    limit = (6 / (n + k)) ** 0.5
    return rng.uniform(-limit, limit, (n, k))


def network(rng: np.random.Generator) -> list[Array]:
    """Two layers, ten inputs and two classes, as small as the network of Keras' own tests."""
    return [glorot(rng, 10, 10), np.zeros(10), glorot(rng, 10, 2), np.zeros(2)]


def logits(params: list[Any], x: Array) -> Any:
    w1, b1, w2, b2 = params
    return anp.dot(anp.maximum(anp.dot(x, w1) + b1, 0.0), w2) + b2


def cross_entropy(params: list[Any], x: Array, y: Array) -> Any:
    z = logits(params, x)
    z = z - anp.max(z, axis=1, keepdims=True)
    log_p = z - anp.log(anp.sum(anp.exp(z), axis=1, keepdims=True))
    return -anp.mean(log_p[np.arange(len(y)), y])


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
    params, others, adam = network(rng), network(rng), Adam(**options)

    def accuracy() -> float:
        return float(np.mean(np.argmax(logits(params, x), axis=1) == y))

    assert accuracy() < 0.7
    for i in [*range(0, 1000, 16)] * 2:  # 63 steps per epoch
        batch = slice(i, i + 16)
        adam.get_updates(lambda p, batch=batch: cross_entropy(p, x[batch], y[batch]), params)
    assert accuracy() >= 0.75
    assert adam.iterations == 126
    adam.get_updates(lambda p: cross_entropy(p, x, y), others)
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
