# SPDX-License-Identifier: MIT
"""`global_norm`: its order of additions, its arguments, and its agreement with a step's norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
from fusedadam import Adam, global_norm
from helpers import FLOATS, Array, Placed, misaligned, read_only, running, values

PARALLEL = 70_001  # more elements than run on a single thread


def spread(rng: np.random.Generator, n: int, dtype: str) -> Array:
    """Large numbers among ones nearly lost beside them, so that the order affects the sum."""
    g = np.where(rng.random(n) < 20 / max(n, 1), 2.0**26, rng.uniform(0.5, 2, n))
    return np.asarray(g * rng.choice([-1, 1], n), dtype)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "n", [0, 1, 5, 15, 16, 17, 31, 1023, 1024, 1025, 1040, 5000, PARALLEL, 200_003]
)
def test_norm_is_added_in_the_promised_order(rng: np.random.Generator, n: int, dtype: str) -> None:
    for offset in (0, 3):
        g = spread(rng, n, dtype)
        assert global_norm([Placed(g, offset).array]) == oracle.global_norm([g])


@pytest.mark.usefixtures("threads")
def test_norm_of_more_than_4096_tiles(rng: np.random.Generator) -> None:
    g = spread(rng, 2 * 4096 * 1024 + 5_000, "float32")  # blocks of three tiles, the last one short
    assert global_norm([g]) == oracle.global_norm([g])


@pytest.mark.usefixtures("isa", "threads")
def test_norm_of_mixed_arrays(rng: np.random.Generator) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 5), (1025,), (2, 0, 3), (PARALLEL,), (7, 5_001)]
    arrays = [values(rng, shape, dtype) for shape in shapes for dtype in FLOATS]
    assert global_norm(arrays) == oracle.global_norm(arrays)
    assert global_norm(tuple(arrays)) == oracle.global_norm(arrays)
    assert global_norm(iter(arrays)) == oracle.global_norm(arrays)
    assert global_norm(arrays[::-1]) == oracle.global_norm(arrays[::-1])


def test_norm_of_many_small_arrays(rng: np.random.Generator) -> None:
    arrays = [values(rng, int(n), FLOATS[int(n) % 2]) for n in rng.integers(0, 130, 900)]
    assert global_norm(arrays) == oracle.global_norm(arrays)


def test_plain_cases() -> None:
    assert global_norm([]) == 0.0
    assert global_norm([np.zeros((0, 3))]) == 0.0
    assert global_norm([np.array([3.0, 4.0]), np.array([12.0], "float32")]) == 13.0
    assert global_norm([np.array(-2.5)]) == 2.5
    assert type(global_norm([np.ones(4, "float32")])) is float


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "Fortran": np.asfortranarray,
    "transposed": lambda a: a.T.copy().T,
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "strided": lambda a: np.repeat(a, 3, axis=1)[:, ::3],
    "rows apart": lambda a: np.repeat(a, 2, axis=0)[::2],
    "misaligned": misaligned,
    "read-only": read_only,
    "subclass": lambda a: a.view(type("Mine", (np.ndarray,), {})),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(
    rng: np.random.Generator, dtype: str, layout: Callable[[Array], Array]
) -> None:
    a = spread(rng, 250 * 201, dtype).reshape(250, 201)
    given = layout(a)
    np.testing.assert_array_equal(given, a)
    assert global_norm([given, a[0]]) == oracle.global_norm([a, a[0]])
    np.testing.assert_array_equal(given, a)


def test_broadcast_array(rng: np.random.Generator) -> None:
    a = np.broadcast_to(values(rng, 300, "float32"), (200, 300))
    assert global_norm([a]) == oracle.global_norm([a])


@pytest.mark.usefixtures("isa")
def test_float32_squares_neither_overflow_nor_underflow() -> None:
    # In float32, 1e30 squared overflows and 1e-30 squared underflows.
    for x in (1e30, 1e-30, float(np.finfo("float32").max), float(np.float32(1e-45))):
        a = np.full(100, x, "float32")
        assert global_norm([a]) == pytest.approx(10 * float(a[0]), rel=1e-15, abs=0.0)
    many = np.full(200_000, 3e38, "float32")
    with np.errstate(over="ignore"):
        assert np.isinf(np.sqrt(np.sum(many * many)))
    assert global_norm([many]) == pytest.approx(math.sqrt(200_000) * float(many[0]), rel=1e-13)


def test_small_numbers_are_not_lost_in_a_long_sum() -> None:
    # A float32 sum of ones stops at 2**24.
    assert global_norm([np.ones(2**24 + 2**12, "float32")]) == math.sqrt(2**24 + 2**12)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nans(dtype: str) -> None:
    a = np.ones(2000, dtype)
    a[1500] = -np.inf
    assert global_norm([a]) == math.inf
    a[3] = np.nan
    assert math.isnan(global_norm([np.ones(3), a]))
    assert global_norm([np.array([1e200, 1.0])]) == math.inf


def test_the_error_state_of_numpy_does_not_matter() -> None:
    with np.errstate(all="raise"):
        assert global_norm([np.array([1e200, 5e-324])]) == math.inf


def test_isas_and_threads_change_no_bit(rng: np.random.Generator, isa: str, threads: int) -> None:
    arrays = [spread(rng, PARALLEL, dtype) for dtype in FLOATS]
    with running(isa=fusedadam.supported_isas()[-1], threads=1):
        alone = global_norm(arrays)
    assert (isa, threads, global_norm(arrays)) == (isa, threads, alone)


def test_it_is_the_norm_that_clipnorm_bounds(rng: np.random.Generator) -> None:
    grads = [values(rng, PARALLEL, "float32"), values(rng, 1000, "float64")]
    n = global_norm(grads)
    above = Adam(clipnorm=float(np.nextafter(n, np.inf))).get_gradients(grads, grads)
    assert all(np.array_equal(a, g) for a, g in zip(above, grads, strict=True))
    below = Adam(clipnorm=n / 2).get_gradients(grads, grads)
    assert all(np.array_equal(a, g * g.dtype.type(0.5)) for a, g in zip(below, grads, strict=True))


def test_tensors(rng: np.random.Generator) -> None:
    torch: Any = pytest.importorskip("torch", reason="norms of tensors need torch")
    a, b = values(rng, (30, 50), "float32"), values(rng, 7, "float64")
    tensors = [torch.tensor(a, requires_grad=True), torch.tensor(b), b]
    assert global_norm(tensors) == oracle.global_norm([a, b, b])
    assert global_norm([torch.tensor(a.T.copy()).T]) == oracle.global_norm([a])
    expanded = torch.ones((), dtype=torch.float64).expand(40, 10)
    assert global_norm([expanded]) == 20.0
    assert global_norm([torch.tensor(a)[:, ::7]]) == oracle.global_norm([a[:, ::7]])


# -- refused calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        np.ones(3, "int64"),
        np.ones(3, "complex64"),
        np.ones(3, "longdouble"),
        np.ones(3, "bool"),
        np.ones(3, ">f4" if np.dtype("<f4").isnative else "<f4"),
        np.array(["x"]),
        "text",
        None,
        object(),
        [[1.0], [1.0, 2.0]],
    ],
    ids=lambda bad: str(getattr(bad, "dtype", bad))[:12],
)
def test_array_of_another_kind(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"(?s)arrays\[1\].*Received: "):
        global_norm([np.ones(3), bad])


@pytest.mark.parametrize("bad", [None, 1.0, "text", np.ones(3)], ids=lambda b: type(b).__name__)
def test_arrays_that_are_no_sequence(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"(?s)\barrays\b.*Received: "):
        global_norm(bad)
