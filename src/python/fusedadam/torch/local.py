# SPDX-License-Identifier: MIT
"""The local shards of distributed tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
