# SPDX-License-Identifier: MIT
"""The contract of `tf.keras.optimizers.Adam` of TensorFlow 1.4, point by point.

The expected numbers were computed independently of this project.
"""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable
from typing import Any

import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from fusedadam import Adam, Optimizer, adam_step
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, halving, values

DEFAULTS: dict[str, Any] = {
    "lr": 0.001,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "decay": 0.0,
    "epsilon": 1e-8,
}
FULL: dict[str, Any] = {
    "lr": 0.25,
    "beta_1": 0.8,
    "beta_2": 0.99,
    "decay": 0.125,
    "epsilon": 1e-6,
    "clipnorm": 2.0,
    "clipvalue": 0.5,
}

Route = Callable[[Adam, list[Array], list[Array]], Any]


def by_apply(adam: Adam, grads: list[Array], params: list[Array]) -> None:
    adam.apply_gradients(zip(grads, params, strict=True))


def by_updates(adam: Adam, grads: list[Array], params: list[Array]) -> None:
    adam.get_updates(grads, params)


def trained(steps: int = 3, **options: Any) -> tuple[Adam, list[Array]]:
    """Return an optimizer after a few steps on two parameters, and the parameters."""
    rng = np.random.default_rng(7)
    params = [values(rng, (2, 3), "float32"), values(rng, 4, "float64")]
    adam = Adam(**options)
    for _ in range(steps):
        adam.apply_gradients([(values(rng, p.shape, str(p.dtype)), p) for p in params])
    return adam, params


# -- construction and configuration -----------------------------------------------------------


def test_adam_is_an_optimizer() -> None:
    assert issubclass(Adam, Optimizer)


def test_defaults() -> None:
    adam = Adam()
    assert adam.get_config() == DEFAULTS
    assert {name: getattr(adam, name) for name in DEFAULTS} == DEFAULTS
    assert adam.clipnorm is None
    assert adam.clipvalue is None
    assert adam.flush_denormals is True
    assert adam.iterations == 0


def test_order_of_positional_arguments() -> None:
    adam = Adam(0.1, 0.2, 0.3, 0.4, 0.5)
    assert adam.get_config() == {
        "lr": 0.1,
        "beta_1": 0.2,
        "beta_2": 0.3,
        "epsilon": 0.4,
        "decay": 0.5,
    }


def test_config_names_clips_only_where_they_were_given() -> None:
    assert Adam(clipnorm=0.5).get_config() == {**DEFAULTS, "clipnorm": 0.5}
    assert Adam(clipvalue=0.5).get_config() == {**DEFAULTS, "clipvalue": 0.5}
    assert Adam(clipnorm=None, clipvalue=None).get_config() == DEFAULTS
    assert Adam(**FULL).get_config() == FULL


def test_config_names_flush_denormals_only_where_it_is_off() -> None:
    assert Adam(flush_denormals=True).get_config() == DEFAULTS
    assert Adam(flush_denormals=False).get_config() == {**DEFAULTS, "flush_denormals": False}


def test_config_holds_plain_python_numbers_as_they_were_given() -> None:
    config = Adam(
        lr=np.float64(0.1), beta_1=np.float32(0.5), clipnorm=np.int64(2), decay=0
    ).get_config()
    assert type(config) is dict
    assert {type(x) for x in config.values()} <= {int, float}
    assert (config["lr"], config["beta_1"], config["clipnorm"]) == (0.1, 0.5, 2)
    # Not rounded to float32.
    assert repr(Adam(lr=0.001).get_config()["lr"]) == "0.001"


def test_config_follows_the_attributes() -> None:
    adam = Adam()
    for name, value in FULL.items():
        setattr(adam, name, value)
    assert adam.get_config() == FULL


def test_config_is_a_copy() -> None:
    adam = Adam()
    adam.get_config()["lr"] = 5.0
    assert adam.lr == 0.001


@pytest.mark.parametrize("config", [{}, DEFAULTS, FULL, {"flush_denormals": False}], ids=str)
def test_from_config_round_trips(config: dict[str, Any]) -> None:
    adam = Adam.from_config(config)
    assert adam.get_config() == {**DEFAULTS, **config}
    assert Adam.from_config(adam.get_config()).get_config() == adam.get_config()
    through_json = json.loads(json.dumps(adam.get_config()))
    assert through_json == adam.get_config()
    assert Adam.from_config(through_json).get_config() == adam.get_config()


def test_from_config_builds_the_class_it_is_called_on() -> None:
    class Mine(Adam):
        pass

    assert type(Mine.from_config(FULL)) is Mine


def test_learning_rate_is_a_synonym() -> None:
    adam = Adam(learning_rate=0.25)
    assert (adam.lr, adam.learning_rate) == (0.25, 0.25)
    adam.learning_rate = 0.5
    assert adam.lr == 0.5
    adam.lr = 0.75
    assert adam.learning_rate == 0.75
    assert adam.get_config() == {**DEFAULTS, "lr": 0.75}
    assert Adam.from_config({"learning_rate": 0.5}).lr == 0.5


@pytest.mark.parametrize("lr", [0.5, 0.001])
def test_lr_and_learning_rate_together(lr: float) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        Adam(lr=lr, learning_rate=0.5)


# test_bad_input.py checks the rest of the message.
@pytest.mark.parametrize("name", ["momentum", "clip_norm", "name", "Lr"])
def test_unknown_keyword(name: str) -> None:
    message = rf"^Unexpected keyword argument passed to optimizer: {name}\b"
    options: dict[str, Any] = {name: 0.5}
    with pytest.raises(TypeError, match=message):
        Adam(**options)
    with pytest.raises(TypeError, match=message):
        Adam.from_config(options)


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "lr": [-1.0, -5e-324, NAN, INF, -INF],
    "learning_rate": [-1.0, NAN, INF],
    "beta_1": [1.0, -0.5, 1.5, NAN, INF],
    "beta_2": [1.0, -0.5, 1.5, NAN, INF],
    "epsilon": [-1e-8, NAN, INF],
    "decay": [-0.5, NAN, INF],
}
ACCEPTED = {
    "lr": [0.0, 1e300, 1],
    "learning_rate": [0.0, 2.0],
    "beta_1": [0.0, 0, 5e-324, 1 - 2**-53],
    "beta_2": [0.0, 0, 5e-324, 1 - 2**-53],
    "epsilon": [0.0, 1.0],
    "decay": [0.0, 3.0],
    "clipnorm": [0.0, 1.0, 3],
    "clipvalue": [0.0, 1.0, 3],
}


@pytest.mark.parametrize(("name", "value"), [(n, x) for n, xs in REFUSED.items() for x in xs])
def test_out_of_range(name: str, value: Any) -> None:
    shown = re.escape(repr(value))
    with pytest.raises(ValueError, match=rf"^(lr|{name}) must .*Received: (lr|{name})={shown}"):
        Adam(**{name: value})
    adam = Adam()
    with pytest.raises(ValueError, match="Received: "):
        setattr(adam, name, value)
    assert adam.get_config() == DEFAULTS


@pytest.mark.parametrize(("name", "value"), [(n, x) for n, xs in ACCEPTED.items() for x in xs])
def test_in_range(name: str, value: Any) -> None:
    assert getattr(Adam(**{name: value}), name) == value
    adam = Adam()
    setattr(adam, name, value)
    assert getattr(adam, name) == value


def test_epsilon_of_none_is_that_of_keras() -> None:
    # keras 2.1.3 to 2.3: `if epsilon is None: epsilon = K.epsilon()`, which is 1e-7.
    made, changed, loaded = Adam(epsilon=None), Adam(), Adam.from_config({"epsilon": None})
    changed.epsilon = None  # type: ignore[assignment] # what is read is a number
    for adam in (made, changed, loaded):
        assert adam.epsilon == 1e-7
        assert adam.get_config() == {**DEFAULTS, "epsilon": 1e-7}
    p, q, m, v = np.ones(3), np.ones(3), np.zeros(3), np.zeros(3)
    gradient = np.array([1e-8, -1e-7, 1e-6])
    made.apply_gradients([(gradient, p)])
    adam_step(q, gradient, m, v, step=1, epsilon=None)
    np.testing.assert_array_equal(p, q)
    r = np.ones(3)
    Adam(epsilon=1e-7).apply_gradients([(gradient, r)])
    np.testing.assert_array_equal(p, r)


@pytest.mark.parametrize("name", ["clipnorm", "clipnorm_per_tensor", "clipvalue"])
def test_negative_clip(name: str) -> None:
    message = rf"^Expected {name} >= 0, received: -2\.0$"
    options: dict[str, Any] = {name: -2.0}
    with pytest.raises(ValueError, match=message):
        Adam(**options)
    options[name] = 1.5
    adam = Adam(**options)
    with pytest.raises(ValueError, match=message):
        setattr(adam, name, -2.0)
    assert getattr(adam, name) == 1.5


# -- the step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [by_apply, by_updates])
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
    params = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    grads = [np.array([0.1, 0.1]), np.array([0.01, 0.01])]
    adam = Adam(lr=0.001, epsilon=1e-8, decay=decay)
    for _ in range(3):
        route(adam, grads, params)
    np.testing.assert_allclose(params, [p0, p1], rtol=0, atol=5e-9)
    iterations, m0, _, v0, _ = adam.get_weights()
    assert iterations == 3
    np.testing.assert_allclose(m0, 0.0271, rtol=1e-14)
    np.testing.assert_allclose(v0, 2.997001e-05, rtol=1e-14)


@pytest.mark.parametrize("route", [by_apply, by_updates])
def test_three_steps_with_small_and_large_gradients(route: Route) -> None:
    p = np.ones(4)
    adam = Adam(lr=0.001, epsilon=1e-8)
    gradients = [[0.1, -0.2, 0.3, 0], [-0.1, 0.2, 0.3, 1e-8], [1e3, -1e-3, 0, 1e-8]]
    expected = [
        [0.9990000031622677, 1.0009999984188638, 0.9990000010540915, 1.0],
        [0.999052634623498, 1.000947366898775, 0.9980000017996333, 0.9999771896539448],
        [0.9984138267800025, 1.000908943061599, 0.9972269994779159, 0.999940450265042],
    ]
    for g, e in zip(gradients, expected, strict=True):
        route(adam, [np.array(g)], [p])
        # Half a unit in the last printed digit, plus the rounding of a few operations.
        np.testing.assert_allclose(p, e, rtol=0, atol=3e-16)


def test_epsilon_is_not_divided_by_the_bias_correction() -> None:
    p = np.zeros(1)
    Adam().apply_gradients([(np.array([1e-8]), p)])
    # Algorithm 1 of the paper does divide it, and would move p by lr / 2 here.
    m, root_v = 0.1 * 1e-8, 0.001**0.5 * 1e-8
    assert p[0] == pytest.approx(-0.001 * (0.001**0.5 / 0.1) * m / (root_v + 1e-8), rel=1e-12)
    assert 16 < 0.0005 / -p[0] < 16.5


@pytest.mark.parametrize("dtype", FLOATS)
def test_step_is_in_place_and_in_the_precision_of_the_parameter(
    rng: np.random.Generator, dtype: str
) -> None:
    p, g = values(rng, (5, 6), dtype), values(rng, (5, 6), dtype)
    params, expected = [p], oracle.OracleAdam([p])
    adam = Adam()
    for _ in range(5):
        adam.get_updates([g], params)
        expected.step([g])
    assert params[0] is p
    assert_same_bits(p, expected.params[0])
    assert_all_same_bits(adam.get_weights(), expected.weights())


def test_decay_counts_from_before_the_step() -> None:
    start = np.array([1.0, -2.0])
    p, q = start.copy(), start.copy()
    plain, decayed = Adam(lr=0.5), Adam(lr=0.5, decay=1.0)
    g = np.array([0.3, -0.4])
    plain.apply_gradients([(g, p)])
    decayed.apply_gradients([(g, q)])
    assert_same_bits(q, p)  # the first step uses the whole lr
    p0, q0 = p.copy(), q.copy()
    plain.apply_gradients([(g, p)])
    decayed.apply_gradients([(g, q)])
    np.testing.assert_allclose(q - q0, (p - p0) / 2, rtol=1e-14)
    assert decayed.lr == 0.5


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_lr_may_be_set_at_any_time(name: str) -> None:
    adam, params = trained()
    before = [p.copy() for p in params]
    setattr(adam, name, 0.0)
    adam.apply_gradients([(np.ones_like(p), p) for p in params])
    assert_all_same_bits(params, before)
    assert adam.iterations == 4


class Bounded(np.ndarray[Any, np.dtype[Any]]):
    """An array whose values never exceed 1/2."""

    @staticmethod
    def constraint(p: Array) -> Array:
        limited: Array = np.minimum(p, p.dtype.type(0.5))
        return limited


class Unbounded(np.ndarray[Any, np.dtype[Any]]):
    """Declares that it has no constraint, as Keras layers do."""

    constraint = None


@pytest.mark.parametrize("route", [by_apply, by_updates])
@pytest.mark.parametrize("dtype", FLOATS)
def test_constraint_holds_after_one_step(
    rng: np.random.Generator, route: Route, dtype: str
) -> None:
    start = values(rng, (3, 4), dtype)
    start[0, 0] = 0.495
    grads = [np.full((3, 4), -0.2, dtype)] * 3
    bounded, unbounded, plain = params = [
        start.copy().view(Bounded),
        start.copy().view(Unbounded),
        start.copy(),
    ]
    expected = oracle.OracleAdam([start], lr=0.01)
    adam = Adam(lr=0.01)
    memory = bounded.ctypes.data
    for _ in range(2):
        route(adam, grads, params)
        expected.step(grads[:1])
        assert_same_bits(np.asarray(unbounded), expected.params[0], "no constraint")
        assert_same_bits(plain, expected.params[0], "plain")
        expected_bounded = np.minimum(expected.params[0], np.dtype(dtype).type(0.5))
        assert_same_bits(np.asarray(bounded), expected_bounded, "bounded")
    assert expected.params[0][0, 0] > 0.5
    assert bounded.ctypes.data == memory


def test_constraint_is_applied_to_the_stepped_value() -> None:
    seen = []

    class Watched(np.ndarray[Any, np.dtype[Any]]):
        def constraint(self, p: Array) -> Array:
            seen.append(np.array(p))
            return p * 0

    p = np.ones(3).view(Watched)
    Adam(lr=0.25).get_updates([np.ones(3)], [p])
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], 0.75, rtol=1e-6)
    np.testing.assert_array_equal(p, 0.0)


# -- gradients and clipping -------------------------------------------------------------------


def gradients_13() -> list[Array]:
    """Return gradients whose global norm is 13."""
    return [np.array([3.0, 4.0]), np.array([12.0])]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clipnorm": 0.5}, [[0.11538462, 0.15384615], [0.46153846]]),
        ({"clipnorm": 13.0}, [[3.0, 4.0], [12.0]]),
        ({"clipnorm": 14.0}, [[3.0, 4.0], [12.0]]),
        ({"clipvalue": 3.5}, [[3.0, 3.5], [3.5]]),
        ({"clipnorm": 6.5, "clipvalue": 1.75}, [[1.5, 1.75], [1.75]]),
        ({"clipnorm": 0, "clipvalue": 0}, [[3.0, 4.0], [12.0]]),
        ({}, [[3.0, 4.0], [12.0]]),
    ],
    ids=str,
)
def test_clipping(options: dict[str, Any], expected: list[list[float]]) -> None:
    grads, params = gradients_13(), [np.zeros(2), np.zeros(1)]
    adam = Adam(**options)
    clipped = adam.get_gradients(grads, params)
    assert type(clipped) is list
    for c, e in zip(clipped, expected, strict=True):
        np.testing.assert_allclose(c, e, rtol=0, atol=5e-9)
    assert_all_same_bits(grads, gradients_13(), "the caller's gradients")
    assert adam.weights == []  # asking for gradients is not a step
    for route in (by_apply, by_updates):
        stepped = Adam(**options)
        route(stepped, grads, [np.zeros(2), np.zeros(1)])
        for m, c in zip(stepped.weights[1:3], clipped, strict=True):
            np.testing.assert_array_equal(m, (1 - 0.9) * c)
    assert_all_same_bits(grads, gradients_13(), "the caller's gradients")


def test_clipvalue_is_symmetric() -> None:
    g = np.array([-3.0, -0.25, 0.0, 0.25, 3.0])
    (clipped,) = Adam(clipvalue=0.5).get_gradients([g], [g])
    np.testing.assert_array_equal(clipped, [-0.5, -0.25, 0.0, 0.25, 0.5])


def test_gradients_of_a_callable_are_clipped_too() -> None:
    def loss(params: list[Any]) -> Any:
        a, b = params
        return anp.sum(a * np.array([3.0, 4.0])) + anp.sum(12.0 * b)

    a, b = Adam(clipnorm=6.5).get_gradients(loss, [np.ones(2), np.ones(1)])
    np.testing.assert_array_equal(a, [1.5, 2.0])
    np.testing.assert_array_equal(b, [6.0])


@pytest.mark.parametrize("position", [0, 1])
def test_a_missing_gradient_is_an_error_and_changes_nothing(position: int) -> None:
    adam, params = trained()
    grads: list[Any] = [np.ones_like(p) for p in params]
    grads[position] = None
    before = [p.copy() for p in params], adam.get_weights()
    calls: list[Callable[[], Any]] = [
        lambda: adam.get_gradients(grads, params),
        lambda: adam.get_updates(grads, params),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^An operation has `None` for gradient\. \w+"):
            call()
        assert_all_same_bits(params, before[0], "params")
        assert_all_same_bits(adam.get_weights(), before[1], "weights")
    fresh = Adam()
    with pytest.raises(ValueError, match=r"^An operation has `None` for gradient\."):
        fresh.get_updates(grads, params)
    assert (fresh.iterations, fresh.weights) == (0, [])


# -- weights ----------------------------------------------------------------------------------


def test_no_weights_before_the_first_step() -> None:
    adam = Adam()
    assert adam.weights == []
    assert adam.get_weights() == []
    adam.set_weights([])
    assert adam.iterations == 0


@pytest.mark.parametrize("weights", [[np.array(3)], [np.array(3), np.ones(2), np.ones(2)]])
def test_weights_cannot_be_set_before_they_exist(weights: list[Array]) -> None:
    adam = Adam()
    message = re.escape(
        f"Length of the specified weight list ({len(weights)}) does not match "
        "the number of weights of the optimizer (0)"
    )
    with pytest.raises(ValueError, match=f"^{message}.*build"):
        adam.set_weights(weights)
    assert (adam.iterations, adam.weights) == (0, [])


def test_order_of_weights() -> None:
    adam, params = trained()
    expected = oracle.OracleAdam([np.ones(p.shape, p.dtype) for p in params])
    adam.build(params)
    grads = [np.full_like(p, i + 2) for i, p in enumerate(params)]
    adam.apply_gradients(zip(grads, params, strict=True))
    expected.step(grads)
    iterations, *moments = adam.weights
    assert_same_bits(iterations, np.array(4, np.int64), "iterations")
    assert_all_same_bits(moments, [*expected.m, *expected.v], "[m0, m1, v0, v1]")


def test_weights_are_live_and_get_weights_copies() -> None:
    adam, params = trained()
    live, copied = adam.weights, adam.get_weights()
    assert_all_same_bits(live, copied)
    kept = [w.copy() for w in copied]
    adam.apply_gradients([(np.ones_like(p), p) for p in params])
    assert_all_same_bits(copied, kept, "copies")
    for before, after, copy in zip(live[1:], adam.weights[1:], copied[1:], strict=True):
        assert np.shares_memory(before, after)
        assert not np.shares_memory(after, copy)
        assert (before != copy).any()
    for copy in copied:
        copy[...] = 77
    assert adam.iterations == 4
    assert all((w != 77).all() for w in adam.weights)


def test_iterations_cannot_be_written() -> None:
    adam, _ = trained()
    with pytest.raises(AttributeError):
        adam.iterations = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        adam.weights[0][...] = 5
    assert adam.iterations == 3
    assert type(adam.iterations) is int


def test_set_weights_is_the_inverse_of_get_weights() -> None:
    adam, params = trained()
    saved = adam.get_weights()
    other = Adam()
    other.build(params)
    other.set_weights(saved)
    assert_all_same_bits(other.get_weights(), saved)
    assert other.iterations == 3
    for w in saved[1:]:
        w[...] = 77
    assert all((w != 77).all() for w in other.weights), "set_weights keeps the caller's arrays"


@pytest.mark.parametrize("options", [{}, {"decay": 0.1, "clipnorm": 0.5}], ids=str)
def test_restored_state_continues_bit_for_bit(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    adam, params = trained(**options)
    restored = Adam.from_config(adam.get_config())
    again = [p.copy() for p in params]
    restored.build(again)
    restored.set_weights(adam.get_weights())
    for _ in range(3):
        grads = [values(rng, p.shape, str(p.dtype)) for p in params]
        adam.apply_gradients(zip(grads, params, strict=True))
        restored.apply_gradients(zip(grads, again, strict=True))
        assert_all_same_bits(again, params)
    assert_all_same_bits(restored.get_weights(), adam.get_weights())


def test_set_weights_accepts_the_longer_list_of_later_keras() -> None:
    adam, params = trained()
    saved = adam.get_weights()
    placeholders = [np.zeros(1, p.dtype) for p in params]
    other = Adam()
    other.build(params)
    other.set_weights([*saved, *placeholders])
    assert_all_same_bits(other.get_weights(), saved)
    assert len(other.weights) == 5


def test_order_of_weights_with_amsgrad() -> None:
    adam, params = trained(amsgrad=True)
    rng = np.random.default_rng(7)
    expected = oracle.OracleAdam([values(rng, p.shape, str(p.dtype)) for p in params], amsgrad=True)
    for _ in range(3):
        expected.step([values(rng, p.shape, str(p.dtype)) for p in params])
    iterations, *moments = adam.weights
    assert_same_bits(iterations, np.array(3, np.int64), "iterations")
    assert_all_same_bits(
        moments, [*expected.m, *expected.v, *expected.vhat], "[m0, m1, v0, v1, vhat0, vhat1]"
    )


def test_weights_of_amsgrad_go_on_bit_for_bit(rng: np.random.Generator) -> None:
    adam, params = trained(amsgrad=True, beta_2=0.5)
    saved, again = adam.get_weights(), [p.copy() for p in params]
    assert len(saved) == 7  # 3n + 1, as of Keras 2.1.3 to 2.15
    restored = Adam(amsgrad=True, beta_2=0.5)
    restored.build(again)
    restored.set_weights(saved)
    assert_all_same_bits(restored.get_weights(), saved)
    for _ in range(3):
        grads = [values(rng, p.shape, str(p.dtype)) for p in params]
        adam.apply_gradients(zip(grads, params, strict=True))
        restored.apply_gradients(zip(grads, again, strict=True))
    assert_all_same_bits(again, params)
    assert_all_same_bits(restored.get_weights(), adam.get_weights())


def test_placeholders_are_no_vhat() -> None:
    adam, params = trained(amsgrad=True)
    before = adam.get_weights()
    plain = before[:5]
    for weights, message in (
        (plain, r"^Length of the specified weight list \(5\)"),
        ([*plain, *(np.zeros(1, p.dtype) for p in params)], r"^Optimizer weight shape \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adam.set_weights(weights)
        assert_all_same_bits(adam.get_weights(), before)


def keras_3_list(weights: list[Array], count: int, learning_rate: Any) -> list[Any]:
    """Weights of `count` parameters in the order of Keras 3: m and v of each, then all vhat."""
    iterations, *moments = weights
    m, v, vhat = (moments[i : i + count] for i in (0, count, 2 * count))
    pairs = [moment for pair in zip(m, v, strict=True) for moment in pair]
    return [iterations, learning_rate, *pairs, *vhat]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("learning_rate", "lr"),
    [
        (np.array(0.1, "float32"), 0.1),  # not 0.10000000149011612
        (np.array(1e-3, "float32"), 1e-3),
        (np.array(0.1), 0.1),
        (np.float32(0.25), 0.25),
        (np.array(0.1, "float16"), 0.1),
        (0.5, 0.5),
    ],
    ids=repr,
)
def test_set_weights_accepts_the_list_of_keras_3(
    learning_rate: Any, lr: float, amsgrad: bool
) -> None:
    adam, params = trained(amsgrad=amsgrad)
    saved = adam.get_weights()
    given = keras_3_list(saved, len(params), learning_rate)
    assert len(given) == 2 + (3 if amsgrad else 2) * len(params)
    other = Adam(amsgrad=amsgrad, lr=0.75)
    other.build(params)
    other.set_weights(given)
    assert_all_same_bits(other.get_weights(), saved)
    assert other.iterations == 3
    assert other.lr == lr
    assert type(other.get_config()["lr"]) is float


def test_list_of_keras_3_leaves_a_schedule() -> None:
    adam, params = trained()
    other = Adam(lr=halving)
    other.build(params)
    other.set_weights(keras_3_list(adam.get_weights(), len(params), np.array(0.5, "float32")))
    assert other.lr is halving
    assert_all_same_bits(other.get_weights(), adam.get_weights())


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1)], ids=str)
def test_lists_of_one_parameter_are_told_apart(shape: tuple[int, ...], amsgrad: bool) -> None:
    # Without amsgrad, the list of Keras 3 and the list with a placeholder have the same length.
    p = np.ones(shape)
    adam = Adam(amsgrad=amsgrad)
    adam.apply_gradients([(np.full(shape, 2.0), p)])
    saved = adam.get_weights()
    lists: list[tuple[list[Any], float]] = [(keras_3_list(saved, 1, np.float32(0.5)), 0.5)]
    if not amsgrad:
        lists.append(([*saved, np.zeros(1)], 0.001))
    for given, lr in lists:
        other = Adam(amsgrad=amsgrad)
        other.build([p])
        other.set_weights(given)
        assert_all_same_bits(other.get_weights(), saved)
        assert other.lr == lr


@pytest.mark.parametrize("bad", [-1.0, NAN, INF, np.array(-0.5, "float32"), np.array([0.5, 0.5])])
def test_list_of_keras_3_with_a_learning_rate_that_is_none(bad: Any) -> None:
    adam, params = trained()
    before, config = adam.get_weights(), adam.get_config()
    given = keras_3_list([w + 1 for w in before], len(params), bad)
    with pytest.raises(ValueError):
        adam.set_weights(given)
    assert_all_same_bits(adam.get_weights(), before)
    assert adam.get_config() == config


@pytest.mark.parametrize("position", [2, 3, 4, 5])
def test_list_of_keras_3_of_another_shape(position: int) -> None:
    adam, params = trained()
    before, config = adam.get_weights(), adam.get_config()
    given = keras_3_list([w + 1 for w in before], len(params), np.float32(0.5))
    given[position] = np.zeros((4, 7))
    # Not a valid list. The message is about its length or about the shape.
    with pytest.raises(
        ValueError, match=r"^(Length of the specified|Optimizer) weight (list|shape)"
    ):
        adam.set_weights(given)
    assert_all_same_bits(adam.get_weights(), before)
    assert adam.get_config() == config


@pytest.mark.parametrize("count", [0, 1, 4, 6, 8])
def test_set_weights_of_another_length(count: int) -> None:
    adam, _ = trained()
    before = adam.get_weights()
    message = re.escape(
        f"Length of the specified weight list ({count}) does not match "
        "the number of weights of the optimizer (5)"
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        adam.set_weights([np.array(9), *(np.zeros(3) for _ in range(7))][:count])
    assert_all_same_bits(adam.get_weights(), before)


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("position", range(5))
def test_set_weights_of_another_shape(position: int, longer: bool) -> None:
    adam, params = trained()
    before = adam.get_weights()
    weights = [w + 1 for w in before]
    weights[position] = np.zeros((4, 7))
    shape = re.escape(str(before[position].shape))
    message = f"^Optimizer weight shape {shape} not compatible with provided weight shape "
    with pytest.raises(ValueError, match=message + re.escape("(4, 7)")):
        adam.set_weights([*weights, *([np.zeros(1)] * 2 if longer else [])])
    assert_all_same_bits(adam.get_weights(), before)
    assert len(params) == 2


def test_get_updates_returns_the_updated_values_in_keras_order() -> None:
    adam, params = trained()
    grads = [np.ones_like(p) for p in params]
    before = [p.copy() for p in params]
    updates = adam.get_updates(grads, params)
    assert type(updates) is list
    assert len(updates) == 1 + 3 * len(params)
    iterations, *rest = updates
    assert isinstance(iterations, np.ndarray)
    assert_same_bits(iterations, np.array(4, np.int64), "iterations")
    weights = adam.weights
    for i, p in enumerate(params):
        m, v, updated = rest[3 * i : 3 * i + 3]
        assert updated is p
        assert (p != before[i]).all()
        for actual, live in ((m, weights[1 + i]), (v, weights[3 + i])):
            assert_same_bits(actual, live)
            assert np.shares_memory(actual, live)


def test_get_updates_with_amsgrad_puts_vhat_first() -> None:
    adam, params = trained(amsgrad=True)
    updates = adam.get_updates([np.ones_like(p) for p in params], params)
    assert len(updates) == 1 + 4 * len(params)
    weights = adam.weights
    for i, p in enumerate(params):
        vhat, m, v, updated = updates[1 + 4 * i : 5 + 4 * i]
        assert updated is p
        for actual, live in ((m, weights[1 + i]), (v, weights[3 + i]), (vhat, weights[5 + i])):
            assert_same_bits(actual, live)
            assert np.shares_memory(actual, live)


def test_apply_gradients_returns_the_count() -> None:
    adam, params = trained()
    pairs = [(np.ones_like(p), p) for p in params]
    assert [adam.apply_gradients(iter(pairs)) for _ in range(2)] == [4, 5]
    assert adam.iterations == 5


# -- the cases of Keras' own tests ------------------------------------------------------------


class SoftmaxNet:
    """Two layers, ten inputs and two classes, as small as the network of Keras' own tests."""

    def __init__(self, rng: np.random.Generator, hidden: int = 10) -> None:
        def glorot(n: int, k: int) -> Array:
            limit = (6 / (n + k)) ** 0.5
            return rng.uniform(-limit, limit, (n, k))

        self.params = [glorot(10, hidden), np.zeros(hidden), glorot(hidden, 2), np.zeros(2)]

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

    def train(self, adam: Adam, x: Array, y: Array, *, epochs: int, batch: int) -> None:
        for _ in range(epochs):
            for i in range(0, len(y), batch):
                rows = slice(i, i + batch)
                adam.get_updates(self.loss(x[rows], y[rows]), self.params)


def shifted_gaussians(rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw 1,000 samples of ten inputs around one mean for each of two classes."""
    y = rng.integers(0, 2, 1000)
    means = rng.uniform(0, 4, (2, 10))
    return means[y] + rng.standard_normal((1000, 10)), y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 1e-3},
        {"amsgrad": True},
        {"amsgrad": True, "decay": 1e-3},
        {"clipnorm": 0.5},
        {"clipvalue": 0.5},
        {"clipnorm_per_tensor": 0.5},
        {"weight_decay": 1e-3},
        {"loss_scale": "dynamic"},
        {"use_ema": True, "ema_momentum": 0.9},
    ],
    ids=str,
)
def test_softmax_network_learns(rng: np.random.Generator, options: dict[str, Any]) -> None:
    x, y = shifted_gaussians(rng)
    net = SoftmaxNet(rng)
    assert net.accuracy(x, y) < 0.7
    adam = Adam(**options)
    net.train(adam, x, y, epochs=2, batch=16)
    assert net.accuracy(x, y) >= 0.75
    assert adam.iterations == 126


def test_iterations_count_over_models() -> None:
    rng = np.random.default_rng(3)
    x, y = shifted_gaussians(rng)
    adam, first = Adam(), SoftmaxNet(rng)
    first.train(adam, x, y, epochs=2, batch=16)  # 63 steps per epoch
    assert adam.iterations == 126
    second = SoftmaxNet(rng)
    adam.get_updates(second.loss(x, y), second.params)
    assert adam.iterations == 127
    assert adam.get_weights()[0] == 127


def test_a_model_of_other_shapes_asks_for_build_and_keeps_the_count() -> None:
    rng = np.random.default_rng(3)
    adam, params = trained()
    other = [np.ones(5)]
    before = adam.get_weights()
    with pytest.raises(ValueError, match="build"):
        adam.get_updates([np.ones(5)], other)
    np.testing.assert_array_equal(other[0], 1.0)
    assert_all_same_bits(adam.get_weights(), before)

    adam.build(other)
    assert_all_same_bits(adam.weights, [np.array(3), np.zeros(5), np.zeros(5)])
    g = values(rng, 5, "float64")
    expected = oracle.OracleAdam(other)
    expected.iterations = 3
    expected.step([g])
    assert adam.apply_gradients([(g, other[0])]) == 4
    assert_same_bits(other[0], expected.params[0])
    assert len(params) == 2


def test_interleaved_sets_of_updates_share_their_moments(rng: np.random.Generator) -> None:
    adam, a, b = Adam(), [np.ones(6), np.ones(2)], [np.zeros(6), np.zeros(2)]
    shared = oracle.OracleAdam(a)
    current = {"a": [p.copy() for p in a], "b": [p.copy() for p in b]}
    for name, params in (("a", a), ("b", b)) * 3:
        grads = [values(rng, p.shape, "float64") for p in params]
        adam.get_updates(grads, params)
        shared.params = current[name]
        shared.step(grads)
        current[name] = shared.params
    assert_all_same_bits(a, current["a"], "a")
    assert_all_same_bits(b, current["b"], "b")
    assert_all_same_bits(adam.get_weights(), shared.weights(), "weights")


def test_an_optimizer_out_of_scope_is_freed() -> None:
    adam, params = trained()
    net = SoftmaxNet(np.random.default_rng(1))
    x, y = shifted_gaussians(np.random.default_rng(2))
    adam.build(net.params)
    adam.get_updates(net.loss(x, y), net.params)
    weights = adam.weights
    expected = adam.get_weights()
    died = [weakref.ref(o) for o in (adam, *params, *net.params)]
    del adam, params, net
    gc.collect()
    assert [ref() for ref in died] == [None] * len(died)
    # Moments that are still referenced outlive their optimizer.
    assert_all_same_bits(weights, expected)


def test_gradients_are_not_kept_alive() -> None:
    adam, params = trained()
    for route in (by_apply, by_updates):
        grads = [np.ones_like(p) for p in params]
        died = [weakref.ref(g) for g in grads]
        route(adam, grads, params)
        del grads
        gc.collect()
        assert [ref() for ref in died] == [None, None]


def test_constraint_that_is_no_function_is_refused() -> None:
    class Odd(np.ndarray[Any, np.dtype[Any]]):
        constraint = 1.0

    p = np.ones(3).view(Odd)
    with pytest.raises(
        TypeError, match=r"params\[0\]\.constraint must be callable. Received: float"
    ):
        Adam().get_updates([np.ones(3)], [p])
    np.testing.assert_array_equal(p, 1.0)


def test_constraint_that_returns_another_shape_is_refused_after_the_step() -> None:
    class Odd(np.ndarray[Any, np.dtype[Any]]):
        def constraint(self, p: Array) -> Array:
            return np.asarray(p)[:2]

    p = np.ones(3).view(Odd)
    with pytest.raises(ValueError, match=r"the step has been taken. Received: shape=\(2,\)"):
        Adam(lr=0.25).get_updates([np.ones(3)], [p])
    np.testing.assert_allclose(p, 0.75, rtol=1e-6)


def test_base_class_is_made_and_shown_from_its_configuration() -> None:
    class Plain(Adam):
        @classmethod
        def from_config(cls, config: Any) -> Plain:
            return super(Adam, cls).from_config(config)

        def __repr__(self) -> str:
            return super(Adam, self).__repr__()

    made = Plain.from_config({"lr": 0.5})
    assert made.lr == 0.5
    assert repr(made).startswith("Plain(lr=0.5, beta_1=0.9, ")
