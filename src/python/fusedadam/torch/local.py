# SPDX-License-Identifier: MIT
"""The local shards of distributed tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any


def any_distributed(tensors: Sequence[Any]) -> bool:
    """Whether one of these is a DTensor; does not import torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local_tensor(tensor: Any) -> Any:
    """Return the local shard of a DTensor; anything else as it is."""
    if not any_distributed([tensor]):
        return tensor
    local = tensor.to_local()
    # The result of a collective that may still be running.
    return local.wait() if hasattr(local, "wait") else local


def local_gradient(grad: Any, param: Any) -> Any:
    """Return the part of a gradient for the local shard of its parameter."""
    both = any_distributed([param]) and type(grad) is type(param)
    if both and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_tensor(grad)


def mapped(function: Callable[..., Any], *tensors: Any) -> Any:
    """Apply a function to local shards; the results of DTensors are DTensors placed alike."""
    result = function(*map(local_tensor, tensors))
    whole = tensors[0]
    if not any_distributed([whole]):
        return result

    def placed(local: Any) -> Any:
        return type(whole).from_local(
            local,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    return tuple(map(placed, result)) if isinstance(result, tuple) else placed(result)


def part_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a DTensor and the offset of the local shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(tensor.shape), tuple(offset)
