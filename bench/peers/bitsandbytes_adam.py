# SPDX-License-Identifier: MIT
"""bitsandbytes' `AdamW8bit` on the CPU.

https://huggingface.co/docs/bitsandbytes/main/en/optimizers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peers import Contender, Rounding, Work, storing
from peers.torch_adam import limit

__all__ = ["limit", "make", "versions"]

# Moments in 8 bits of a block of 256 elements (measured in the check: 0.02, mostly by the weights).
ROUNDING = Rounding(weight=2.0**-8, update=0.1)


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    import bitsandbytes
    import torch

    return {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    import bitsandbytes

    optimizers: Any = bitsandbytes.optim  # it declares no exports
    return storing.make(
        names,
        work,
        threads,
        ROUNDING,
        lambda params, settings: optimizers.AdamW8bit(params, **settings),
    )
