# SPDX-License-Identifier: MIT
"""Sparse gradients in `fusedadam.torch`: lazy as in `torch.optim.SparseAdam`, with dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import Array, assert_same_bits, running

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import Training, array, drawn, drawn_rows

ROWS, WIDTH = 50, 6

Draw = Callable[[np.random.Generator], Array]
INDICES: dict[str, Draw] = {
    "unsorted and repeated": lambda rng: rng.integers(0, ROWS, 12),
    "each once": lambda rng: rng.permutation(ROWS)[:12],
    "one row many times": lambda rng: np.full(9, rng.integers(0, ROWS)),
    "all rows": lambda rng: rng.permutation(ROWS),
    "first and last": lambda _: np.array([ROWS - 1, 0]),
    "none, some, none": lambda rng: rng.integers(0, ROWS, 5 * int(rng.integers(0, 2))),
}
DRAWS = list(INDICES.values())


@pytest.mark.parametrize("of", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-2, "maximize": True},
        {"lr": torch.tensor(0.02, dtype=torch.float64)},
    ],
    ids=["plain", "others", "lr as a tensor"],
)
def test_beside_sparse_adam(options: dict[str, Any], of: Draw) -> None:
    training = Training(Adam, [(ROWS, WIDTH)], "float64", **options)
    (p,) = training.params
    q = p.detach().clone().requires_grad_()
    theirs = torch.optim.SparseAdam([q], **copy.deepcopy(options))
    for i in range(20):
        q.grad = drawn_rows(training.rng, of(training.rng), p)
        training.step([q.grad.coalesce() if i % 3 == 0 else q.grad])
        theirs.step()
    ours, state = training.state[0], theirs.state[q]
    assert isinstance(ours["step"], torch.Tensor)
    assert ours["step"].item() == state["step"] == 20
    pairs = (p, q), *((ours[name], state[name]) for name in ("exp_avg", "exp_avg_sq"))
    for a, b in pairs:
        np.testing.assert_allclose(array(a), array(b), rtol=1e-11, atol=1e-11)


EXTRAS: dict[str, Any] = {"max_grad_norm": 0.5, "ema_decay": 0.9}
OPTIONS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "plain": (Adam, "float32 float64 bfloat16 float16", {}),
    "decay apart": (AdamW, "float32 float64 bfloat16", {"weight_decay": 0.1}),
    "decay in the gradient": (Adam, "float32 float64", {"weight_decay": 0.1}),
    "amsgrad": (Adam, "float32 float64 bfloat16", {"amsgrad": True, "betas": (0.5, 0.5)}),
    "ascent": (Adam, "float32 float64", {"maximize": True}),
    "averages": (Adam, "float32 float64 bfloat16 float16", {"ema_decay": 0.9}),
    "norm": (Adam, "float32 float64 float16", {"max_grad_norm": 0.5}),
    "zeroing": (Adam, "float32 bfloat16", {"zero_grad_in_step": True}),
    "all at once": (
        AdamW,
        "float32 float64 bfloat16",
        {"weight_decay": 0.1, "amsgrad": True, "maximize": True, **EXTRAS},
    ),
    "float32": (AdamW, "bfloat16 float16", {"moments": "float32", **EXTRAS}),
    "bfloat16": (AdamW, "bfloat16 float16 float32", {"moments": "bfloat16"}),
    "bfloat16 + int16": (AdamW, "bfloat16", {"moments": "bfloat16", "low_bits": "int16", **EXTRAS}),
    "packed": (AdamW, "bfloat16 float16 float32", {"moments": "packed", **EXTRAS}),
    "packed + int8": (AdamW, "bfloat16", {"moments": "packed", "low_bits": "int8", **EXTRAS}),
}


@pytest.mark.parametrize(("kind", "dtypes", "options"), OPTIONS.values(), ids=OPTIONS)
def test_bits_of_the_oracle(kind: Any, dtypes: str, options: dict[str, Any]) -> None:
    # A table for each way to draw indices, and a matrix with dense gradients. At every third step,
    # all gradients are dense: sparse and dense steps follow their own rules, over one state.
    training = Training(kind, [(ROWS, WIDTH)] * 7, dtypes, **options)
    for i in range(6):
        grads = training.grads()
        if i % 3 != 2:
            grads = [
                drawn_rows(training.rng, DRAWS[k % 7](training.rng), p) if k % 7 < 6 else g
                for k, (p, g) in enumerate(zip(training.params, grads, strict=True))
            ]
        training.step(grads)


@pytest.mark.parametrize("threads", [1, 3])
def test_shapes_of_tables_and_threads(threads: int) -> None:
    shapes = [(5_000, 8), (1000, 3, 5), (1000,), (4, 0), (1, 5), (40_000,)]
    training = Training(Adam, shapes, max_grad_norm=1.0)
    with running(threads=threads):
        for _ in range(2):
            some = [training.rng.integers(0, len(p), 4 * len(p) // 5) for p in training.params]
            pairs = list(zip(some, training.params, strict=True))[:-1]
            rows = [drawn_rows(training.rng, indices, p) for indices, p in pairs]
            training.step([*rows, drawn(training.rng, (40_000,), "float32")])


def test_zeroed_gradient_takes_what_the_next_pass_adds() -> None:
    table = torch.nn.Embedding(40, 4, sparse=True)
    training = Training.of(Adam(table.parameters(), zero_grad_in_step=True))
    for i in range(3):
        table(torch.tensor([i, 3, 3])).sum().backward()
        training.stepped([table.weight.grad.clone()], training.optimizer.step)


@pytest.mark.parametrize(
    "spread",
    [
        lambda rows: rows,
        lambda rows: rows.t().contiguous().t(),
        lambda rows: torch.stack([rows] * 2, dim=-1)[..., 0],
        lambda rows: rows[:1].expand(len(rows), -1),
    ],
    ids=["contiguous", "transposed", "with gaps", "expanded"],
)
def test_gradient_of_any_layout_is_left_as_it_was(spread: Callable[[Any], Any]) -> None:
    training = Training(Adam, [(ROWS, WIDTH)], max_grad_norm=0.1)
    (p,) = training.params
    indices = INDICES["unsorted and repeated"](training.rng)
    rows = spread(drawn(training.rng, (len(indices), WIDTH), "float32"))
    index = torch.tensor(np.stack([indices, indices], axis=1)).t()[:1]
    p.grad = given = torch.sparse_coo_tensor(index, rows, p.shape, check_invariants=True)
    before = array(rows)
    training.stepped([given.clone()], training.optimizer.step)
    assert not given.is_coalesced()
    assert_same_bits(array(given._values()), before)
    assert given._indices()[0].tolist() == indices.tolist()


# -- refused calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("row", [ROWS, -1, 2**40, -(2**62)])
def test_row_that_the_table_lacks(row: int) -> None:
    # torch does not validate indices of an unchecked sparse tensor.
    training = Training(Adam, [(5,), (ROWS, WIDTH)])
    with training.refused(r"(?s)\[1\].*Received: ", (ValueError, IndexError)):
        training.params[0].grad = torch.ones(5)
        index, rows = torch.tensor([[3, row]]), torch.ones(2, WIDTH)
        training.params[1].grad = torch.sparse_coo_tensor(
            index, rows, (ROWS, WIDTH), check_invariants=False
        )
        training.optimizer.step()


@pytest.mark.parametrize("low_bits", ["int8", None])
def test_error_after_a_change_of_formats_changes_nothing(low_bits: str | None) -> None:
    # Of so many weights, some are rounded to another bfloat16 with int8.
    training = Training(AdamW, [(2000,)], "bfloat16", low_bits="int16")
    training.step()
    with training.refused(r"indices.*Received: ", ValueError, spoilt=False):
        training.optimizer.param_groups[0].update(moments="packed", low_bits=low_bits)
        (p,) = training.params
        p.grad = torch.ones(2000, dtype=torch.bfloat16).to_sparse()
        p.grad._indices()[0, 0] = 10**6  # out of range
        training.optimizer.step()
    training.step()
