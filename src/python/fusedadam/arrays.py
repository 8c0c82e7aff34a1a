# SPDX-License-Identifier: MIT
"""Convert user input to NumPy arrays, without copying what will be written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array: TypeAlias = npt.NDArray[Any]

_PLAIN = {np.ndarray}


def dtype_named(name: Any) -> np.dtype[Any]:
    """Return NumPy's dtype of this name; `ml_dtypes` has bfloat16."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def is_tensor(value: object) -> bool:
    """Whether this is a `torch.Tensor`, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def are_plain_arrays(values: Iterable[object]) -> bool:
    """Whether all of these are exactly `numpy.ndarray`, whose instances have no `__dict__`."""
    return set(map(type, values)) <= _PLAIN


def tensor_view(tensor: torch.Tensor, name: str) -> Array:
    """Return a dense CPU tensor of real numbers as an array that shares its memory."""
    import torch

    if tensor.dtype == torch.bfloat16:
        words: Array = _read_tensor(tensor.detach().view(torch.int16), name)
        return words.view(dtype_named("bfloat16"))
    if tensor.dtype not in (torch.float32, torch.float64, torch.float16):
        raise TypeError(
            f"{name} must be float32, float64, float16 or bfloat16. Received: dtype={tensor.dtype}"
        )
    return _read_tensor(tensor, name)


def _read_tensor(tensor: torch.Tensor, name: str) -> Array:
    """Return a dense CPU tensor as an array; bfloat16, which NumPy lacks, as a float32 copy."""
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
    """Return an iterable as a list or tuple."""
    if isinstance(values, (list, tuple)):
        return values
    # Iterating over these would yield rows or characters, never parameters.
    not_lists = (np.ndarray, memoryview, str, bytes, bytearray)
    if not isinstance(values, not_lists) and not is_tensor(values):
        with contextlib.suppress(TypeError):
            return list(values)
    raise TypeError(f"{name} must be a list or tuple. Received: {type(values).__name__}")


def parameter_arrays(params: Sequence[Any]) -> Sequence[Any]:
    """Return torch tensors as views and everything else as it is, for the core to check."""
    if are_plain_arrays(params):
        return params
    return [
        tensor_view(param, f"params[{i}]") if is_tensor(param) else param
        for i, param in enumerate(params)
    ]


def mark_as_changed(values: Iterable[Any]) -> None:
    """Increment the version of tensors, so that a graph that saved their old values raises."""
    tensors = [value for value in values if is_tensor(value)]
    if tensors:
        import torch

        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def gradient_arrays(grads: Sequence[Any]) -> Sequence[Any]:
    """Return gradients as arrays, by `as_array`; None stays None."""
    if are_plain_arrays(grads):
        return grads
    return [None if grad is None else as_array(grad, f"grads[{i}]") for i, grad in enumerate(grads)]


def index_array(indices: Any) -> Any:
    """Return a tensor as a view, a list of integers as int64, anything else as it is."""
    if is_tensor(indices):
        return indices.detach().numpy()
    if isinstance(indices, (list, tuple)) and all(
        isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in indices
    ):
        return np.array(indices, dtype=np.int64)
    return indices


def as_array(value: Any, name: str) -> Array:
    """Return anything that NumPy can convert to an array of numbers, without a copy if possible."""
    if type(value) is np.ndarray:
        return value
    if is_tensor(value):
        return _read_tensor(value, name)
    # np.asarray would drop the mask silently. The first test avoids importing np.ma.
    if isinstance(value, np.ndarray) and isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must have no mask, since a step would ignore it: use .filled(value). "
            f"Received: {type(value).__name__}"
        )
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be an array. Received: {value!r}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # ragged lists, tensors of other frameworks
        raise TypeError(
            f"{name} must be an array; NumPy cannot convert it to one ({error}). "
            f"Received: {type(value).__name__}"
        ) from error
    if array.dtype == object and array is not value:
        raise TypeError(f"{name} must be an array of numbers. Received: {type(value).__name__}")
    return array
