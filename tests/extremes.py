# SPDX-License-Identifier: MIT
"""Numbers at the ends of what a float holds, their combinations, and one call beside the oracle."""

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

# What takes minutes and not seconds: FUSEDADAM_EXTREMES=all.
ALL: Final = os.environ.get("FUSEDADAM_EXTREMES") == "all"

# Elements that were held to the oracle, counted for each instruction set; and calls.
compared = {"elements": 0, "calls": 0}


def special(dtype: str) -> Array:
    """Return both zeros, the ends of the subnormals and of the normals, 1, infinity; NaN."""
    info = np.finfo(dtype)
    least, tiny = float(info.smallest_subnormal), float(info.smallest_normal)
    magnitudes = [0.0, least, tiny - least, tiny, 1.0, float(info.max), np.inf]
    return np.array([*magnitudes, *(-x for x in magnitudes), np.nan], dtype)


def few(dtype: str) -> Array:
    """Return one of each kind of `special`, where the combinations would be too many."""
    zero, least, _, tiny, one, largest, inf, minus_zero, *_, minus_inf, nan = special(dtype)
    return np.array(
        [zero, minus_zero, least, -tiny, one, largest, -largest, inf, minus_inf, nan], dtype
    )


def product(columns: Sequence[Array]) -> list[Array]:
    """Every combination of one number of each column: column by column."""
    grids = np.meshgrid(*columns, indexing="ij")
    return [np.ascontiguousarray(grid).ravel() for grid in grids]


def column(numbers: Array, factors: Sequence[int], shift: int, count: int) -> Array:
    """Return one column more for a product of `count` columns of these numbers.

    Which number stands in a row is a sum of the places of the others, modulo their count. With
    factors prime to that count, any `count` of the columns thus have every combination in them; and
    all shifts together, every combination of all of them.
    """
    size = len(numbers)
    places = np.indices((size,) * count).reshape(count, -1)
    return numbers[(shift + np.asarray(factors) @ places) % size]


def covering(
    choices: dict[str, Sequence[Any]], *, prime: int, strength: int
) -> Iterator[dict[str, Any]]:
    """Rows of one choice each, in which any `strength` choices of different names occur together.

    The rows are polynomials of degree `strength` - 1 over the integers modulo a prime, a name being
    a point at which they are evaluated (Bush, "Orthogonal arrays of index unity", 1952).
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
    """Views of 1 to 15 elements in turn: no vector of 16 float32 fits, and most of others do not."""
    ends = itertools.accumulate(itertools.cycle(range(1, 16)))
    return np.split(array, [*itertools.takewhile(lambda end: end < array.size, ends)])


def _started(
    optimizer: Adam, params: list[Array], reference: oracle.OracleAdam, *, split: bool
) -> None:
    optimizer.build(params)
    parts = pieces if split else lambda array: [array]
    weights = reference.weights()
    optimizer.set_weights([weights[0], *(part for w in weights[1:] for part in parts(w))])
    averages = (part for average in reference.ema for part in parts(average))
    for own, average in zip(optimizer.ema, averages, strict=True):
        own[...] = average


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
    """Hold one call of an optimizer in this state to the oracle, with each instruction set.

    With `accumulated`, a call with that gradient comes before. `split` makes many small tensors of
    the arrays: not with norms.
    """
    options = {"amsgrad": vhat is not None, "use_ema": ema is not None} | options
    reference = oracle.OracleAdam([p], **options)
    reference.set_count(iterations)
    reference.m, reference.v = [m], [v]
    reference.vhat = [] if vhat is None else [vhat]
    reference.ema = [] if ema is None else [ema]
    before = reference.weights(), list(reference.ema)
    grads = [g] if accumulated is None else [accumulated, g]
    lefts = [reference.step([grad])[0] for grad in grads]
    expected = [*reference.params, *reference.weights()[1:], *reference.ema]

    start = oracle.OracleAdam([p], **options)
    start.set_count(iterations)
    start.m, start.v = [m], [v]
    start.vhat, start.ema = before[0][3:], before[1]
    for isa in fusedadam.supported_isas():
        q = p.copy()
        params = pieces(q) if split else [q]
        optimizer = Adam(**options)
        _started(optimizer, params, start, split=split)
        with running(isa=isa):
            for grad, left in zip(grads, lefts, strict=True):
                given = grad.copy()
                parts = pieces(given) if split else [given]
                optimizer.apply_gradients(list(zip(parts, params, strict=True)))
                assert_same_bits(given, left, f"{isa}: gradients after the call")
        kept = [*optimizer.weights[1:], *optimizer.ema]
        kinds = [np.concatenate(kept[i : i + len(parts)]) for i in range(0, len(kept), len(parts))]
        assert_all_same_bits([q, *kinds], expected, f"{isa}: [p, m, v, ...]")
        assert optimizer.iterations == reference.iterations
        assert optimizer.skipped_steps == reference.skipped_steps
        assert optimizer.current_loss_scale == reference.current_loss_scale
        compared["elements"] += sum(a.size for a in expected)
    compared["calls"] += len(grads)
