# SPDX-License-Identifier: MIT
"""fusedadam behind PyTorch's interface: `fusedadam.torch.Adam.step` over torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peers import Contender, Work
from peers.torch_adam import TorchTensors, parameters

if TYPE_CHECKING:
    import torch


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    import fusedadam.torch
    import torch

    return {"fusedadam": fusedadam.__version__, "torch": torch.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Accept all work."""
    return ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender, over the same kind of parameters as for torch's optimizer."""
    import fusedadam
    import torch

    torch.set_num_threads(threads)
    fusedadam.set_num_threads(threads)
    return {name: FusedTorchStep(work, parameters(work)) for name in names}


class FusedTorchStep(TorchTensors):
    """`fusedadam.torch.Adam.step`."""

    def __init__(self, work: Work, params: list[torch.nn.Parameter]) -> None:
        import fusedadam.torch

        super().__init__(params)
        hyper = work.hyper
        betas = (hyper.beta_1, hyper.beta_2)
        self._step = fusedadam.torch.Adam(params, hyper.lr, betas, hyper.epsilon).step

    def step(self) -> object:
        """Take a step."""
        return self._step()
