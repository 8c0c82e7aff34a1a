# SPDX-License-Identifier: MIT
"""Side by side with tf_keras in graph mode, the maintained descendant of the class behind `Adam`.

Both sides minimize the same noisy quadratic, each with its own gradients. tf_keras
computes lr_t in the dtype of the parameter from powers of a rounded beta, which costs 2,000
roundings at the first step of float32. Everything else differs by a few roundings a step.

Decay cannot be compared: tf_keras reads its counter without a control dependency on the increment.
Its clipnorm is the norm of each tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
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
STEPS = 30
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
    """One noisy quadratic, minimized by both implementations."""

    def __init__(self, dtype: str, shapes: list[tuple[int, ...]], **options: Any) -> None:
        self._rng = np.random.default_rng(6)
        self._tolerance = TOLERANCE[dtype]
        options = {"lr": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8} | options
        self.params = [values(self._rng, s, dtype) for s in shapes]
        self._targets = [values(self._rng, s, dtype) for s in shapes]
        # Curvatures that make gradients range from far below epsilon to far above 1.
        self._scales = [np.exp2(self._rng.uniform(-40, 4, s)).astype(dtype) for s in shapes]
        self.ours = Adam(**options)
        self.ours.build(self.params)
        self._start = [p.copy() for p in self.params]
        self._largest: list[Array] = []

        self._variables = [tf.Variable(p) for p in self.params]
        self._noise = [tf.compat.v1.placeholder(dtype, s) for s in shapes]
        terms = zip(self._variables, self._targets, self._scales, self._noise, strict=True)
        loss = tf.add_n(
            [tf.reduce_sum(c / 2 * (p - target) ** 2 + noise * p) for p, target, c, noise in terms]
        )
        self.theirs = optimizer_v1.Adam(**options)
        self._session = backend.get_session()
        self._updates = self.theirs.get_updates(loss, self._variables)
        self._session.run(tf.compat.v1.global_variables_initializer())

    def step(self) -> None:
        noise = [(c * self._rng.standard_normal(c.shape) * 4).astype(c.dtype) for c in self._scales]
        terms = zip(self.params, self._targets, self._scales, noise, strict=True)
        grads = [np.asarray(c * (p - target) + e) for p, target, c, e in terms]
        self.ours.get_updates(grads, self.params)
        self._session.run(self._updates, dict(zip(self._noise, noise, strict=True)))

    def check(self) -> None:
        """Compare m, v, and how far each parameter has moved."""
        n = len(self.params)
        sides = []
        for params, weights in (
            (self.params, self.ours.weights),
            (self._session.run(self._variables), self.theirs.get_weights()),
        ):
            moved = [p - start for p, start in zip(params, self._start, strict=True)]
            sides.append([np.asarray(x, np.float64) for x in (*moved, *weights[1 : 2 * n + 1])])
        ours, theirs = sides
        largest = self._largest or [np.full(x.shape, 1e-30) for x in theirs]
        self._largest = [np.maximum(a, np.abs(x)) for a, x in zip(largest, theirs, strict=True)]
        # A parameter is rounded at each step, by half a unit in its last place.
        for i, p in enumerate(self._start):
            self._largest[i] += np.abs(p) * np.finfo(p.dtype).eps * 4 / self._tolerance
        for i, (a, b, most) in enumerate(zip(ours, theirs, self._largest, strict=True)):
            off = float(np.max(np.abs(a - b) / most, initial=0))
            what = f"step {self.ours.iterations}, array {i} of m, v and p"
            assert off <= self._tolerance, f"{what} differs by {off:.3g}, too much"

    def run(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            self.step()
            self.check()


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


@pytest.mark.parametrize(
    "options", [{"clipnorm": -2.0}, {"clipvalue": -0.5}, {"momentum": 0.9}], ids=str
)
def test_constructor_says_the_same(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        optimizer_v1.Adam(**options)
    with pytest.raises(theirs.type, match="^" + re.escape(str(theirs.value))):
        Adam(**options)


@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w[:3],
        lambda w: [*w, *w],
        lambda _: [],
        lambda w: [w[0], w[1].T, *w[2:]],
        lambda w: [w[0], w[1][:1], *w[2:]],
        lambda w: [np.array([5]), *w[1:]],
    ],
    ids=["too few", "too many", "none", "transposed", "one row", "iterations of shape (1,)"],
)
def test_set_weights_says_the_same(dtype: str, spoil: Callable[[list[Array]], list[Array]]) -> None:
    both = SideBySide(dtype, SHAPES)
    both.run(1)
    weights = both.theirs.get_weights()
    bad = spoil(weights)
    with pytest.raises(ValueError) as theirs:
        both.theirs.set_weights(bad)
    with pytest.raises(ValueError) as ours:
        both.ours.set_weights(bad)
    # tf_keras counts n more weights, the placeholders.
    said = str(theirs.value).replace(f"({len(weights)})", f"({len(both.ours.weights)})")
    assert str(ours.value) == said


def test_weights_before_the_first_step_say_the_same() -> None:
    theirs, ours = optimizer_v1.Adam(), Adam()
    assert theirs.get_weights() == ours.get_weights() == []
    for optimizer in (theirs, ours):
        optimizer.set_weights([])
    with pytest.raises(ValueError) as said:
        theirs.set_weights([np.array(1)])
    with pytest.raises(ValueError, match="^" + re.escape(str(said.value))):
        ours.set_weights([np.array(1)])


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
