# SPDX-License-Identifier: MIT
"""`apply_sparse`: gradients of some rows of a table, in lazy and in dense mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
from configurations import FORMATS, OPTIONS
from forms import FORMS
from fusedadam import Adam
from helpers import FLOATS, Array, Placed, assert_same_bits, misaligned, read_only, values
from training import Training

STEPPED = [o for o in OPTIONS if o.get("gradient_accumulation_steps", 1) == 1]
MANY: dict[str, Any] = {"clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True, "zero_grad": True}
modes = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "dense"])


def table(shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> Training:
    return Training([(shape, dtype)], **options)


def apply(training: Training, indices: Any, *, lazy: bool) -> None:
    """Apply drawn gradients of these rows, and look at the memory around them."""
    (param,) = training.params
    rows = Placed(values(training.rng, (len(indices), *param.shape[1:]), str(param.dtype)), 3)
    training.call_rows(indices, rows.array, lazy=lazy)
    rows.assert_canaries_alive()


@modes
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, options) for options in STEPPED for dtype in FLOATS),
        ("float32", {"excluded": [0], "weight_decay": 0.5, "l2": 0.5}),
        *(("bfloat16", {"clipnorm": 0.1, "use_ema": True, **formats}) for formats in FORMATS),
        ("float16", {"moments": "auto"}),
    ],
    ids=str,
)
def test_sparse_step_equals_oracle(
    rng: np.random.Generator, options: dict[str, Any], dtype: str, lazy: bool
) -> None:
    training = table((50, 7), dtype, **options)
    for _ in range(4):
        # 40 draws from 30 rows: some are repeated, and some rows are never named.
        apply(training, rng.integers(5, 35, 40), lazy=lazy)


@modes
@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("options", [{}, MANY], ids=["plain", "many"])
@pytest.mark.parametrize(
    ("shape", "count"), [((5_000, 16), 3_000), ((40, 1_501), 60), ((3, 40), 3_000)], ids=str
)
def test_sparse_step_of_a_large_table(
    rng: np.random.Generator, shape: tuple[int, int], count: int, options: Any, lazy: bool
) -> None:
    training = table(shape, **options)
    placed = Placed(training.params[0], 5)
    training.params = [placed.array]
    apply(training, rng.integers(0, shape[0], count), lazy=lazy)
    apply(training, rng.permutation(shape[0])[:count], lazy=lazy)
    placed.assert_canaries_alive()


@modes
@pytest.mark.parametrize("row", [(), (1,), (3,), (16,), (2, 3), (4, 1, 2), (1025,), (0,)], ids=str)
def test_rows_of_any_shape(rng: np.random.Generator, row: tuple[int, ...], lazy: bool) -> None:
    training = table((20, *row), clipnorm=0.5, amsgrad=True, use_ema=True)
    for _ in range(3):
        apply(training, rng.integers(0, 20, 9), lazy=lazy)


@modes
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("empty", [[], (), np.zeros(0, "int64"), np.zeros(0, "int32")], ids=repr)
def test_no_rows_at_all(empty: Any, count: int, lazy: bool) -> None:
    # It is still a step: it counts, and in dense mode the moments move the table.
    training = table((count, 3), clipnorm=0.5, weight_decay=0.5)
    named = np.arange(count)[:2]
    for indices in (named, empty, named):
        apply(training, indices, lazy=lazy)
    assert training.optimizer.iterations == 3


@modes
def test_one_gradient_keeps_its_sign_of_zero(lazy: bool) -> None:
    # Adding the gradient to a zero would turn -0.0 into 0.0. An m of -0.0 shows it.
    training = table((3, 2), "float64", flush_denormals=False)
    training.optimizer.build(training.params)
    training.reference.m = [np.full((3, 2), -0.0)]
    training.optimizer.set_weights(training.reference.weights())
    training.call_rows(np.array([1]), np.array([[-0.0, 0.0]]), lazy=lazy)
    signs = np.signbit(training.optimizer.weights[1])
    assert signs.tolist() == [[lazy, lazy], [True, False], [lazy, lazy]]


# -- forms of indices and rows ----------------------------------------------------------------

INDICES: dict[str, Callable[[Array], Any]] = {
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


@modes
@pytest.mark.parametrize("form", INDICES.values(), ids=INDICES)
def test_indices_of_any_form(
    rng: np.random.Generator, form: Callable[[Array], Any], lazy: bool
) -> None:
    training = table((30, 4), clipnorm=0.5)
    for _ in range(2):
        apply(training, form(rng.integers(0, 30, 25)), lazy=lazy)
    apply(training, form(np.array([29, 0])), lazy=lazy)


@modes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_of_any_form(
    rng: np.random.Generator, form: Callable[[Array], Any], dtype: str, lazy: bool
) -> None:
    training = table((30, 4), dtype, clipnorm=0.5)
    # With and without repeats. Without them, the rows may be read in place.
    for indices in (rng.integers(0, 30, 25), rng.permutation(30)[:25], np.arange(25)):
        drawn = values(rng, (25, 4), dtype)
        given, kept = form(drawn), np.asarray(form(drawn)).copy()
        # Rounded first, then added up.
        training.reference.apply_sparse(indices, kept.astype(dtype), lazy=lazy)
        training.optimizer.apply_sparse(indices.tolist(), given, *training.params, lazy=lazy)
        training.check()
        np.testing.assert_array_equal(np.asarray(given), kept)


@modes
def test_table_that_was_transposed_in_memory(rng: np.random.Generator, lazy: bool) -> None:
    training = table((6, 4), amsgrad=True)
    training.params = [np.asfortranarray(training.params[0])]
    training.step()
    training.params = [np.ascontiguousarray(training.params[0])]
    apply(training, rng.integers(0, 6, 9), lazy=lazy)
    training.step()
    training.check()


@modes
def test_rows_may_be_those_of_the_table(rng: np.random.Generator, lazy: bool) -> None:
    training = table((20, 3), "float64")
    (param,), indices = training.params, rng.permutation(20)
    training.reference.apply_sparse(indices, param.copy(), lazy=lazy)
    training.optimizer.apply_sparse(indices, param, param, lazy=lazy)
    training.check()


def test_tensor_table(rng: np.random.Generator) -> None:
    torch: Any = pytest.importorskip("torch", reason="a table that is a tensor needs torch")
    start, rows = values(rng, (10, 3), "float32"), values(rng, (4, 3), "float32")
    adam, reference = Adam(), oracle.OracleAdam([start])
    param = torch.tensor(start, requires_grad=True)
    forms = (np.asarray, torch.tensor, functools.partial(torch.tensor, dtype=torch.int32))
    for first, form in enumerate(forms):
        indices = np.array([1, 7, 1, 0]) + first
        reference.apply_sparse(indices, rows, lazy=True)
        version = param._version
        adam.apply_sparse(form(indices), torch.tensor(rows), param)
        assert param._version > version
    assert_same_bits(param.detach().numpy(), reference.params[0])


@modes
@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"loss_scale": "dynamic"}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("threads")
def test_rows_that_are_not_finite_skip_the_step(
    rng: np.random.Generator, options: dict[str, Any], bad: float, lazy: bool
) -> None:
    training = table((2_000, 8), zero_grad=True, **options)
    largest = np.full((2, 8), np.finfo("float32").max, "float32")
    for last in (1.0, bad, 1.0):
        rows = values(rng, (4_200, 8), "float32")
        rows[-1, 7] = last
        training.call_rows(rng.integers(0, 2_000, 4_200), rows, lazy=lazy)
    training.call_rows(np.array([1, 1]), largest, lazy=lazy)  # whose sum overflows
    assert (training.optimizer.iterations, training.optimizer.skipped_steps) == (2, 2)
