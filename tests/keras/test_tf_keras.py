# SPDX-License-Identifier: MIT
"""Side by side with tf_keras in graph mode, the maintained descendant of the class behind `Adam`.

Both sides minimize the same noisy quadratic for 100 steps, each with its own gradients. m, v and p
are compared after every step. The tolerance is the bound of `rounding.Divergence` plus the
differences between the two implementations (u is the unit roundoff of the dtype):

- tf_keras keeps its constants as variables of the dtype and computes 1 - beta from the rounded
  beta. This package computes it in float64 and rounds. The difference between the constants is
  known exactly (500 u relative for float32 at beta_2 = 0.999).
- tf_keras computes lr_t in the dtype from `pow(beta, t)`, this package in float64. With a = 1 -
  beta**t, the error of the power is beta**t (4 u + t e), for 2 units in the last place of `pow` and
  a relative error e of beta. The relative error of a is that over a, and half of it after the root.
  The five operations and the rounding of lr add 6 u. At the first step the total is 2,000 u for
  float32.
- A gradient c (p - target) + noise differs by c times the difference of p so far, plus 4 roundings
  on each side.
- clipnorm: a sum of n squares has a relative error of at most n u in any order, and the norm half
  of it. An earlier error of the gradient passes through the scale, and again through the norm.
- clipvalue never increases a difference, and removes it where both sides clamp.

Decay cannot be compared: tf_keras reads its counter without a control dependency on the increment.
Its clipnorm is the norm of each tensor, which equals the global norm if there is one tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from helpers import FLOATS, Array, assert_all_same_bits, values
from rounding import Divergence

tf: Any = pytest.importorskip("tensorflow")
tf_keras: Any = pytest.importorskip("tf_keras")

from tf_keras.src import backend
from tf_keras.src.optimizers import optimizer_v1

SHAPES = [(40, 25), (7,), (), (2, 3, 4)]
STEPS = 100


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
        self._options = {"lr": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8} | options
        self.params = [values(self._rng, s, dtype) for s in shapes]
        self._targets = [values(self._rng, s, dtype) for s in shapes]
        # Curvatures that make gradients range from far below epsilon to far above 1.
        self._scales = [np.exp2(self._rng.uniform(-40, 4, s)).astype(dtype) for s in shapes]
        self._u = float(np.finfo(dtype).eps) / 2
        self.divergences = [Divergence(p) for p in self.params]

        self.ours = Adam(**self._options)
        self.ours.build(self.params)

        self._variables = [tf.Variable(p) for p in self.params]
        self._noise = [tf.compat.v1.placeholder(dtype, s) for s in shapes]
        terms = zip(self._variables, self._targets, self._scales, self._noise, strict=True)
        loss = tf.add_n(
            [tf.reduce_sum(c / 2 * (p - target) ** 2 + noise * p) for p, target, c, noise in terms]
        )
        self.theirs = optimizer_v1.Adam(**self._options)
        self._session = backend.get_session()
        self._updates = self.theirs.get_updates(loss, self._variables)
        self._session.run(tf.compat.v1.global_variables_initializer())

    def step(self) -> None:
        noise = [(c * self._rng.standard_normal(c.shape) * 4).astype(c.dtype) for c in self._scales]
        terms = zip(self.params, self._targets, self._scales, noise, strict=True)
        grads = [np.asarray(c * (p - target) + e) for p, target, c, e in terms]
        before = self.ours.get_weights()
        self.ours.get_updates(grads, self.params)
        self._session.run(self._updates, dict(zip(self._noise, noise, strict=True)))
        self._follow(grads, noise, before)

    def _follow(self, grads: list[Array], noise: list[Array], before: list[Array]) -> None:
        n, after = len(grads), self.ours.weights
        errors = [
            c * d.p + 8 * self._u * (np.abs(c * (p - target)) + np.abs(e))
            for c, d, p, target, e in zip(
                self._scales, self.divergences, self.params, self._targets, noise, strict=True
            )
        ]
        grads, errors = self._clipped([np.asarray(g, np.float64) for g in grads], errors)
        for i in range(n):
            self.divergences[i].step(
                (before[1 + i], before[1 + n + i]),
                (self.params[i], after[1 + i], after[1 + n + i]),
                grads[i],
                g_error=errors[i],
                **self._constants(self.params[i].dtype),
            )

    def _clipped(self, grads: list[Array], errors: list[Array]) -> tuple[list[Array], list[Array]]:
        if clipnorm := self._options.get("clipnorm"):
            (g,), (error,) = grads, errors
            norm = float(np.linalg.norm(g))
            scale = min(1.0, clipnorm / norm)
            clipped = scale * g
            through_norm = np.abs(clipped) * float(np.linalg.norm(error)) / norm
            rounded = np.abs(clipped) * (g.size / 2 + 8) * self._u
            grads, errors = [clipped], [scale * error + through_norm + rounded]
        if clipvalue := self._options.get("clipvalue"):

            def clamp(g: Array) -> Array:
                return np.clip(g, -clipvalue, clipvalue)

            # No error is left where both sides are clamped.
            errors = [
                np.maximum(clamp(g + error) - clamp(g), clamp(g) - clamp(g - error))
                for g, error in zip(grads, errors, strict=True)
            ]
            grads = [clamp(g) for g in grads]
        return grads, errors

    def _constants(self, dtype: np.dtype[Any]) -> dict[str, float]:
        t, T = self.ours.iterations, dtype.type
        lr, epsilon = self._options["lr"], self._options["epsilon"]
        constants, relative = {}, []
        for name in ("beta_1", "beta_2"):
            beta = self._options[name]
            theirs, ours = T(1) - T(beta), T(1.0 - beta)
            constants[name] = beta
            constants[f"one_minus_{name}_error"] = abs(float(theirs) - float(ours))
            beta_error = abs(float(T(beta)) - beta) / beta
            relative.append(beta**t * (4 * self._u + t * beta_error) / (1 - beta**t))
        return constants | {
            "lr_t": lr * math.sqrt(1 - constants["beta_2"] ** t) / (1 - constants["beta_1"] ** t),
            "lr_t_error": relative[0] + relative[1] / 2 + 6 * self._u,
            "epsilon": epsilon,
        }

    def their_state(self) -> list[tuple[Array, Array, Array]]:
        params = self._session.run(self._variables)
        weights, n = self.theirs.get_weights(), len(params)
        return [(p, weights[1 + i], weights[1 + n + i]) for i, p in enumerate(params)]

    def check(self) -> None:
        weights, n = self.ours.weights, len(self.params)
        for i, theirs in enumerate(self.their_state()):
            ours = self.params[i], weights[1 + i], weights[1 + n + i]
            what = f"step {self.ours.iterations}, parameter {i} of shape {ours[0].shape}"
            self.divergences[i].check(ours, theirs, what)

    def run(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            self.step()
            self.check()


OPTIONS: dict[str, dict[str, float]] = {
    "defaults": {},
    "large lr": {"lr": 0.05},
    "other betas": {"beta_1": 0.5, "beta_2": 0.95, "epsilon": 1e-4},
    "exact betas": {"beta_1": 0.875, "beta_2": 1 - 2**-10, "epsilon": 2**-20},
    "epsilon 0": {"epsilon": 0.0},
    "clipvalue": {"clipvalue": 0.01},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_100_steps_side_by_side(dtype: str, options: dict[str, float]) -> None:
    both = SideBySide(dtype, SHAPES, **options)
    start = [p.copy() for p in both.params]
    both.run()
    assert both.ours.iterations == STEPS
    # The tolerance must be far below the total movement, or the test would prove nothing.
    moved = np.concatenate([np.abs(p - q).ravel() for p, q in zip(both.params, start, strict=True)])
    bound = np.concatenate([d.p.ravel() for d in both.divergences])
    assert np.median(moved) > 1e-4
    assert np.sum(bound) < (1e-2 if dtype == "float32" else 1e-10) * np.sum(moved)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "limits",
    [{"clipnorm": 0.5}, {"clipnorm": 1e6}, {"clipnorm": 0.5, "clipvalue": 0.02}],
    ids=["clipnorm", "clipnorm never reached", "clipnorm and clipvalue"],
)
def test_100_steps_of_one_tensor_with_clipnorm(
    dtype: str, shape: tuple[int, ...], limits: dict[str, float]
) -> None:
    SideBySide(dtype, [shape], **limits).run()


MISTAKES: dict[str, Callable[[SideBySide], None]] = {
    "epsilon of Algorithm 1": lambda both: setattr(
        both.ours, "epsilon", 1e-8 * math.sqrt(1 - 0.999 ** (both.ours.iterations + 1))
    ),
    "a step too many": lambda both: both.ours.set_weights(
        [both.ours.weights[0] + 1, *both.ours.get_weights()[1:]]
    ),
    "lr wrong by a hundredth": lambda both: setattr(both.ours, "lr", 0.00101),
    "beta_2 wrong by a hundredth of 1 - beta_2": lambda both: setattr(both.ours, "beta_2", 0.99901),
    "no clipvalue": lambda both: setattr(both.ours, "clipvalue", None),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_seen(dtype: str, mistake: Callable[[SideBySide], None]) -> None:
    both = SideBySide(dtype, SHAPES, clipvalue=0.5)
    mistake(both)
    with pytest.raises(AssertionError, match="times the bound"):
        both.run()


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
def test_constructor_says_the_same(dtype: str, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        optimizer_v1.Adam(**options)
    with pytest.raises(theirs.type) as ours:
        Adam(**options)
    assert str(ours.value).startswith(str(theirs.value)), f"floatx is {dtype}"


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


def test_weights_before_the_first_step_say_the_same(dtype: str) -> None:
    theirs, ours = optimizer_v1.Adam(), Adam()
    assert theirs.get_weights() == ours.get_weights() == [], f"floatx is {dtype}"
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
