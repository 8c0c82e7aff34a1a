# SPDX-License-Identifier: MIT
"""`apply_sparse`: gradients of some rows of a table, in lazy and in dense mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from fusedadam import Adam
from helpers import (
    FLOATS,
    Array,
    Placed,
    assert_all_same_bits,
    assert_same_bits,
    halving,
    misaligned,
    read_only,
    values,
)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"decay": 0.5},
    {"amsgrad": True, "beta_2": 0.5},
    {"weight_decay": 0.1},
    {"l2": 0.1},
    {"clipnorm": 0.5},
    {"clipnorm": 1e30},
    {"clipnorm_per_tensor": 0.5},
    {"clipvalue": 0.05},
    {"use_ema": True, "ema_momentum": 0.75},
    {"use_ema": True, "ema_overwrite_frequency": 2},
    {"loss_scale": 8.0},
    {"loss_scale": "dynamic", "clipnorm": 1e-4},
    {"skip_nonfinite": True},
    {"gradient_accumulation_steps": 1},
    {"zero_grad": True},
    {"maximize": True},
    {"flush_denormals": False},
    {"lr": halving},
    {
        "amsgrad": True,
        "weight_decay": 0.1,
        "l2": 0.2,
        "clipnorm": 0.5,
        "clipvalue": 0.1,
        "use_ema": True,
        "ema_overwrite_frequency": 3,
        "loss_scale": "dynamic",
        "zero_grad": True,
        "maximize": True,
    },
]
modes = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "dense"])


class Table:
    """A table and its optimizer, with the oracle and with dense steps of another optimizer."""

    def __init__(self, table: Array, *, excluded: bool = False, **options: Any) -> None:
        self.table = table
        self.reference = oracle.OracleAdam([table], excluded=[0] if excluded else [], **options)
        self.optimizer = Adam(**options)
        if excluded:
            self.optimizer.exclude_from_weight_decay([table])

    def apply(self, indices: Any, rows: Array, *, lazy: bool) -> None:
        kept = np.array(indices)
        left = self.reference.apply_sparse(kept, rows, lazy=lazy)
        count = self.optimizer.apply_sparse(indices, rows, self.table, lazy=lazy)
        assert count == self.reference.iterations
        assert_same_bits(rows, left, "grad_rows after the call")
        assert_same_bits(np.array(indices), kept, "indices")
        self.check()

    def check(self) -> None:
        assert_all_same_bits([self.table], self.reference.params, "table")
        assert_all_same_bits(self.optimizer.weights, self.reference.weights(), "weights")
        assert_all_same_bits(self.optimizer.ema, self.reference.ema, "ema")
        assert self.optimizer.skipped_steps == self.reference.skipped_steps
        assert self.optimizer.current_loss_scale == self.reference.current_loss_scale


@modes
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sparse_step_equals_oracle(
    rng: np.random.Generator, options: dict[str, Any], dtype: str, lazy: bool
) -> None:
    t = Table(values(rng, (50, 7), dtype), **options)
    for _ in range(4):
        # 40 draws from 30 rows: some are repeated, and some rows are never named.
        t.apply(rng.integers(5, 35, 40), values(rng, (40, 7), dtype), lazy=lazy)


@modes
@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize(
    "options",
    [{}, {"clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True, "zero_grad": True}],
    ids=["plain", "many"],
)
@pytest.mark.parametrize(("shape", "count"), [((9_000, 16), 5_000), ((40, 3_001), 60)], ids=str)
def test_sparse_step_of_a_large_table(
    rng: np.random.Generator,
    shape: tuple[int, int],
    count: int,
    options: dict[str, Any],
    lazy: bool,
) -> None:
    t = Table(values(rng, shape, "float32"), **options)
    for _ in range(2):
        rows = values(rng, (count, shape[1]), "float32")
        t.apply(rng.integers(0, shape[0], count), rows, lazy=lazy)


@modes
@pytest.mark.parametrize("row", [(), (1,), (3,), (16,), (2, 3), (4, 1, 2), (1025,), (0,)], ids=str)
def test_rows_of_any_shape(rng: np.random.Generator, row: tuple[int, ...], lazy: bool) -> None:
    t = Table(values(rng, (20, *row), "float32"), clipnorm=0.5, amsgrad=True, use_ema=True)
    for _ in range(3):
        t.apply(rng.integers(0, 20, 9), values(rng, (9, *row), "float32"), lazy=lazy)


def as_dense(table: Array, indices: Array, rows: Array) -> Array:
    g = np.zeros_like(table)
    named, summed = oracle.sum_rows(indices, rows)
    g[named] = summed
    return g


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("shape", [(60, 5), (3_000, 20)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense_mode_is_the_dense_step(
    rng: np.random.Generator, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    sparse, dense = (values(np.random.default_rng(1), shape, "float32") for _ in range(2))
    ours, theirs = Adam(**options), Adam(**options)
    for _ in range(3):
        indices = rng.integers(0, shape[0], shape[0] // 2)
        rows = values(rng, (len(indices), shape[1]), "float32")
        theirs.apply_gradients([(as_dense(dense, indices, rows), dense)])
        ours.apply_sparse(indices, rows, sparse, lazy=False)
    assert_same_bits(sparse, dense)
    assert_all_same_bits(ours.weights, theirs.weights)
    assert_all_same_bits(ours.ema, theirs.ema)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "zero_grad" not in o], ids=str)
def test_lazy_step_of_every_row_is_the_dense_step(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    sparse, dense = (values(np.random.default_rng(1), (30, 4), "float64") for _ in range(2))
    ours, theirs = Adam(**options), Adam(**options)
    for _ in range(3):
        g, order = values(rng, (30, 4), "float64"), rng.permutation(30)
        theirs.apply_gradients([(g, dense)])
        ours.apply_sparse(order, g[order], sparse)
    assert_same_bits(sparse, dense)
    assert_all_same_bits(ours.weights, theirs.weights)
    assert_all_same_bits(ours.ema, theirs.ema)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.5, "l2": 0.5, "use_ema": True, "amsgrad": True}], ids=str
)
def test_lazy_step_touches_the_rows_named_and_no_other(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    placed = Placed(values(rng, (100, 3), "float32"), 5)
    adam = Adam(**options)
    adam.build([placed.array])
    for _ in range(2):
        everything = [placed.array, *adam.weights[1:], *adam.ema]
        before = [a.copy() for a in everything]
        named = rng.choice(100, 20, replace=False)
        adam.apply_sparse(named, values(rng, (20, 3), "float32") + 3, placed.array)
        others = np.setdiff1d(np.arange(100), named)
        for a, old in zip(everything, before, strict=True):
            assert_same_bits(a[others], old[others])
            assert (a[named] != old[named]).all()
    placed.assert_canaries_alive()


def test_lazy_is_the_default() -> None:
    table = np.ones((3, 2))
    adam = Adam()
    for i in (0, 1):
        assert adam.apply_sparse(np.array([i]), np.ones((1, 2)), table) == i + 1
    m = adam.weights[1]
    assert m[0, 0] == 1 - 0.9  # the second step did not decay it
    np.testing.assert_array_equal(table[2], 1.0)


# -- repeats and order ------------------------------------------------------------------------


@modes
def test_repeated_rows_are_added_in_order(lazy: bool) -> None:
    # In float32, 1e8 + 1 is 1e8, so the 1 only survives in some orders.
    for terms, total in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        table = np.zeros((4, 1), "float32")
        adam = Adam(beta_1=0.5)
        adam.apply_sparse(
            np.array([2, 2, 2]), np.array(terms, "float32").reshape(3, 1), table, lazy=lazy
        )
        assert_same_bits(adam.weights[1], np.array([[0], [0], [total / 2], [0]], "float32"), "m")


@modes
def test_one_gradient_keeps_its_sign_of_zero(lazy: bool) -> None:
    # Adding the gradient to a zero would turn -0.0 into 0.0. An m of -0.0 shows it.
    t = Table(np.ones((3, 2)), flush_denormals=False)
    t.optimizer.build([t.table])
    t.reference.m = [np.full((3, 2), -0.0)]
    t.optimizer.set_weights(t.reference.weights())
    t.apply(np.array([1]), np.array([[-0.0, 0.0]]), lazy=lazy)
    signs = np.signbit(t.optimizer.weights[1])
    assert signs.tolist() == [[lazy, lazy], [True, False], [lazy, lazy]]


@modes
@pytest.mark.usefixtures("threads")
def test_order_of_different_rows_does_not_matter(rng: np.random.Generator, lazy: bool) -> None:
    results = []
    indices, rows = rng.permutation(5_000)[:3_000], values(rng, (3_000, 12), "float32")
    for order in (np.arange(3_000), rng.permutation(3_000), np.argsort(indices)):
        table = np.ones((5_000, 12), "float32")
        adam = Adam(clipnorm=0.5)
        adam.apply_sparse(indices[order], rows[order], table, lazy=lazy)
        results.append([table, *adam.weights])
    for result in results[1:]:
        assert_all_same_bits(result, results[0])


@modes
@pytest.mark.usefixtures("isa", "threads")
def test_one_row_many_times(rng: np.random.Generator, lazy: bool) -> None:
    t = Table(values(rng, (3, 40), "float32"), clipnorm=1.0)
    t.apply(np.full(3_000, 1), values(rng, (3_000, 40), "float32"), lazy=lazy)


@modes
@pytest.mark.usefixtures("threads")
def test_norm_is_that_of_the_summed_rows(lazy: bool) -> None:
    # Row 1 gets (3, 0) + (0, 4), row 0 gets (12, 0): a norm of 13, not that of three gradients.
    table = np.zeros((3, 2))
    adam = Adam(clipnorm=6.5, beta_1=0.5)
    adam.apply_sparse(
        np.array([1, 0, 1]), np.array([[3.0, 0.0], [12.0, 0.0], [0.0, 4.0]]), table, lazy=lazy
    )
    np.testing.assert_array_equal(adam.weights[1], [[3.0, 0.0], [0.75, 1.0], [0.0, 0.0]])


# -- forms of indices and rows ----------------------------------------------------------------

INDICES: dict[str, Callable[[Array], Any]] = {
    "int64": lambda i: i,
    "int32": lambda i: i.astype("int32"),
    "strided": lambda i: np.repeat(i, 3)[::3],
    "int32 strided": lambda i: np.repeat(i.astype("int32"), 2)[::2],
    "reversed": lambda i: i[::-1].copy()[::-1],
    "a column": lambda i: np.stack([i, i * 0 + 99], axis=1)[:, 0],
    "misaligned": misaligned,
    "read-only": read_only,
    "list": lambda i: i.tolist(),
    "tuple of NumPy's integers": tuple,
}
ROWS: dict[str, Callable[[Array], Array]] = {
    "Fortran": np.asfortranarray,
    "strided": lambda r: np.repeat(r, 2, axis=1)[:, ::2],
    "rows apart": lambda r: np.repeat(r, 3, axis=0)[::3],
    "reversed": lambda r: r[::-1, ::-1].copy()[::-1, ::-1],
    "misaligned": misaligned,
    "read-only": read_only,
}


@modes
@pytest.mark.parametrize("form", INDICES.values(), ids=INDICES)
def test_indices_of_any_layout(
    rng: np.random.Generator, form: Callable[[Array], Any], lazy: bool
) -> None:
    t = Table(values(rng, (30, 4), "float32"), clipnorm=0.5)
    for _ in range(2):
        indices = form(rng.integers(0, 30, 25))
        t.apply(indices, values(rng, (25, 4), "float32"), lazy=lazy)


@modes
@pytest.mark.parametrize("form", ROWS.values(), ids=ROWS)
def test_rows_of_any_layout(
    rng: np.random.Generator, form: Callable[[Array], Array], lazy: bool
) -> None:
    t = Table(values(rng, (30, 4), "float64"), clipnorm=0.5)
    for _ in range(2):
        # With and without repeats. Without them, the rows may be read in place.
        for indices in (rng.integers(0, 30, 25), rng.permutation(30)[:25], np.arange(25)):
            t.apply(indices, form(values(rng, (25, 4), "float64")), lazy=lazy)


CASTS: dict[str, Callable[[Array], Any]] = {
    **{
        dtype: lambda r, dtype=dtype: r.astype(dtype)  # type: ignore[misc]
        for dtype in ("float16", "float32", "float64", "longdouble", ">f4", "int32", "bool")
    },
    "bfloat16": lambda r: r.astype(ml_dtypes.bfloat16),
    "Fortran float64": lambda r: np.asfortranarray(r, "float64"),
    "lists": lambda r: r.tolist(),
}


@modes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_rows_of_another_dtype_are_cast(
    rng: np.random.Generator, cast: Callable[[Array], Any], dtype: str, lazy: bool
) -> None:
    table = values(rng, (30, 4), dtype)
    reference, adam = oracle.OracleAdam([table], clipnorm=0.5), Adam(clipnorm=0.5)
    for indices in (rng.integers(0, 30, 25), rng.permutation(30)[:25], np.arange(25)):
        rows = cast(values(rng, (25, 4), dtype))
        # Rounded first, then added up.
        reference.apply_sparse(indices, np.asarray(rows).astype(dtype), lazy=lazy)
        adam.apply_sparse(indices.tolist(), rows, table, lazy=lazy)
        assert_same_bits(table, reference.params[0])
        assert_all_same_bits(adam.weights, reference.weights())


@modes
@pytest.mark.parametrize("empty", [[], (), np.zeros(0, np.int64)], ids=lambda e: type(e).__name__)
def test_empty_indices(empty: Any, lazy: bool) -> None:
    table = np.ones((3, 2))
    assert Adam().apply_sparse(empty, np.zeros((0, 2)), table, lazy=lazy) == 1
    np.testing.assert_array_equal(table, 1.0)


@modes
def test_broadcast_rows(rng: np.random.Generator, lazy: bool) -> None:
    t = Table(values(rng, (30, 4), "float64"))
    rows = np.broadcast_to(values(rng, 4, "float64"), (10, 4))
    t.apply(rng.integers(0, 30, 10), rows, lazy=lazy)


@modes
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.5, "weight_decay": 0.5}], ids=str)
def test_no_rows_at_all(
    rng: np.random.Generator, options: dict[str, Any], dtype: str, lazy: bool
) -> None:
    # It is still a step: it counts, and in dense mode the moments move the table.
    t = Table(values(rng, (5, 3), "float32"), **options)
    t.apply(np.array([0, 3]), values(rng, (2, 3), "float32"), lazy=lazy)
    t.apply(np.zeros(0, dtype), np.zeros((0, 3), "float32"), lazy=lazy)
    t.apply(np.array([3]), values(rng, (1, 3), "float32"), lazy=lazy)
    assert t.optimizer.iterations == 3


@modes
def test_table_without_rows(lazy: bool) -> None:
    t = Table(np.zeros((0, 3)))
    t.apply(np.zeros(0, np.int64), np.zeros((0, 3)), lazy=lazy)


@modes
def test_first_and_last_row(rng: np.random.Generator, lazy: bool) -> None:
    t = Table(values(rng, (1_000, 3), "float32"))
    t.apply(np.array([999, 0], "int32"), values(rng, (2, 3), "float32"), lazy=lazy)


@modes
def test_rows_may_be_those_of_the_table(rng: np.random.Generator, lazy: bool) -> None:
    table = values(rng, (20, 3), "float64")
    reference = oracle.OracleAdam([table])
    indices = rng.permutation(20)
    reference.apply_sparse(indices, table, lazy=lazy)
    Adam().apply_sparse(indices, table, table, lazy=lazy)
    assert_same_bits(table, reference.params[0])


# -- state ------------------------------------------------------------------------------------


def test_sparse_and_dense_steps_in_turn(rng: np.random.Generator) -> None:
    t = Table(values(rng, (30, 4), "float32"), amsgrad=True, use_ema=True, weight_decay=0.1)
    for lazy in (True, False, True):
        t.apply(rng.integers(0, 30, 12), values(rng, (12, 4), "float32"), lazy=lazy)
        g = values(rng, (30, 4), "float32")
        t.reference.step([g])
        t.optimizer.apply_gradients([(g, t.table)])
        t.check()
    t.optimizer = copy.deepcopy(t.optimizer)
    t.apply(rng.integers(0, 30, 12), values(rng, (12, 4), "float32"), lazy=True)


@modes
def test_table_that_does_not_decay(rng: np.random.Generator, lazy: bool) -> None:
    t = Table(values(rng, (30, 4), "float32"), excluded=True, weight_decay=0.5, l2=0.5)
    for _ in range(2):
        t.apply(rng.integers(0, 30, 12), values(rng, (12, 4), "float32"), lazy=lazy)


@modes
@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"loss_scale": "dynamic"}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("threads")
def test_rows_that_are_not_finite_skip_the_step(
    rng: np.random.Generator, options: dict[str, Any], bad: float, lazy: bool
) -> None:
    t = Table(values(rng, (5_000, 8), "float32"), zero_grad=True, **options)
    for i in range(3):
        rows = values(rng, (6_000, 8), "float32")
        rows[5_999, 7] = bad if i == 1 else 1.0
        t.apply(rng.integers(0, 5_000, 6_000), rows, lazy=lazy)
    assert (t.optimizer.iterations, t.optimizer.skipped_steps) == (2, 1)


@modes
def test_sum_of_rows_that_overflows_skips_the_step(lazy: bool) -> None:
    t = Table(np.zeros((3, 1), "float32"), skip_nonfinite=True)
    largest = np.full((2, 1), np.finfo("float32").max, "float32")
    t.apply(np.array([1, 2]), largest, lazy=lazy)
    t.apply(np.array([1, 1]), largest, lazy=lazy)
    assert (t.optimizer.iterations, t.optimizer.skipped_steps) == (1, 1)


@modes
@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("repeats", [False, True])
def test_rows_are_zeroed(rng: np.random.Generator, repeats: bool, lazy: bool) -> None:
    t = Table(values(rng, (6_000, 9), "float32"), zero_grad=True)
    for _ in range(2):
        rows = Placed(values(rng, (5_000, 9), "float32"), 3)
        indices = rng.integers(0, 6_000, 5_000) if repeats else rng.permutation(6_000)[:5_000]
        t.apply(indices, rows.array, lazy=lazy)
        assert_same_bits(rows.array, np.zeros((5_000, 9), "float32"))
        rows.assert_canaries_alive()


@modes
def test_averages_are_overwritten_for_the_rows_named(rng: np.random.Generator, lazy: bool) -> None:
    t = Table(values(rng, (6, 2), "float64"), use_ema=True, ema_overwrite_frequency=2)
    for named in ([0, 1], [1, 2], [3], [4, 0]):
        rows = values(rng, (len(named), 2), "float64")
        t.apply(np.array(named), rows, lazy=lazy)
        if t.optimizer.iterations % 2 == 0:
            assert_same_bits(t.table[named], t.optimizer.ema[0][named])


def test_tensor_table(rng: np.random.Generator) -> None:
    torch: Any = pytest.importorskip("torch", reason="a table that is a tensor needs torch")
    start, rows = values(rng, (10, 3), "float32"), values(rng, (4, 3), "float32")
    indices = np.array([1, 7, 1, 0])
    reference = oracle.OracleAdam([start])
    table = torch.tensor(start, requires_grad=True)
    adam = Adam()
    for _ in range(2):
        reference.apply_sparse(indices, rows)
        adam.apply_sparse(indices, rows, table)
    assert_same_bits(table.detach().numpy(), reference.params[0])
