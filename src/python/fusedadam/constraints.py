# SPDX-License-Identifier: MIT
"""Parameter constraints, as on Keras variables; applied after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedadam.arrays import are_plain_arrays, as_array, is_tensor, tensor_view


def constraints_of(params: Sequence[Any], grads: Sequence[Any]) -> list[tuple[int, Any]]:
    """Return (position, constraint) for each parameter that has a gradient and a constraint."""
    if are_plain_arrays(params):
        return []
    constraints = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        constraint = getattr(param, "constraint", None)
        if constraint is None or grad is None:
            continue
        if not callable(constraint):
            raise TypeError(
                f"params[{i}].constraint must be callable. Received: {type(constraint).__name__}"
            )
        constraints.append((i, constraint))
    return constraints


def constrain(params: Sequence[Any], constraints: Sequence[tuple[int, Any]]) -> None:
    """Write the result of each constraint into its parameter."""
    for i, constraint in constraints:
        value = as_array(constraint(params[i]), f"params[{i}].constraint(...)")
        array = tensor_view(params[i], f"params[{i}]") if is_tensor(params[i]) else params[i]
        if value.shape != array.shape:
            raise ValueError(
                f"params[{i}].constraint must return an array of the parameter's shape, "
                f"{array.shape}; the step has been taken. Received: shape={value.shape}"
            )
        array[...] = value
