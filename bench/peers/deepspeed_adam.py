# SPDX-License-Identifier: MIT
"""DeepSpeed's `DeepSpeedCPUAdam`, which is compiled for this machine's CPU on first use.

https://deepspeed.readthedocs.io/en/latest/optimizers.html
"""

from __future__ import annotations

from collections.abc import Sequence

from peers import Contender, Work
from peers.torch_adam import TorchTensors, parameters


def versions() -> dict[str, str]:
    """Import and, if necessary, compile it. Return the versions."""
    import deepspeed
    import torch
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()
    return {"deepspeed": deepspeed.__version__, "torch": torch.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Reject float64."""
    return "has no float64" if work.dtype == "float64" else ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    import torch

    torch.set_num_threads(threads)
    return {name: DeepSpeedStep(work) for name in names}


class DeepSpeedStep(TorchTensors):
    """`DeepSpeedCPUAdam.step`."""

    def __init__(self, work: Work) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        params = parameters(work)
        super().__init__(params)
        hyper = work.hyper
        # adamw_mode only selects the kind of weight decay, which is 0 here.
        optimizer = DeepSpeedCPUAdam(
            params,
            lr=hyper.lr,
            betas=(hyper.beta_1, hyper.beta_2),
            eps=hyper.epsilon,
            adamw_mode=False,
        )
        self._step = optimizer.step

    def step(self) -> object:
        """Take a step."""
        return self._step()
