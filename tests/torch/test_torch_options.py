# SPDX-License-Identifier: MIT
"""Options compared with torch's equivalents: same meaning, equal up to rounding, in all state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam, global_norm
from helpers import Array, values

torch: Any = pytest.importorskip("torch")

SHAPES = [(40, 7), (7,), (3, 2, 5)]
EPS = 1e-8
STEPS = 60
# About a hundred roundings per step, relative to values that do not cancel.
RTOL = 1e-11


def pair(rng: np.random.Generator) -> tuple[list[Array], list[Any]]:
    """The same parameters for both optimizers."""
    ours = [values(rng, shape, "float64") + 0.5 for shape in SHAPES]
    theirs = [torch.tensor(p, requires_grad=True) for p in ours]
    return ours, theirs


def take_steps(
    rng: np.random.Generator, adam: Adam, ours: list[Array], theirs: list[Any], step: Any
) -> None:
    """Step both with the same gradients. `step` steps torch's, whose gradients are set."""
    for t in range(1, STEPS + 1):
        grads = [values(rng, shape, "float64") for shape in SHAPES]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = torch.tensor(g)
        step()
        adam.epsilon = EPS * math.sqrt(1 - adam.beta_2**t)
        adam.apply_gradients(zip(grads, ours, strict=True))


def assert_close(ours: list[Array], theirs: list[Any], rtol: float = RTOL) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=rtol, atol=rtol * 1e-3)


@pytest.mark.parametrize(
    ("ours_options", "kind", "theirs_options"),
    [
        ({"weight_decay": 0.1}, "AdamW", {"weight_decay": 0.1}),
        ({"l2": 0.1}, "Adam", {"weight_decay": 0.1}),
        ({"amsgrad": True}, "Adam", {"amsgrad": True}),
        ({"maximize": True, "l2": 0.1}, "Adam", {"maximize": True, "weight_decay": 0.1}),
        (
            {"amsgrad": True, "weight_decay": 0.01, "maximize": True},
            "AdamW",
            {"amsgrad": True, "weight_decay": 0.01, "maximize": True},
        ),
    ],
    ids=str,
)
def test_options_of_torch_optimizers(
    rng: np.random.Generator,
    ours_options: dict[str, Any],
    kind: str,
    theirs_options: dict[str, Any],
) -> None:
    ours, theirs = pair(rng)
    adam = Adam(lr=0.01, **ours_options)
    optimizer = getattr(torch.optim, kind)(theirs, lr=0.01, eps=EPS, **theirs_options)
    take_steps(rng, adam, ours, theirs, optimizer.step)
    assert_close(ours, theirs)
    states = [optimizer.state[p] for p in theirs]
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(ours_options.get("amsgrad"))
    assert_close(adam.weights[1:], [state[name] for name in names for state in states])


def test_clipping_and_averages(rng: np.random.Generator) -> None:
    ours, theirs = pair(rng)
    adam = Adam(lr=0.01, clipnorm=0.7, use_ema=True, ema_momentum=0.9)
    optimizer = torch.optim.Adam(theirs, lr=0.01, eps=EPS)
    averages = [p.detach().clone() for p in theirs]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        optimizer.step()
        # The first average is the parameter itself.
        weight = 1.0 if optimizer.state[theirs[0]]["step"] == 1 else 1 - 0.9
        torch._foreach_lerp_(averages, [p.detach() for p in theirs], weight)

    take_steps(rng, adam, ours, theirs, step)
    # torch adds 1e-6 to the norm.
    assert_close(ours, theirs, rtol=1e-5)
    assert_close(adam.ema, averages, rtol=1e-5)


def test_norm(rng: np.random.Generator) -> None:
    arrays = [values(rng, shape, dtype) for shape in SHAPES for dtype in ("float32", "float64")]
    tensors = [torch.tensor(a) for a in arrays]
    expected = torch.nn.utils.get_total_norm([t.double() for t in tensors])
    assert global_norm(tensors) == global_norm(arrays)
    np.testing.assert_allclose(global_norm(tensors), expected.item(), rtol=1e-13)


def test_lazy_rows_are_those_of_sparse_adam(rng: np.random.Generator) -> None:
    ours = values(rng, (50, 6), "float64")
    theirs = torch.tensor(ours, requires_grad=True)
    # SparseAdam's epsilon is the paper's "epsilon hat" as well.
    adam, optimizer = Adam(lr=0.01, epsilon=EPS), torch.optim.SparseAdam([theirs], lr=0.01, eps=EPS)
    for step in range(STEPS):
        indices = rng.integers(0, 50, 12)
        rows = values(rng, (12, 6), "float64")
        theirs.grad = torch.sparse_coo_tensor(
            indices[None], torch.tensor(rows), (50, 6), check_invariants=True
        )
        optimizer.step()
        given: Any = torch.tensor if step % 2 else np.asarray
        adam.apply_sparse(given(indices), given(rows), ours)
    state = optimizer.state[theirs]
    assert_close([ours, *adam.weights[1:]], [theirs, state["exp_avg"], state["exp_avg_sq"]])
