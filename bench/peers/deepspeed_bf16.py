# SPDX-License-Identifier: MIT
"""DeepSpeed's `DeepSpeedCPUAdam` over bfloat16 parameters, with moments in bfloat16 as well.

Its documentation names `fp32_optimizer_states=False` to save memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from peers import Contender, Work, storing
from peers.deepspeed_adam import limit, versions
from peers.torch_bf16 import ROUNDING

__all__ = ["limit", "make", "versions"]


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return storing.make(
        names,
        work,
        threads,
        ROUNDING,
        lambda params, settings: DeepSpeedCPUAdam(params, **settings, fp32_optimizer_states=False),
    )
