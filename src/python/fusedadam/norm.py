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
    """Return the Euclidean norm of all arrays together, the root of the sum of all squares.

    Summed in float64, in an order that depends on nothing but the sizes: the same bits for every
    thread count and instruction set. Squares of float32 neither overflow nor underflow.

    Parameters
    ----------
    arrays : iterable of numpy.ndarray or torch.Tensor
        float32 or float64, of any shape and layout.

    Returns
    -------
    float
        NaN if an element is; infinite if one is, or if a float64 is beyond 1e154.

    Raises
    ------
    TypeError
        An array is none, or of another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedadam import global_norm
    >>> global_norm([np.array([3.0, 4.0]), np.array([12.0])])
    13.0
    """
    items = [as_array(array, f"arrays[{i}]") for i, array in enumerate(listed(arrays, "arrays"))]
    return _core.global_norm(items)
