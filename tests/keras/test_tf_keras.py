# SPDX-License-Identifier: MIT
"""Side by side with tf_keras in graph mode, the maintained descendant of the class behind `Adam`.

tf_keras computes lr_t in the dtype of the parameter from powers of a rounded beta, which costs 2,000
roundings at the first step of float32. Everything else differs by a few roundings a step.

Decay cannot be compared: tf_keras reads its counter without a control dependency on the increment.
Its clipnorm is the norm of each tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from helpers import FLOATS, Array, assert_all_same_bits, values

tf: Any = pytest.importorskip("tensorflow")
tf_keras: Any = pytest.importorskip("tf_keras")

from tf_keras.src import backend
from tf_keras.src.optimizers import optimizer_v1

SHAPES = [(40, 25), (7,), (), (2, 3, 4)]
# Relative to the largest value so far, of each element.
TOLERANCE = {"float32": 1e-3, "float64": 1e-11}


@pytest.fixture(params=FLOATS)
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """A dtype, with a graph, a session and a matching `floatx`."""
    name: str = request.param
    floatx = backend.floatx()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        backend.set_floatx(name)
        backend.set_session(session)
        yield name
    backend.set_floatx(floatx)
    backend.clear_session()


class SideBySide:
    """The same parameters and gradients in both implementations."""

    def __init__(self, dtype: str, shapes: list[tuple[int, ...]], **options: Any) -> None:
        self._rng = np.random.default_rng(6)
        self._tolerance = TOLERANCE[dtype]
        options = {"lr": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8} | options
        self.params = [values(self._rng, s, dtype) for s in shapes]
        # Of gradients, from far below epsilon to far above 1.
        self._scales = [np.exp2(self._rng.uniform(-40, 6, s)) for s in shapes]
        self._start = [p.copy() for p in self.params]
        self._largest = [np.full(s, 1e-30) for s in shapes * 3]
        self.ours = Adam(**options)
        self.ours.build(self.params)

        self._variables = [tf.Variable(p) for p in self.params]
        self._grads = [tf.compat.v1.placeholder(dtype, s) for s in shapes]
        pairs = zip(self._grads, self._variables, strict=True)
        loss = tf.add_n([tf.reduce_sum(g * p) for g, p in pairs])
        self.theirs = optimizer_v1.Adam(**options)
        self._session = backend.get_session()
        self._updates = self.theirs.get_updates(loss, self._variables)
        self._session.run(tf.compat.v1.global_variables_initializer())

    def run(self, steps: int = 30) -> None:
        for _ in range(steps):
            pairs = zip(self._scales, self.params, strict=True)
            grads = [np.asarray(c * self._rng.standard_normal(c.shape), p.dtype) for c, p in pairs]
            self.ours.get_updates(grads, self.params)
            self._session.run(self._updates, dict(zip(self._grads, grads, strict=True)))
            self.check()

    def check(self) -> None:
        """Compare how far each parameter has moved, m and v."""
        moments = zip(self.ours.weights[1:], self.theirs.get_weights()[1:], strict=False)
        sides = zip(self.params, self._session.run(self._variables), self._start, strict=True)
        pairs = [*((a - start, b - start) for a, b, start in sides), *moments]
        # A parameter is rounded at each step, by half a unit in its last place.
        roundings = [4 * np.spacing(np.abs(p)) for p in self._start]
        for i, ((a, b), most) in enumerate(zip(pairs, self._largest, strict=True)):
            np.maximum(most, np.abs(b), out=most)
            allowed = self._tolerance * most + (roundings[i] if i < len(roundings) else 0)
            off = np.max(np.abs(a - b) / allowed, initial=0)
            assert off <= 1, f"step {self.ours.iterations}, array {i} of p, m and v: {off:.3g}"


# The norm of one tensor is the global norm, so clipnorm is with one.
OPTIONS: list[dict[str, float]] = [
    *({}, {"lr": 0.05}, {"beta_1": 0.5, "beta_2": 0.95, "epsilon": 1e-4}, {"epsilon": 0.0}),
    {"beta_1": 0.875, "beta_2": 1 - 2**-10, "epsilon": 2**-20},
    *({"clipvalue": 0.01}, {"clipnorm": 0.5}, {"clipnorm": 0.5, "clipvalue": 0.02}),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_side_by_side(dtype: str, options: dict[str, float]) -> None:
    SideBySide(dtype, SHAPES[:1] if "clipnorm" in options else SHAPES, **options).run()


# -- the same interface -----------------------------------------------------------------------


def test_weights_move_over(dtype: str) -> None:
    both = SideBySide(dtype, SHAPES)
    both.run(10)
    weights = both.theirs.get_weights()
    n = len(SHAPES)
    assert len(weights) == 3 * n + 1, "the form of Keras 2.1.3 to 2.15"
    both.ours.set_weights(weights)
    assert_all_same_bits(both.ours.get_weights(), weights[: 2 * n + 1])
    both.run(10)
    back = both.ours.get_weights()
    both.theirs.set_weights([*back, *weights[2 * n + 1 :]])
    assert_all_same_bits(both.theirs.get_weights()[: 2 * n + 1], back)
    both.run(10)


def test_configuration_moves_over(dtype: str) -> None:
    options = {"lr": 0.5, "beta_1": 0.75, "beta_2": 0.875, "decay": 0.25, "clipnorm": 2.0}
    theirs = optimizer_v1.Adam(**options, epsilon=2**-20).get_config()
    assert theirs.pop("amsgrad") is False
    ours = Adam.from_config(theirs).get_config()
    assert ours == theirs, f"floatx is {dtype}"
    assert json.loads(json.dumps(ours)) == ours
    assert optimizer_v1.Adam.from_config(ours).get_config() == theirs | {"amsgrad": False}


# -- tf_keras' later optimizers ---------------------------------------------------------------


def kinds_of(theirs: Any) -> dict[str, list[Array]]:
    """The arrays of each kind: "m", "v", "vhat", "average"."""
    variables = theirs.variables() if callable(theirs.variables) else theirs.variables
    kinds: dict[str, list[Array]] = {}
    for variable in variables:
        for kind in set(re.split("[/:_]", variable.name)) & {"m", "v", "vhat", "average"}:
            kinds.setdefault(kind, []).append(variable.numpy())
    return kinds


@pytest.mark.parametrize("shapes", [SHAPES, [(5,)] * 3], ids=["different", "alike"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("more", ["legacy", {}, {"use_ema": True}], ids=str)
def test_list_of_a_later_optimizer(shapes: list[tuple[int, ...]], amsgrad: bool, more: Any) -> None:
    legacy = more == "legacy"
    module = tf_keras.optimizers.legacy if legacy else tf_keras.optimizers
    options = {"amsgrad": amsgrad} | ({} if legacy else more)
    theirs = module.Adam(0.25, **options)
    variables = [tf.Variable(np.ones(shape)) for shape in shapes]
    for step in range(1, 4):
        grads = [tf.constant(np.full(shape, -1.0 * (step + i))) for i, shape in enumerate(shapes)]
        theirs.apply_gradients(zip(grads, variables, strict=True))
    kinds = kinds_of(theirs)
    ours = Adam(**options)
    ours.build([np.ones(shape) for shape in shapes])
    weights = theirs.get_weights() if legacy else [v.numpy() for v in theirs.variables]
    ours.set_weights(weights)
    moments = [array for kind in ("m", "v", "vhat") for array in kinds.get(kind, [])]
    assert_all_same_bits(ours.weights, [np.array(3, np.int64), *moments])
    assert_all_same_bits(ours.ema, kinds.get("average", []))
