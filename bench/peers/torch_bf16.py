# SPDX-License-Identifier: MIT
"""PyTorch's fused AdamW over bfloat16 parameters. Its moments have the dtype of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

from peers import Contender, Rounding, Work, storing
from peers.torch_adam import limit, versions

__all__ = ["limit", "make", "versions"]

# Weights and moments are rounded to nearest.
ROUNDING = Rounding(weight=2.0**-8, update=0.05)


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    import torch

    settings = storing.common(work.hyper)
    return storing.make(
        names,
        work,
        threads,
        "bfloat16",
        ROUNDING,
        lambda params: torch.optim.AdamW(params, **settings, fused=True),
    )
