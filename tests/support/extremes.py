# SPDX-License-Identifier: MIT
"""Extreme floats, their combinations, and a comparison of one call with the oracle."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import fusedadam
import numpy as np
import oracle
from fusedadam import Adam
from helpers import Array, assert_all_same_bits, assert_same_bits, running

# FUSEDADAM_EXTREMES=all adds the tests that take minutes and not seconds.
ALL: Final = os.environ.get("FUSEDADAM_EXTREMES") == "all"

LARGEST: Final = float(np.finfo(np.float64).max)
LEAST: Final = 5e-324
# The largest double below 1. It rounds to 1 in float32.
NEARLY_1: Final = 1 - 2.0**-53

# The number of elements compared with the oracle, counted per instruction set, and of calls.
compared = {"elements": 0, "calls": 0}


def special(dtype: str) -> Array:
    """Return both zeros, the ends of the subnormals and of the normals, 1, infinity and NaN."""
    info = np.finfo(dtype)
    least, tiny = float(info.smallest_subnormal), float(info.smallest_normal)
    magnitudes = [0.0, least, tiny - least, tiny, 1.0, float(info.max), np.inf]
    return np.array([*magnitudes, *(-x for x in magnitudes), np.nan], dtype)


def few(dtype: str) -> Array:
    """Return one number of each kind in `special`, for tests with too many combinations."""
    zero, least, _, tiny, one, largest, inf, minus_zero, *_, minus_inf, nan = special(dtype)
    return np.array(
        [zero, minus_zero, least, -tiny, one, largest, -largest, inf, minus_inf, nan], dtype
    )


def product(columns: Sequence[Array]) -> list[Array]:
    """Return all combinations of one number from each column, as columns."""
    grids = np.meshgrid(*columns, indexing="ij")
    return [np.ascontiguousarray(grid).ravel() for grid in grids]


def column(numbers: Array, factors: Sequence[int], shift: int, count: int) -> Array:
    """Return an additional column for a product of `count` columns of these numbers.

    The index of the number in a row is a weighted sum of the indices in the other columns, modulo
    their count. If the factors are coprime to that count, any `count` of the columns contain every
    combination. All shifts together contain every combination of all columns.
    """
    size = len(numbers)
    places = np.indices((size,) * count).reshape(count, -1)
    return numbers[(shift + np.asarray(factors) @ places) % size]


def covering(
    choices: dict[str, Sequence[Any]], *, prime: int, strength: int
) -> Iterator[dict[str, Any]]:
    """Yield rows with one choice per name, covering all combinations of any `strength` names.

    The rows are polynomials of degree `strength` - 1 over the integers modulo a prime. A name is a
    point at which they are evaluated (Bush, "Orthogonal arrays of index unity", 1952).
    """
    assert all(len(values) <= prime for values in choices.values())
    assert len(choices) <= prime
    for coefficients in itertools.product(range(prime), repeat=strength):
        row = {}
        for point, (name, values) in enumerate(choices.items()):
            place = 0
            for coefficient in coefficients:
                place = (place * point + coefficient) % prime
            row[name] = values[place % len(values)]
        yield row


def pieces(array: Array) -> list[Array]:
    """Views of 1 to 15 elements in turn: shorter than 16 float32, and than most other vectors."""
    ends = itertools.accumulate(itertools.cycle(range(1, 16)))
    return np.split(array, [*itertools.takewhile(lambda end: end < array.size, ends)])


def check_call(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    vhat: Array | None = None,
    ema: Array | None = None,
    accumulated: Array | None = None,
    iterations: int = 3,
    split: bool = False,
    **options: Any,
) -> None:
    """Compare one call of an optimizer in this state with the oracle, for each instruction set.

    With `accumulated`, a call with that gradient comes first. `split` turns the arrays into many
    small tensors, which changes norms and so excludes them.
    """
    options = {"amsgrad": vhat is not None, "use_ema": ema is not None} | options
    reference = oracle.OracleAdam([p], **options)
    reference.set_count(iterations)
    reference.m, reference.v = [m], [v]
    reference.vhat = [] if vhat is None else [vhat]
    reference.ema = [] if ema is None else [ema]
    (count, *weights), averages = reference.weights(), list(reference.ema)
    grads = [g] if accumulated is None else [accumulated, g]
    lefts = [reference.step([grad])[0] for grad in grads]
    expected = [*reference.params, *reference.weights()[1:], *reference.ema]

    def parts(array: Array) -> list[Array]:
        return pieces(array) if split else [array]

    for isa in fusedadam.supported_isas():
        q = p.copy()
        params = parts(q)
        optimizer = Adam(**options)
        optimizer.build(params)
        optimizer.set_weights([count, *(part for w in weights for part in parts(w))])
        for own, average in zip(
            optimizer.ema, [x for a in averages for x in parts(a)], strict=True
        ):
            own[...] = average
        with running(isa=isa):
            for grad, left in zip(grads, lefts, strict=True):
                given = grad.copy()
                optimizer.apply_gradients(list(zip(parts(given), params, strict=True)))
                assert_same_bits(given, left, f"{isa}: gradients after the call")
        kept = [*optimizer.weights[1:], *optimizer.ema]
        each = range(0, len(kept), len(params))
        kinds = [np.concatenate(kept[i : i + len(params)]) for i in each]
        assert_all_same_bits([q, *kinds], expected, f"{isa}: [p, m, v, ...]")
        assert optimizer.iterations == reference.iterations
        assert optimizer.skipped_steps == reference.skipped_steps
        assert optimizer.current_loss_scale == reference.current_loss_scale
        compared["elements"] += sum(a.size for a in expected)
    compared["calls"] += len(grads)
