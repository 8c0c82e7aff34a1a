# SPDX-License-Identifier: MIT
"""What users hand over, as NumPy arrays: never a copy of what is to be written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array: TypeAlias = npt.NDArray[Any]

_PLAIN = {np.ndarray}


def is_tensor(value: object) -> bool:
    """Whether this is a `torch.Tensor`, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def are_plain_arrays(values: Iterable[object]) -> bool:
    """Whether all of these are `numpy.ndarray` itself, and so carry no attributes of a user's."""
    return set(map(type, values)) <= _PLAIN


def tensor_view(tensor: torch.Tensor, name: str) -> Array:
    """The memory of a dense CPU tensor as an array."""
    import torch

    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense CPU tensor. "
            f"Received: device={tensor.device.type}, layout={tensor.layout}"
        )
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64. Received: dtype={tensor.dtype}")
    view: Array = tensor.detach().numpy()
    return view


def listed(values: Iterable[Any], name: str) -> Sequence[Any]:
    """Values that may be iterated over more than once."""
    if isinstance(values, (list, tuple)):
        return values
    # These iterate over their first axis, or over characters, which is never what is meant.
    if isinstance(values, (np.ndarray, memoryview, str, bytes, bytearray)) or is_tensor(values):
        raise TypeError(f"{name} must be a list or tuple. Received: {type(values).__name__}")
    try:
        return list(values)
    except TypeError:
        raise TypeError(
            f"{name} must be a list or tuple. Received: {type(values).__name__}"
        ) from None


def parameter_arrays(params: Sequence[Any]) -> Sequence[Any]:
    """Parameters as arrays, torch tensors as views; the rest is for the core to refuse."""
    if are_plain_arrays(params):
        return params
    return [
        tensor_view(param, f"params[{i}]") if is_tensor(param) else param
        for i, param in enumerate(params)
    ]


def gradient_arrays(grads: Sequence[Any]) -> Sequence[Any]:
    """Gradients as arrays, of whatever NumPy can read.

    Raises
    ------
    ValueError
        A gradient is None.
    TypeError
        A gradient is no array.
    """
    if are_plain_arrays(grads):
        return grads
    return [_gradient_array(grad, i) for i, grad in enumerate(grads)]


def _gradient_array(grad: Any, index: int) -> Array:
    name = f"grads[{index}]"
    if grad is None:
        raise ValueError(
            "An operation has `None` for gradient. Make sure that the loss depends on every "
            "parameter through differentiable operations, or leave out the parameters that it "
            f"does not depend on. Received: {name}=None"
        )
    return as_array(grad, name)


def as_array(value: Any, name: str) -> Array:
    """Whatever NumPy can read as an array, without a copy where it needs none.

    Raises
    ------
    TypeError
        It is no array.
    """
    if is_tensor(value):
        return tensor_view(value, name)
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be an array. Received: {value!r}")
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # ragged lists, tensors of other frameworks
        raise TypeError(
            f"{name} must be an array; NumPy cannot read it as one ({error}). "
            f"Received: {type(value).__name__}"
        ) from error
