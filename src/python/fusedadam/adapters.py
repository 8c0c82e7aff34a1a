# SPDX-License-Identifier: MIT
"""Helpers shared by the adapters of frameworks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def flushes(epsilon: float) -> bool:
    """Whether to flush subnormal moments to zero, which the frameworks do not.

    With an epsilon of at least 1e-12 this does not change an update: the square root of the
    smallest normal float32 is 1e-19. With a smaller epsilon, a second moment flushed to zero could
    make the denominator tiny.
    """
    return bool(epsilon >= 1e-12)


def divides_by(loss_scale: float) -> bool:
    """Whether the kernel can unscale by this loss scale: its inverse must be a float32."""
    return 2.0**-127 <= loss_scale <= 2.0**127


def copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Copy a gradient or state tensor into the memory layout of its parameter."""
    import torch

    return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
