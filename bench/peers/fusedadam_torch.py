# SPDX-License-Identifier: MIT
"""The library behind PyTorch's interface: `fusedadam.torch.Adam.step` over tensors of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peers import Contender, Work
from peers.torch_adam import TorchTensors, parameters

if TYPE_CHECKING:
    import torch


def versions() -> dict[str, str]:
    """Import both and return their versions."""
    import fusedadam.torch
    import torch

    return {"fusedadam": fusedadam.__version__, "torch": torch.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - as all adapters
    """Run everything."""
    return ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make it, over parameters as torch's own optimizer has them."""
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
        """Step."""
        return self._step()
