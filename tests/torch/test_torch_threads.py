# SPDX-License-Identifier: MIT
"""Several Python threads that step torch optimizers: different ones at once, and a shared one."""

from __future__ import annotations

from typing import Any

import pytest
from at_once import together
from ends import assert_ends_well
from helpers import running
from torch_helpers import KINDS, LARGE, SHAPES, assert_everything_same_bits, everything

torch: Any = pytest.importorskip("torch")

THREADS = 8
STEPS = 5


class Model:
    """Parameters with an optimizer: dense, or an embedding with sparse gradients."""

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        kind = KINDS[number % len(KINDS)]
        self.indices = torch.randint(0, 900, (64,), generator=generator)
        self.sparse = number % 3 == 2
        shapes = [(900, 48)] if self.sparse else (LARGE if number % 2 else SHAPES)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        ]
        options = {} if number % 4 else {"max_grad_norm": 1.0, "ema_decay": 0.9}
        self.optimizer = kind(self.params, lr=0.01, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        if self.sparse:
            rows = torch.nn.functional.embedding(self.indices, self.params[0], sparse=True)
            loss = rows.square().sum()
        else:
            loss = sum(param.square().sum() for param in self.params)
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("threads", [1, 2])
def test_different_optimizers_at_once(threads: int) -> None:
    models, expected = ([Model(i) for i in range(THREADS)] for _ in range(2))

    def train(model: Model) -> None:
        for _ in range(STEPS):
            model.step()

    with running(threads=threads):
        together(THREADS, lambda i: train(models[i]))
        for model in expected:
            train(model)
    for model, alone in zip(models, expected, strict=True):
        assert_everything_same_bits(everything(model.optimizer), everything(alone.optimizer))


@pytest.mark.parametrize("number", range(3), ids=["small", "large", "rows"])
def test_one_optimizer_from_several_threads(number: int) -> None:
    # Steps of one optimizer are serialized. The gradients are constant, so the order of the threads
    # does not matter.
    model, alone = Model(number), Model(number)
    model.step()
    alone.step()

    def work(_: int) -> None:
        for _ in range(STEPS):
            model.optimizer.step()

    with running(threads=2):
        together(4, work)
        for _ in range(4 * STEPS):
            alone.optimizer.step()
    assert_everything_same_bits(everything(model.optimizer), everything(alone.optimizer))


# ---- interpreter exit

# Excludes the first step, which calls torch, and record_function(), in which torch wraps a step.
# torch's own calls, and the destructors of its tensors, would end the process in the same way.
LARGE_STEP = """
import functools
import torch
import fusedadam.torch

def prepared():
    param = torch.nn.Parameter(torch.ones(3_000_000))
    param.grad = torch.ones(3_000_000)
    optimizer = fusedadam.torch.{kind}([param])
    optimizer.step()
    return functools.partial(type(optimizer).step.__wrapped__, optimizer)
"""


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_the_interpreter_may_end_within_a_step(kind: str) -> None:
    assert_ends_well(LARGE_STEP.format(kind=kind))
