# SPDX-License-Identifier: MIT
"""Train with a client of torch's optimizers, once with torch's own optimizer and once with ours.

Two such trainings in float32 do not stay close. If a gradient is zero up to rounding, as for a bias
before a normalization, Adam turns the roundings into full-size steps. So the second training steps
with the gradients of the first, after checking that its own are close to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import Array
from torch_helpers import STOCK, everything, params_of

torch: Any = pytest.importorskip("torch")

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# Tolerance for gradients at parameters that differ by roundings, relative to the largest gradient
# of the step. Measured: at most 4e-7. A parameter that is rounded to bfloat16 in the other
# direction gives about 2**-8. Gradients that are scaled, not zeroed before, or from another batch
# are off by more than a tenth.
CLOSE = 2.0**-6
# Of a parameter, relative to lr, and of a moment, relative to the largest. A rounding of m of
# 2**-24 moves an update by at most 1e-5 of lr, and trainings have less than 50 steps.
OF_UPDATES, OF_MOMENTS = 1e-3, 1e-5

OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")

# Dtypes of a model, with settings for its optimizer.
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("float32", {}),
    ("bfloat16", {}),
    ("bfloat16", {"moments": "packed", "low_bits": "int8"}),
]


def assert_learnt(optimizer: Any, losses: Sequence[Any], dtype: str = "bfloat16") -> None:
    """The loss has fallen, and a 16-bit model stores nothing in more bits, except for counts."""
    assert optimizer.state
    assert float(losses[-1]) < 0.92 * float(losses[0]), losses
    for p, state in optimizer.state.items():
        assert p.dtype == getattr(torch, dtype)
        sizes = {t.dtype.itemsize for name, t in state.items() if name != "step"}
        assert sizes <= ({4} if dtype == "float32" else {1, 2})


def assert_same_training(actual: Any, expected: Any) -> None:
    """Two optimizers have the same parameters and state, in any dtype."""
    pair = [[(p.detach(), dict(o.state[p])) for p in params_of(o)] for o in (actual, expected)]
    torch.testing.assert_close(*pair, rtol=0, atol=0)


class Step(NamedTuple):
    """The input and the result of a step, for each parameter in order."""

    options: list[dict[str, Any]]
    grads: list[Any]
    after: list[dict[str, Array]]


@contextlib.contextmanager
def recorded(kind: Any, others: Sequence[Step] | None = None) -> Iterator[list[Step]]:
    """Record the steps of optimizers of this class, which use the gradients of the others."""
    steps: list[Step] = []

    def begin(optimizer: Any) -> None:
        params = params_of(optimizer)
        if others is not None:
            assert len(steps) < len(others), "more steps than with torch's optimizer"
            exchange([p.grad for p in params], others[len(steps)].grads)
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        steps.append(Step([{n: group[n] for n in OPTIONS} for group in groups], grads, []))

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> Any:
        if type(optimizer) is not kind:
            return None
        closure = [*args[1:], *kwargs.values(), None][0]
        if closure is None:
            begin(optimizer)
            return None

        def computed() -> Any:
            loss = closure()
            begin(optimizer)
            return loss

        return (optimizer, computed), {}

    def after_step(optimizer: Any, *_: Any) -> None:
        if type(optimizer) is kind:
            steps[-1].after.extend(everything(optimizer))

    hooks = [
        register_optimizer_step_pre_hook(before_step),
        register_optimizer_step_post_hook(after_step),
    ]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


def exchange(own: Sequence[Any], others: Sequence[Any]) -> None:
    """Replace gradients by the others', to which they must be close."""
    assert [g is None for g in own] == [g is None for g in others]
    pairs = [(g, other) for g, other in zip(own, others, strict=True) if g is not None]
    largest = max(float(other.abs().max()) for _, other in pairs)
    for i, (g, other) in enumerate(pairs):
        error = float((g - other).abs().max())
        assert error <= CLOSE * largest, f"gradient {i} is wrong by {error:.3g} of {largest:.3g}"
        g.copy_(other)


def beside_torch(kind: Any, train: Callable[[Any], Any]) -> Any:
    """Train with torch's optimizer, then with ours, compare each step, and return ours' result."""
    with recorded(STOCK[kind]) as theirs:
        train(STOCK[kind])
    with recorded(kind, theirs) as ours:
        result = train(kind)
    assert len(ours) == len(theirs) > 2
    for count, (step, stock) in enumerate(zip(ours, theirs, strict=True), 1):
        assert step.options == stock.options
        each = zip(stock.options, step.after, stock.after, strict=True)
        for i, (options, mine, other) in enumerate(each):
            assert sorted(mine) == sorted(other), f"step {count}, parameter {i}: names"
            for name, expected in other.items():
                largest = float(np.max(np.abs(expected), initial=0.0))
                scale = OF_UPDATES * float(options["lr"])
                atol = scale if name == "param" else OF_MOMENTS * largest
                what = f"step {count}, {name} of parameter {i}"
                np.testing.assert_allclose(mine[name], expected, 1e-5, atol, err_msg=what)
    return result
