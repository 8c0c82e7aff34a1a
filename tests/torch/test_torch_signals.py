# SPDX-License-Identifier: MIT
"""Ctrl-C in `fusedadam.torch`: a step is either taken as a whole or not taken at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupts import Case, interrupt_everywhere
from torch_helpers import array, everything, leaves, set_grads

torch: Any = pytest.importorskip("torch")

import fusedadam.torch

SHAPES = [(3, 2), (5,)]


class Steps(Case):
    """A step after earlier ones."""

    def __init__(self, steps: int, **options: Any) -> None:
        self.params = leaves(SHAPES)
        self.optimizer = fusedadam.torch.Adam(self.params, lr=0.1, **options)
        for _ in range(steps):
            self.set_grads()
            self.optimizer.step()
        self.set_grads()

    def set_grads(self) -> None:
        set_grads(self.params, [p.detach() + 1 for p in self.params])

    def call(self) -> object:
        return self.optimizer.step()

    def go_on(self) -> object:
        self.set_grads()
        return self.optimizer.step()

    def observe(self) -> object:
        return [
            {name: a.tobytes() for name, a in kept.items()} for kept in everything(self.optimizer)
        ]


class NewAverages(Steps):
    """A step that adds averages to existing moments."""

    def __init__(self) -> None:
        super().__init__(1)
        for group in self.optimizer.param_groups:
            group["ema_decay"] = 0.9


class TwoGroups(Steps):
    """The first step of two groups."""

    def __init__(self) -> None:
        super().__init__(0)
        more = leaves([(4,)])
        self.optimizer.add_param_group({"params": more, "lr": 0.3})
        self.params += more
        self.set_grads()


class Sparse(Steps):
    """A first step with sparse gradients."""

    def set_grads(self) -> None:
        super().set_grads()
        rows = torch.tensor([[2, 0, 2]])
        p = self.params[0]
        p.grad = torch.sparse_coo_tensor(rows, torch.ones(3, 2), p.shape, check_invariants=True)


class Swap(Steps):
    """Averages swapped with the parameters."""

    def __init__(self) -> None:
        super().__init__(2, ema_decay=0.9)

    def call(self) -> object:
        return self.optimizer.swap_ema()

    def go_on(self) -> object:
        with contextlib.suppress(ValueError):
            return super().go_on()
        # The averages are swapped in.
        self.optimizer.swap_ema()
        return super().go_on()


class Attached(Case):
    """A backward pass that steps each parameter."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(3, 1, bias=False)
        self.optimizer = fusedadam.torch.AdamW(self.model.parameters(), lr=0.1)
        self.attached = fusedadam.torch.attach(self.model, self.optimizer)

    def call(self) -> object:
        return self.model(torch.ones(2, 3)).sum().backward()

    def go_on(self) -> object:
        # A gradient remains if its step has not begun. If one remained after its step, it would be
        # used again.
        (weight,) = self.model.parameters()
        assert weight.grad is None or self.optimizer.state[weight]["step"] == 0
        weight.grad = None
        return self.call()

    def observe(self) -> object:
        (weight,) = self.model.parameters()
        state = self.optimizer.state[weight]
        return array(weight).tobytes(), {k: array(v).tobytes() for k, v in state.items()}


CALLS: dict[str, Callable[[], Case]] = {
    "first step": lambda: Steps(0),
    "step": lambda: Steps(2),
    "first step with options": lambda: Steps(0, amsgrad=True, ema_decay=0.9, max_grad_norm=1.0),
    "averages begin": NewAverages,
    "two groups": TwoGroups,
    "first sparse step": lambda: Sparse(0),
    "swap_ema": Swap,
    "backward": Attached,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_whole(name: str) -> None:
    # An interrupt in torch's own Python code may leave its grad mode wrong.
    within_torch = str(Path(torch.__file__).parent)
    assert interrupt_everywhere(CALLS[name], times=1, not_within=(within_torch,)) > 5


class _Interrupted:
    """A plan whose interrupt arrives after its step."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def step_counted(self, *arguments: Any) -> int:
        self.plan.step_counted(*arguments)
        raise KeyboardInterrupt


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_state_of_a_step_that_was_taken_is_kept(ema_decay: float | None) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fusedadam.torch.Adam([p])
    if ema_decay is not None:  # averages added later
        optimizer.step()
        optimizer.param_groups[0]["ema_decay"] = ema_decay
    optimizer._plan.core = _Interrupted(optimizer._plan.core)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state[p]["step"] == (1 if ema_decay is None else 2)
    assert ("ema" in optimizer.state[p]) == (ema_decay is not None)


def test_formats_of_a_step_that_was_taken_are_kept() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = fusedadam.torch.Adam([p])
    optimizer.step()
    optimizer.param_groups[0]["moments"] = "packed"
    optimizer._plan.core = _Interrupted(optimizer._plan.core)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state[p]["step"] == 2
    assert optimizer.state[p].keys() == {"step", "packed_moments"}
