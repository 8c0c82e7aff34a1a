# SPDX-License-Identifier: MIT
"""The Keras 3 adapter on torch: tensors that move, autograd, torch.compile, interrupts, threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from at_once import together
from helpers import Array, assert_all_same_bits, running, values
from interrupts import interrupted
from keras_adapter import ON_JAX, Trained, adapter, array, keras, variable

if ON_JAX:
    pytest.skip("Keras runs on JAX in this process", allow_module_level=True)

import torch
from fusedadam.keras import torch_step

# Raised by Keras itself when it converts a variable to an array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MOVES: dict[str, Callable[[Any], Any]] = {
    "another value": lambda v: setattr(
        v, "_value", torch.nn.Parameter(v._value.detach().clone(), v.trainable)
    ),
    "data": lambda v: setattr(v._value, "data", v._value.detach().clone()),
    "share_memory_": lambda v: v._value.share_memory_(),
    "set_": lambda v: v._value.detach().set_(v._value.detach().clone()),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_values_that_are_replaced_or_moved(move: Callable[[Any], Any]) -> None:
    trained = Trained(amsgrad=True, use_ema=True)
    for count in (40, 8, 9):
        trained.train(2)
        trained.optimizer._iterations.assign(count)
        trained.reference.set_count(count)
        for v in trained.variables + trained.optimizer.variables:
            move(v)
        trained.places.clear()


def test_optimizer_built_anew_steps_what_it_has_now() -> None:
    trained = Trained(starts=[np.ones(3, "float32")])
    trained.train(1)
    optimizer = trained.optimizer
    optimizer.built = False
    optimizer._momentums, optimizer._velocities = [], []
    optimizer._iterations.assign(0)
    trained.reference.build([array(trained.variables[0])])
    trained.reference.iterations = 0
    trained.places.clear()
    trained.train(2)


def test_autograd_is_told() -> None:
    trained = Trained()
    loss = (trained.variables[0].value ** 2).sum()
    trained.train(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_interrupt_leaves_the_scale_of_losses_as_it_was() -> None:
    trained = Trained(starts=[np.ones(3, "float32")], loss_scale_factor=4.0)
    optimizer = trained.optimizer
    trained.train(1)
    # An interrupt while Keras enters a name scope leaves the scope entered.
    not_within = tuple(
        str(Path(path).parent) for path in (torch.__file__, keras.src.backend.__file__)
    )
    seen: set[Any] = set()
    call: tuple[Any, Any] = [torch.ones(3)], trained.variables
    while interrupted(lambda: optimizer.apply(*call), seen, 1, not_within):
        assert optimizer.loss_scale_factor == 4.0
        assert optimizer._prepared.loss_scale is None
    assert len(seen) > 50


def test_counts_for_a_keras_that_leaves_the_counting_to_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = [variable(np.ones(3, np.float32))]
    for counts_calls in (False, True):
        monkeypatch.setattr(torch_step, "_COUNTS_CALLS", counts_calls)
        optimizer = adapter.Adam()
        optimizer.build(variables)
        optimizer._backend_apply_gradients([torch.ones(3)], variables)
        assert int(optimizer.iterations) == counts_calls


def test_compiled() -> None:
    # `compile(jit_compile=True)` traces a training step in this way. The optimizer's step is not
    # part of the trace.
    results = []
    for traced in (False, True):
        variables = [keras.Variable(np.ones(3, "float32"))]
        optimizer = adapter.Adam(0.01)
        optimizer.build(variables)

        def step(optimizer: Any = optimizer, variables: Any = variables) -> Any:
            grad = torch.ones(3) * 2
            optimizer.apply([grad], variables)
            return variables[0].value * 2

        if traced:
            step = torch.compile(step, backend="eager")
        results.append([array(step()) for _ in range(12)])
    assert_all_same_bits(results[0], results[1])


def test_variables_on_another_device() -> None:
    with keras.device("meta"):
        variable = keras.Variable(np.ones(3, "float32"), name="far")
    with pytest.raises(ValueError, match=r"'far' must be on the CPU: .* Received: device='meta'"):
        adapter.Adam().build([variable])


@pytest.mark.parametrize(
    ("rate", "grad", "reason"),
    [
        *(
            (0.1, grad, r"grads\[1\].*Received: ")
            for grad in (np.ones(2, "f4"), np.ones((3, 1), "f4"), np.ones(3), np.ones(3, "i8"))
        ),
        (float("nan"), np.ones(3, "f4"), r"lr must be .* Received: lr=nan"),
    ],
)
def test_refused_call_changes_nothing(rate: float, grad: Array, reason: str) -> None:
    variables = [keras.Variable(np.ones(n, "float32")) for n in (2, 3)]
    optimizer = adapter.Adam(rate, loss_scale_factor=8.0)
    with pytest.raises(ValueError, match=reason):
        optimizer.apply([torch.ones(2), torch.from_numpy(grad)], variables)
    assert [np.unique(array(v)).tolist() for v in variables] == [[1], [1]]
    assert not any(np.any(array(v)) for v in optimizer.variables[2:])
    assert int(optimizer.iterations) == 0
    assert optimizer.loss_scale_factor == 8.0
    assert float(optimizer.scale_loss(torch.tensor(1.0))) == 8.0


THREADED: list[dict[str, Any]] = [
    {},
    {"clipnorm": 0.5, "amsgrad": True},
    {"loss_scale_factor": 256.0, "global_clipnorm": 0.5},
    {"gradient_accumulation_steps": 2, "use_ema": True},
]


@pytest.mark.parametrize("size", [1_000, 40_000])  # the second is split among threads
def test_threads(size: int) -> None:
    """Step different optimizers at once, each from two threads.

    Steps of one optimizer are serialized. The gradients are constant, so their order does not
    matter.
    """
    starts = [values(np.random.default_rng(i), n, "float32") for i, n in enumerate((size, 15))]
    models, alone = ([Trained(starts=starts, **options) for options in THREADED] for _ in range(2))
    grads = [torch.from_numpy(g) for g in models[0].gradients()]

    def step(model: Trained, count: int) -> None:
        for _ in range(count):
            model.optimizer.apply(list(grads), model.variables)

    for model in models:
        model.optimizer.build(model.variables)
    with running(threads=2):
        together(2 * len(models), lambda i: step(models[i // 2], 5))
    for model, expected in zip(models, alone, strict=True):
        step(expected, 10)
        every = ([*m.variables, *m.optimizer.variables] for m in (model, expected))
        ours, theirs = ([array(v) for v in each] for each in every)
        assert_all_same_bits(ours, theirs)
