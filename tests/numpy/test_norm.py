# SPDX-License-Identifier: MIT
"""`global_norm`: its order of additions, its arguments, and its agreement with a step's norm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
from configurations import LARGE, PARALLEL
from forms import LAYOUTS, Form
from fusedadam import Adam, global_norm
from helpers import FLOATS, Array, Placed, running, values


def spread(rng: np.random.Generator, n: int, dtype: str) -> Array:
    """Large numbers among ones nearly lost beside them, so that the order affects the sum."""
    g = np.where(rng.random(n) < 20 / max(n, 1), 2.0**26, rng.uniform(0.5, 2, n))
    return np.asarray(g * rng.choice([-1, 1], n), dtype)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", [*FLOATS, "float16", "bfloat16"])
@pytest.mark.parametrize("n", [0, 1, 5, 15, 16, 17, 31, 1023, 1025, 5000, PARALLEL, 200_003])
def test_norm_is_added_in_the_promised_order(rng: np.random.Generator, n: int, dtype: str) -> None:
    g = spread(rng, n, dtype) if dtype in FLOATS else values(rng, n, dtype)
    expected = oracle.global_norm([g.astype("float64")])
    for offset in (0, 3):
        assert global_norm([Placed(g, offset).array]) == expected, f"at offset {offset}"


def test_norm_of_more_than_4096_tiles(rng: np.random.Generator) -> None:
    g = spread(rng, 2 * 4096 * 1024 + 5_000, "float32")  # blocks of three tiles, the last one short
    expected = oracle.global_norm([g])
    for threads in (1, 2, 3):
        with running(threads=threads):
            assert global_norm([g]) == expected, f"{threads} threads"


@pytest.mark.usefixtures("isa", "threads")
def test_norm_of_mixed_arrays(rng: np.random.Generator) -> None:
    many = [((int(n),), FLOATS[int(n) % 2]) for n in rng.integers(0, 130, 300)]
    arrays = [values(rng, *of) for of in [*LARGE, *many]]
    expected = oracle.global_norm(arrays)
    assert [global_norm(form(arrays)) for form in (list, tuple, iter)] == [expected] * 3
    assert global_norm(arrays[::-1]) == oracle.global_norm(arrays[::-1])
    above = Adam(clipnorm=float(np.nextafter(expected, np.inf))).get_gradients(arrays, arrays)
    assert all(np.array_equal(a, g) for a, g in zip(above, arrays, strict=True))
    below = Adam(clipnorm=expected / 2).get_gradients(arrays, arrays)
    assert all(np.array_equal(a, g * g.dtype.type(0.5)) for a, g in zip(below, arrays, strict=True))


def test_plain_cases() -> None:
    assert global_norm([]) == 0.0
    assert global_norm([np.zeros((0, 3))]) == 0.0
    assert global_norm([np.array([3.0, 4.0]), np.array([12.0], "float32")]) == 13.0
    assert global_norm([np.array(-2.5)]) == 2.5
    assert type(global_norm([np.ones(4, "float32")])) is float
    with np.errstate(all="raise"):
        assert global_norm([np.array([1e200, 5e-324])]) == math.inf
    assert math.isnan(global_norm([np.ones(3), np.array([np.inf, np.nan])]))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [*FLOATS, "float16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(rng: np.random.Generator, dtype: str, layout: Form) -> None:
    a = values(rng, (250, 201), dtype)
    given = layout(a)
    expected = np.array(given, order="C")
    wide = expected.astype("float64")
    assert global_norm([given, a[0]]) == oracle.global_norm([wide, a[0].astype("float64")])
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize(
    "bad",
    [
        *(np.ones(3, dtype) for dtype in ("int64", "complex64", "longdouble", "bool")),
        np.ones(3, np.dtype("f4").newbyteorder()),
        *(np.array(["x"]), "text", None, object(), [[1.0], [1.0, 2.0]]),
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
