# SPDX-License-Identifier: MIT
"""The lists of weights that versions of Keras saved, in the order of `Optimizer.weights`."""

from __future__ import annotations

from collections.abc import Sequence

from fusedadam.arrays import Array


def without_placeholders(given: list[Array], count: int, expected: int) -> list[Array]:
    """Drop what Keras 2.1.3 to 2.15 wrote for `count` parameters in place of an unused `vhat`."""
    placeholders = given[expected:]
    if len(placeholders) == count and all(w.shape == (1,) for w in placeholders):
        return given[:expected]
    return given


def from_keras_3(given: list[Array], moments: Sequence[Sequence[Array]]) -> list[Array] | None:
    """Reorder `[iteration, learning_rate, m0, v0, m1, v1, ..., vhat0, vhat1, ...]`.

    Parameters
    ----------
    given
        The list.
    moments
        The arrays of m, of v and, where there are any, of vhat.

    Returns
    -------
    list of numpy.ndarray or None
        `[iterations, m..., v..., vhat...]`; None where `given` is no such list.
    """
    m, v, *rest = moments
    pairs = 2 * len(m)
    if len(given) != 2 + pairs + sum(map(len, rest)):
        return None
    expected = [w.shape for pair in zip(m, v, strict=True) for w in pair]
    if given[1].shape != () or [w.shape for w in given[2 : 2 + pairs]] != expected:
        return None
    return [given[0], *given[2 : 2 + pairs : 2], *given[3 : 2 + pairs : 2], *given[2 + pairs :]]
