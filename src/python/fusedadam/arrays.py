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
    """The memory of a dense CPU tensor of float32 or float64 as an array."""
    import torch

    view = _read_tensor(tensor, name)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64. Received: dtype={tensor.dtype}")
    return view


def _read_tensor(tensor: torch.Tensor, name: str) -> Array:
    """A dense CPU tensor as an array: its memory, or a copy where NumPy has no such dtype."""
    import torch

    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense CPU tensor. "
            f"Received: device={tensor.device.type}, layout={tensor.layout}"
        )
    tensor = tensor.detach()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


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


def mark_as_changed(values: Iterable[Any]) -> None:
    """Tell torch of writes to tensors, so that a graph that needs the old values refuses to run."""
    tensors = [value for value in values if is_tensor(value)]
    if tensors:
        import torch

        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def gradient_arrays(grads: Sequence[Any]) -> Sequence[Any]:
    """Gradients as arrays, of whatever NumPy can read. None stays None.

    Raises
    ------
    TypeError
        A gradient is not an array.
    """
    if are_plain_arrays(grads):
        return grads
    return [None if grad is None else as_array(grad, f"grads[{i}]") for i, grad in enumerate(grads)]


def index_array(indices: Any) -> Any:
    """Row numbers as an array: a tensor's own memory, a list as int64."""
    if is_tensor(indices):
        return indices.detach().numpy()
    return np.array(indices, dtype=np.int64) if _is_list_of_ints(indices) else indices


def _is_list_of_ints(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in value
    )


def as_array(value: Any, name: str) -> Array:
    """Whatever NumPy can read as an array, without a copy where it needs none.

    Raises
    ------
    TypeError
        It is not an array, or has a mask.
    """
    if type(value) is np.ndarray:
        return value
    if is_tensor(value):
        return _read_tensor(value, name)
    # NumPy would drop the mask without a word. It imports np.ma at its first use.
    if isinstance(value, np.ndarray) and isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must have no mask, which a step would not see: fill it by .filled(value). "
            f"Received: {type(value).__name__}"
        )
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be an array. Received: {value!r}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # ragged lists, tensors of other frameworks
        raise TypeError(
            f"{name} must be an array; NumPy cannot read it as one ({error}). "
            f"Received: {type(value).__name__}"
        ) from error
    if array.dtype == object and array is not value:
        raise TypeError(f"{name} must be an array of numbers. Received: {type(value).__name__}")
    return array
