# SPDX-License-Identifier: MIT
"""Train with a client of torch's optimizers, once with torch's own optimizer and once with ours.

Two such trainings in float32 do not stay close. If a gradient is zero up to rounding, as for a bias
before a normalization, Adam turns the roundings into full-size steps. So the second training steps
with the gradients of the first, after checking that its own are close to them. Then `Drift` bounds
every parameter and all state after every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from helpers import Array
from torch_helpers import DEFAULTS, STOCK, Drift, everything

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


# Settings for the optimizer of a bfloat16 model.
FORMATS: list[dict[str, Any]] = [{}, {"moments": "packed", "low_bits": "int8"}]


def assert_learnt_in_16_bits(optimizer: Any, losses: Sequence[Any]) -> None:
    """Nothing is stored in more bits, except for counts, and the loss has fallen."""
    assert optimizer.state
    for p, state in optimizer.state.items():
        assert p.dtype == torch.bfloat16
        assert {t.dtype.itemsize for name, t in state.items() if name != "step"} <= {1, 2}
    assert float(losses[-1]) < 0.92 * float(losses[0]), losses


def assert_same_training(actual: Any, expected: Any) -> None:
    """Two optimizers have the same parameters and state, in any dtype."""
    pair = [
        [(p.detach(), dict(o.state[p])) for group in o.param_groups for p in group["params"]]
        for o in (actual, expected)
    ]
    torch.testing.assert_close(*pair, rtol=0, atol=0)


class Step(NamedTuple):
    """The input and the result of a step, for each parameter in order."""

    options: list[dict[str, Any]]
    before: list[Any]
    grads: list[Any]
    after: list[dict[str, Array]]


@contextlib.contextmanager
def recorded(kind: Any, others: Sequence[Step] | None = None) -> Iterator[list[Step]]:
    """Record the steps of optimizers of this class, which use the gradients of the others."""
    steps: list[Step] = []

    def begin(optimizer: Any) -> None:
        groups = optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        if others is not None:
            assert len(steps) < len(others), "more steps than with torch's optimizer"
            exchange([p.grad for p in params], others[len(steps)].grads)
        options = [{n: group[n] for n in DEFAULTS} for group in groups for _ in group["params"]]
        before = [p.detach().clone() for p in params]
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        steps.append(Step(options, before, grads, []))

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
    drifts = [Drift(p, **o) for p, o in zip(theirs[0].before, theirs[0].options, strict=True)]
    for count, (step, stock) in enumerate(zip(ours, theirs, strict=True), 1):
        assert step.options == stock.options
        each = zip(drifts, stock.options, stock.grads, step.after, stock.after, strict=True)
        for i, (drift, options, grad, mine, other) in enumerate(each):
            if grad is not None:
                drift.follow(other, grad, **options)
            drift.check(mine, other, f"step {count}, parameter {i},")
    return result
