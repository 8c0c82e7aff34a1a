# SPDX-License-Identifier: MIT
"""Losses as callables for autograd: their gradients, and what the step makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from fusedadam import Adam
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits
from training import Training

INPUTS = np.linspace(-1, 1, 20).reshape(4, 5)
TARGETS = np.linspace(0, 1, 12).reshape(4, 3)


def two_layer_loss(params: Any) -> Any:
    weight, bias, scale = params
    predicted = scale * anp.tanh(anp.dot(INPUTS, weight) + bias)
    return anp.mean((predicted - TARGETS) ** 2)


def plain_autograd(loss: Callable[[Any], Any], params: Sequence[Array]) -> list[Array]:
    gradients: list[Array] = autograd.grad(loss)([np.array(p) for p in params])
    return gradients


# The data of the loss are float64. A float32 parameter still gets a float32 gradient: the user
# chose the parameter's dtype, but not that of the gradient.
@pytest.mark.parametrize(
    "dtypes", [["float32"] * 3, ["float64"] * 3, [*FLOATS, "float32"]], ids=str
)
@pytest.mark.parametrize("container", [list, tuple])
def test_autograd_loss(dtypes: list[str], container: Any) -> None:
    training = Training(list(zip([(5, 3), (3,), ()], dtypes, strict=True)), lr=0.05)
    params, optimizer = container(training.params), training.optimizer
    for p, scale in zip(params, (1, 1, 0.5), strict=True):
        p[...] = scale * np.linspace(-1, 1, p.size).reshape(p.shape)
    training.reference.params = [p.copy() for p in params]
    first = two_layer_loss(params)
    for _ in range(20):
        grads = plain_autograd(two_layer_loss, params)
        assert [g.dtype for g in grads] == dtypes
        assert_all_same_bits(optimizer.get_gradients(two_layer_loss, params), grads)
        training.reference.step(grads)
        updates = optimizer.get_updates(two_layer_loss, params)
        assert [u is p for u, p in zip(updates[3::3], params, strict=True)] == [True] * 3
        training.check()
    assert two_layer_loss(params) < 0.6 * first


def test_autograd_loss_that_leaves_a_parameter_out() -> None:
    # autograd's gradient of the unused parameter is zero. Its moments decay, so it still moves.
    training = Training([((2,), "float64"), ((3,), "float32")])
    training.step()
    (used, _), optimizer = training.params, training.optimizer
    training.reference.step([2 * used, np.zeros(3, "float32")])
    optimizer.get_updates(lambda p: anp.sum(p[0] ** 2), training.params)
    training.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UserWarning, ValueError)):
            optimizer.get_updates(lambda _: 3.0, training.params)
    training.check()


class Bounded(np.ndarray[Any, np.dtype[Any]]):
    @staticmethod
    def constraint(p: Array) -> Array:
        return np.clip(p, -0.5, 0.5)


def test_autograd_loss_of_subclasses(tmp_path: Path) -> None:
    # autograd itself does not support subclasses of ndarray: constrained and mapped parameters.
    weight, bias, scale = (np.full(s, 0.75, "float32") for s in [(5, 3), (3,), ()])
    file = np.lib.format.open_memmap(tmp_path / "p.npy", mode="w+", dtype="float32", shape=(3,))
    file[...] = bias
    params = [weight.view(Bounded), file, scale]
    reference = oracle.OracleAdam([weight, bias, scale])
    reference.step(plain_autograd(two_layer_loss, params))
    Adam().get_updates(two_layer_loss, params)
    assert_same_bits(weight, np.clip(reference.params[0], -0.5, 0.5))
    assert_all_same_bits([np.asarray(file), scale], reference.params[1:])


def test_autograd_loss_is_called_once_a_step() -> None:
    calls = []

    class Loss:
        def __call__(self, params: Any) -> Any:
            calls.append(len(params))
            return anp.sum(params[0] ** 2)

        def method(self, params: Any) -> Any:
            return self(params)

    p = np.array([1.0, -2.0])
    for loss in (Loss(), Loss().method):
        assert_same_bits(Adam().get_gradients(loss, [p])[0], 2 * p)
        Adam().get_updates(loss, [p])
    assert calls == [1, 1, 1, 1]
