# SPDX-License-Identifier: MIT
"""PyTorch's fused AdamW over bfloat16 parameters. Its moments have the dtype of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

from peers import Contender, Rounding, Work, storing
from peers.torch_adam import limit, versions

__all__ = ["limit", "make", "versions"]

# Weights and moments are rounded to nearest. In a step, a gradient and m are off by up to 2^-9, and
# the root of v by half of that; the check takes five steps.
ROUNDING = Rounding(weight=2.0**-8, update=0.05)


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    import torch

    return storing.make(
        names,
        work,
        threads,
        ROUNDING,
        lambda params, settings: torch.optim.AdamW(params, **settings, fused=True),
    )
