# SPDX-License-Identifier: MIT
"""torchao's `AdamW8bit` on the CPU. It compiles a step for each size with `torch.compile`.

https://docs.pytorch.org/ao/stable/api_reference/api_ref_optim.html
"""

from __future__ import annotations

from collections.abc import Sequence

from peers import Contender, Work, storing
from peers.bitsandbytes_adam import ROUNDING
from peers.torch_adam import limit

__all__ = ["limit", "make", "versions"]


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    import torch
    import torchao

    return {"torchao": torchao.__version__, "torch": torch.__version__}


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    from torchao.optim import AdamW8bit

    return storing.make(
        names, work, threads, ROUNDING, lambda params, settings: AdamW8bit(params, **settings)
    )
