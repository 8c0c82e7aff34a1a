# SPDX-License-Identifier: MIT
"""The norm that `clipnorm` bounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fusedadam import _core
from fusedadam._core import public
from fusedadam.arrays import as_array, listed


@public
def global_norm(arrays: Iterable[Any]) -> float:
    """Return the Euclidean norm of all arrays together: the square root of the sum of squares.

    The sum is in float64, in an order that depends only on the sizes, so the result is bitwise
    identical for every thread count and instruction set. Squares of float32 cannot overflow or
    underflow.

    Parameters
    ----------
    arrays : iterable of numpy.ndarray or torch.Tensor
        float32 or float64, of any shape and layout.

    Returns
    -------
    float
        NaN if an element is NaN; infinite if an element is, or if a float64 exceeds 1e154.

    Raises
    ------
    TypeError
        An item is not an array, or has another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedadam import global_norm
    >>> global_norm([np.array([3.0, 4.0]), np.array([12.0])])
    13.0
    """
    items = [as_array(array, f"arrays[{i}]") for i, array in enumerate(listed(arrays, "arrays"))]
    return _core.global_norm(items)
