# SPDX-License-Identifier: MIT
"""The contract of `tf.keras.optimizers.Adam` of TensorFlow 1.4, point by point."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, values
from training import Training

# -- construction and configuration -----------------------------------------------------------

DEFAULTS = {"lr": 0.001, "beta_1": 0.9, "beta_2": 0.999, "decay": 0.0, "epsilon": 1e-8}
FULL: dict[str, Any] = {
    "lr": 0.25,
    "beta_1": 0.8,
    "beta_2": 0.99,
    "decay": 0.125,
    "epsilon": 1e-6,
} | {"clipnorm": 2.0, "clipvalue": 0.5}
MORE: dict[str, Any] = (
    {"amsgrad": True, "weight_decay": 0.02, "l2": 0.03, "clipnorm_per_tensor": 3.0}
    | {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2, "maximize": True}
    | {"gradient_accumulation_steps": 3, "zero_grad": True, "skip_nonfinite": True}
    | {"bias_corrected_epsilon": True, "flush_denormals": False, "loss_scale": "dynamic"}
    | {"moments": "bfloat16", "low_bits": "int16", "rounding": "nearest", "seed": 5}
)
OFF: dict[str, Any] = {
    **dict.fromkeys(("clipnorm", "clipnorm_per_tensor", "clipvalue", "weight_decay")),
    **dict.fromkeys(("ema_overwrite_frequency", "loss_scale", "gradient_accumulation_steps")),
    **dict.fromkeys(("amsgrad", "use_ema", "zero_grad", "maximize"), False),
    "ema_momentum": 0.99,
    "flush_denormals": True,
    "l2": 0,
    "moments": "float32",
    "seed": 0,
}
# Arguments, and what the configuration has besides or instead of the defaults.
CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (FULL, FULL),
    (MORE, MORE),
    (OFF, {}),
    ({"lr": 1 / 3, "beta_1": 0.1 + 0.2, "clipvalue": 5e-324, "loss_scale": 8.0},) * 2,
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

    assert repr(OfTheBase.from_config({"lr": 0.5})).startswith("OfTheBase(lr=0.5, beta_1=0.9, ")


# -- the step ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "p0", "p1"),
    [
        (0.0, [0.99700001, 1.99700001], [2.99700007, 3.99700007]),
        (0.5, [0.99783334, 1.99783334], [2.99783339, 3.99783339]),
    ],
)
def test_three_steps_of_two_parameters(decay: float, p0: list[float], p1: list[float]) -> None:
    """Compare with numbers that were computed independently of this project."""
    adam, params = Adam(decay=decay), [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    for _ in range(3):
        adam.get_updates([np.array([0.1, 0.1]), np.array([0.01, 0.01])], params)
    iterations, m0, _, v0, _ = adam.weights
    np.testing.assert_allclose(params, [p0, p1], rtol=0, atol=5e-9)
    assert iterations == 3
    np.testing.assert_allclose(m0, 0.0271, rtol=1e-14)
    np.testing.assert_allclose(v0, 2.997001e-05, rtol=1e-14)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_get_updates_returns_the_updated_values_in_keras_order(amsgrad: bool) -> None:
    training = Training([((2, 3), "float32"), ((4,), "float64")], amsgrad=amsgrad)
    count, *updates = training.optimizer.get_updates(training.grads(), training.params)
    assert_same_bits(count, np.array(1, np.int64), "iterations")
    m, v, vhat = (training.optimizer.weights[i : i + 2] for i in (1, 3, 5))
    kinds = [vhat, m, v, training.params] if amsgrad else [m, v, training.params]
    expected = [array for group in zip(*kinds, strict=True) for array in group]
    assert_all_same_bits(updates, expected)
    assert all(map(np.shares_memory, updates, expected))
    assert updates[len(kinds) - 1] is training.params[0]


# -- constraints ------------------------------------------------------------------------------


def with_constraint(start: Array, constraint: Any) -> Array:
    """A copy whose class has a constraint, or None, as Keras layers declare that they have none."""
    kind: Any = type("Constrained", (np.ndarray,), {"constraint": constraint})
    made: Array = start.copy().view(kind)
    return made


@pytest.mark.parametrize("route", ["apply_gradients", "get_updates"])
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

    params = [with_constraint(start, constraint), with_constraint(start, None), start.copy()]
    training, memory = Training([(start.shape, dtype)] * 3, lr=0.01), params[0].ctypes.data
    training.params, training.reference.params = params, [start.copy() for _ in params]
    for count in (1, 2):
        training.call_by(route, [g, g, g])
        p = training.reference.params[1]
        assert_all_same_bits(
            list(map(np.asarray, params)), [np.minimum(p, start.dtype.type(0.5)), p, p]
        )
        assert len(seen) == count
    assert p[0, 0] > 0.5
    assert seen[0][0, 0] > 0.5
    assert params[0].ctypes.data == memory


def test_constraint_of_a_table() -> None:
    p = with_constraint(np.ones((3, 2)), staticmethod(lambda p: np.maximum(p, 0.875)))
    Adam(lr=0.25).apply_sparse([1], np.ones((1, 2)), p)
    np.testing.assert_array_equal(p, [[1, 1], [0.875, 0.875], [1, 1]])


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
        Adam(lr=0.25).get_updates([np.ones(3)], [p])
    np.testing.assert_allclose(p, left, rtol=1e-6)
