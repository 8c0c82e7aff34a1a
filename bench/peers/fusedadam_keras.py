# SPDX-License-Identifier: MIT
"""fusedadam behind Keras 3 on PyTorch: `fusedadam.keras.Adam.apply`, called like Keras's Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peers import Contender, Work
from peers.keras_adam import keras
from peers.keras_torch import KerasTorchStep


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    version = keras("torch").__version__
    import fusedadam.keras
    import torch

    return {"fusedadam": fusedadam.__version__, "keras": version, "torch": torch.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Accept all work."""
    return ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    import fusedadam
    import torch

    torch.set_num_threads(threads)
    fusedadam.set_num_threads(threads)
    return {name: FusedKerasStep(work) for name in names}


class FusedKerasStep(KerasTorchStep):
    """`apply` over lists of tensors."""

    @staticmethod
    def kind() -> Any:
        """Return the class to time."""
        keras("torch")  # chooses the backend
        import fusedadam.keras

        return fusedadam.keras.Adam
