# SPDX-License-Identifier: MIT
"""The memory of this process behind distributed tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def any_distributed(tensors: Sequence[Any]) -> bool:
    """Whether one of these is a DTensor, without importing torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local_tensor(tensor: Any) -> Any:
    """The shard of a DTensor that lies in this process; anything else as it is."""
    if not any_distributed([tensor]):
        return tensor
    local = tensor.to_local()
    # What a collective is still to deliver.
    return local.wait() if hasattr(local, "wait") else local


def local_gradient(grad: Any, param: Any) -> Any:
    """The part of a gradient that belongs to the shard of its parameter."""
    both = any_distributed([param]) and type(grad) is type(param)
    if both and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_tensor(grad)
