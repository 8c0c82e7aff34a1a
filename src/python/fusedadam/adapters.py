# SPDX-License-Identifier: MIT
"""What the adapters of frameworks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_EPSILON_TO_FLUSH: Final = 1e-12


def flushes(epsilon: float) -> bool:
    """Whether subnormal moments may become zero, in place of a framework that keeps them.

    From an epsilon of 1e-12 on, it makes no difference to an update: the root of the smallest
    normal float32 is 1e-19. Below, a second moment of zero might divide by next to nothing.
    """
    return bool(epsilon >= _SMALLEST_EPSILON_TO_FLUSH)


def divides_by(loss_scale: float) -> bool:
    """Whether the kernel divides gradients by this scale; beyond, its inverse is no float32."""
    return 2.0**-127 <= loss_scale <= 2.0**127


def copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Copy a gradient, or the state of a parameter, into the memory layout of the parameter."""
    import torch

    return torch.empty_like(like, requires_grad=False).copy_(tensor)
