# SPDX-License-Identifier: MIT
"""Parameters without a gradient in some steps, and the step counts of their moments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from helpers import assert_all_same_bits, halving, values
from training import FEW, Training

LARGE = [((210, 200), "float32"), ((33_000,), "float64"), ((5,), "float32")]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"decay": 0.5, "weight_decay": 0.1},
    {"lr": halving, "amsgrad": True, "maximize": True},
    {"clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 2},
    {"clipnorm_per_tensor": 0.1, "zero_grad": True},
    {"loss_scale": "dynamic", "bias_corrected_epsilon": True},
    {"gradient_accumulation_steps": 3, "clipvalue": 0.1},
    {"gradient_accumulation_steps": 2, "zero_grad": True, "clipnorm": 0.1, "use_ema": True},
]

# The parameters with a gradient in each call, by position modulo 3. Each call has at least one.
CALLS = [{0, 1, 2}, {0}, {1}, {1, 2}, {0, 2}, {0, 2}, {2}, {0, 1, 2}, {1}]


def frozen(training: Training, present: set[int]) -> list[Any]:
    return [g if i % 3 in present else None for i, g in enumerate(training.grads())]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shapes", [FEW, LARGE], ids=["few", "large"])
def test_frozen_parameters_equal_oracle(shapes: Any, options: dict[str, Any]) -> None:
    training = Training(shapes, **options)
    for call, present in enumerate(CALLS):
        grads = frozen(training, present)
        if call == 4 and options.get("loss_scale"):
            grads[0][...] = np.inf
        training.call(grads)
        training.check()


@pytest.mark.parametrize("keep", ["save", "pickle", "deepcopy"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counts_are_kept(path: Path, keep: str, options: dict[str, Any]) -> None:
    training = Training(**options)
    for present in CALLS[:4]:
        training.call(frozen(training, present))
    if keep == "save":
        training.optimizer.save(path)
        lr = options.get("lr")
        training.optimizer = Adam.load(path, training.params, lr=lr if callable(lr) else None)
    elif keep == "pickle":
        training.optimizer = pickle.loads(pickle.dumps(training.optimizer))
    else:
        training.optimizer = copy.deepcopy(training.optimizer)
    training.check()
    for present in CALLS[4:]:
        training.call(frozen(training, present))
        training.check()


@pytest.mark.parametrize(
    "begin",
    [
        lambda adam, p: adam.build([p]),
        lambda adam, p: adam.build([p, np.ones(4)]),
    ],
    ids=["rebuilt", "grown"],
)
def test_first_step_of_new_moments_is_lr(begin: Callable[[Adam, Any], None]) -> None:
    adam, p = Adam(lr=0.01), np.zeros(3)
    for _ in range(5):
        adam.apply_gradients([(np.ones(3), p)])
    begin(adam, p)
    before = p.copy()
    others = len(adam.weights) // 2 - 1
    adam.apply_gradients([(np.ones(3), p), *[(np.ones(4), np.ones(4))] * others])
    assert adam.iterations == 6
    np.testing.assert_allclose(before - p, 0.01, rtol=1e-6)


def test_first_step_after_thawing_is_lr() -> None:
    adam, body, head = Adam(lr=0.01), np.zeros(2), np.zeros(2)
    for _ in range(100):
        adam.apply_gradients([(None, body), (np.ones(2), head)])
    np.testing.assert_array_equal(body, 0)
    adam.apply_gradients([(np.ones(2), body), (np.ones(2), head)])
    np.testing.assert_allclose(body, -0.01, rtol=1e-6)


def test_set_weights_sets_the_count_of_each_parameter() -> None:
    training = Training()
    for present in CALLS[:3]:
        training.call(frozen(training, present))
    training.optimizer.set_weights(training.optimizer.get_weights())
    training.reference.set_count(3)
    training.step(2)
    training.check()


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_no_gradient_at_all_is_an_error(calls: int) -> None:
    training = Training(gradient_accumulation_steps=3)
    training.step(calls)
    with pytest.raises(ValueError, match=r"^grads must not all be None.*Received: no gradient$"):
        training.optimizer.apply_gradients([(None, p) for p in training.params])
    training.check()
    training.step(4)
    training.check()


def test_averages_of_frozen_parameters_are_swapped_too() -> None:
    training = Training(use_ema=True)
    training.step(2)
    training.call(frozen(training, {0}))
    training.optimizer.swap_ema()
    training.reference.swap_ema()
    training.check()


def test_constraint_of_a_frozen_parameter_is_left_alone() -> None:
    class Constrained(np.ndarray[Any, Any]):
        constraint = staticmethod(lambda p: p * 0)

    frozen, stepped = (np.ones(2).view(Constrained) for _ in range(2))
    Adam().apply_gradients([(None, frozen), (np.ones(2), stepped)])
    np.testing.assert_array_equal(frozen, 1)
    np.testing.assert_array_equal(stepped, 0)


def test_tensors() -> None:
    torch: Any = pytest.importorskip("torch", reason="the adapters' tests have it")
    frozen, stepped = torch.ones(3), torch.ones(3)
    adam = Adam(lr=0.5)
    for grads in ((None, torch.ones(3)), (torch.ones(3), torch.ones(3))):
        versions = frozen._version
        adam.apply_gradients(list(zip(grads, (frozen, stepped), strict=True)))
        assert (frozen._version > versions) == (grads[0] is not None)
    np.testing.assert_allclose(frozen.numpy(), 0.5, rtol=1e-6)
    np.testing.assert_allclose(stepped.numpy(), 0.0, atol=1e-6)


def test_tables_count_their_own_steps(rng: np.random.Generator) -> None:
    table, rows = values(rng, (9, 3), "float32"), values(rng, (2, 3), "float32")
    fresh, rebuilt = table.copy(), table.copy()
    adam = Adam()
    for _ in range(3):
        adam.apply_sparse([1, 2], rows, np.ones((9, 3), "float32"))
    adam.build([rebuilt])
    assert adam.apply_sparse([1, 5], rows, rebuilt) == 4
    Adam().apply_sparse([1, 5], rows, fresh)
    assert_all_same_bits([rebuilt], [fresh])
