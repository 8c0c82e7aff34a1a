# SPDX-License-Identifier: MIT
"""Keras 3 beside this package: same formula, same options, compatible lists of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from helpers import FLOATS, Array, assert_all_same_bits, values

keras: Any = pytest.importorskip("keras")

# Raised by Keras itself on its torch backend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPES = [(6, 4), (4,), ()]
STEPS = 20
# Keras computes lr_t in the parameter's precision, from its own powers of beta. In float32 the
# cancellation in 1 - beta_2**t costs 2,000 roundings at the first step. Updates are about as large
# as lr, 0.01 here, and add up. On the TensorFlow backend, beta passes through float32 in any case.
ATOL = {"float32": 1e-4, "float64": 1e-5}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"weight_decay": 0.1},
    {"use_ema": True, "ema_momentum": 0.9},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 4},
    {"clipvalue": 0.01},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"loss_scale_factor": 256.0},
]
# This package's names for options, where they differ.
OURS = {
    "clipnorm": "clipnorm_per_tensor",
    "global_clipnorm": "clipnorm",
    "loss_scale_factor": "loss_scale",
}


class Pair:
    """The same parameters, stepped by both optimizers with the same gradients."""

    def __init__(self, rng: np.random.Generator, dtype: str, options: dict[str, Any]) -> None:
        self.rng = rng
        self.dtype = dtype
        self.ours = [values(rng, shape, dtype) for shape in SHAPES]
        self.variables = [keras.Variable(p.copy(), dtype=dtype) for p in self.ours]
        self.theirs = keras.optimizers.Adam(learning_rate=0.01, epsilon=1e-8, **options)
        self.theirs.build(self.variables)
        self.adam = Adam(lr=0.01, **{OURS.get(name, name): v for name, v in options.items()})

    def step(self, count: int, *, ours: bool = True) -> None:
        for _ in range(count):
            grads = [values(self.rng, shape, self.dtype) for shape in SHAPES]
            tensors = [keras.ops.convert_to_tensor(g) for g in grads]
            self.theirs.apply(tensors, self.variables)
            if ours:
                self.adam.apply_gradients(zip(grads, self.ours, strict=True))

    def check(self) -> None:
        close(self.ours, self.variables, self.dtype)


def close(ours: list[Array], theirs: list[Any], dtype: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, keras.ops.convert_to_numpy(b), rtol=1e-5, atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_mean_the_same(
    rng: np.random.Generator, dtype: str, options: dict[str, Any]
) -> None:
    pair = Pair(rng, dtype, options)
    pair.step(STEPS)
    pair.check()
    if pair.adam.use_ema:
        averages = [v for v in pair.theirs.variables if "average" in v.path]
        close(pair.adam.ema, averages, dtype)


def test_mean_of_accumulated_gradients(rng: np.random.Generator) -> None:
    pair = Pair(rng, "float64", {"gradient_accumulation_steps": 4})
    pair.step(4)
    momentums = [v for v in pair.theirs.variables if "momentum" in v.path]
    close(pair.adam.weights[1 : 1 + len(SHAPES)], momentums, "float64")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_goes_on_from_its_weights(
    rng: np.random.Generator, dtype: str, amsgrad: bool
) -> None:
    pair = Pair(rng, dtype, {"amsgrad": amsgrad})
    pair.step(STEPS, ours=False)
    for p, variable in zip(pair.ours, pair.variables, strict=True):
        p[...] = keras.ops.convert_to_numpy(variable)
    pair.adam.lr = 0.5
    pair.adam.build(pair.ours)
    pair.adam.set_weights([keras.ops.convert_to_numpy(v) for v in pair.theirs.variables])
    assert pair.adam.iterations == STEPS
    assert pair.adam.lr == 0.01
    pair.step(STEPS)
    pair.check()


# -- lists of weights as Keras saves them -----------------------------------------------------

# Parameters of several shapes, and of one shape, where the shape does not tell m from v.
DIFFERENT: list[tuple[int, ...]] = SHAPES
ALIKE: list[tuple[int, ...]] = [(5,)] * 3


def saved(shapes: list[tuple[int, ...]], steps: int, sign: int, **options: Any) -> Any:
    """A Keras optimizer after some steps with gradients of one sign, and its list of weights."""
    variables = [keras.Variable(np.ones(shape), dtype="float32") for shape in shapes]
    theirs = keras.optimizers.Adam(**options)
    theirs.build(variables)
    for step in range(1, steps + 1):
        grads = [np.full(v.shape, sign * (step + i), "float32") for i, v in enumerate(variables)]
        theirs.apply([keras.ops.convert_to_tensor(g) for g in grads], variables)
    return theirs, [np.asarray(keras.ops.convert_to_numpy(v)) for v in theirs.variables]


def kind_of(theirs: Any, name: str) -> list[Array]:
    return [
        np.asarray(keras.ops.convert_to_numpy(v)) for v in theirs.variables if v.path.endswith(name)
    ]


def built(shapes: list[tuple[int, ...]], **options: Any) -> Adam:
    adam = Adam(**options)
    adam.build([np.ones(shape, "float32") for shape in shapes])
    return adam


def check(adam: Adam, theirs: Any, steps: int) -> None:
    kinds = ("_momentum", "_velocity", "_velocity_hat")
    moments = [array for kind in kinds for array in kind_of(theirs, kind)]
    assert_all_same_bits(adam.weights, [np.array(steps, np.int64), *moments])
    assert_all_same_bits(adam.ema, kind_of(theirs, "_average"))


@pytest.mark.parametrize("shapes", [DIFFERENT, ALIKE], ids=str)
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("use_ema", [False, True])
def test_list_is_read_in_the_order_of_keras(
    shapes: list[tuple[int, ...]], schedule: bool, amsgrad: bool, use_ema: bool
) -> None:
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5) if schedule else 0.25
    options = {"amsgrad": amsgrad, "use_ema": use_ema}
    theirs, weights = saved(shapes, 3, -1, learning_rate=rate, **options)
    adam = built(shapes, **options)
    adam.set_weights(weights)
    check(adam, theirs, 3)
    assert adam.lr == (0.001 if schedule else 0.25)


def test_list_in_which_only_the_count_can_decide() -> None:
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
    theirs, weights = saved(ALIKE, 3, 1, learning_rate=rate)
    adam = built(ALIKE)
    if keras.backend.backend() == "tensorflow":
        assert weights[0].dtype == "int64"
        with pytest.raises(ValueError, match='layout="keras-3-schedule"'):
            adam.set_weights(weights)
        adam.set_weights(weights, layout="keras-3-schedule")
    else:
        assert weights[0].dtype == "int32"
        adam.set_weights(weights)
    check(adam, theirs, 3)


@pytest.mark.parametrize(
    "options", [{"use_ema": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_list_with_more_than_moments_is_refused(options: dict[str, Any]) -> None:
    _, weights = saved(DIFFERENT, 3, -1, **options)
    with pytest.raises(ValueError, match="averages or accumulated gradients of Keras"):
        built(DIFFERENT).set_weights(weights)
