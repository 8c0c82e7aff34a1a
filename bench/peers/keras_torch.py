# SPDX-License-Identifier: MIT
"""Keras 3 on PyTorch: `keras.optimizers.Adam.apply`, eagerly and without autograd.

https://keras.io/guides/writing_a_custom_training_loop_in_torch/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peers import Contender, Work, most_tensors
from peers.keras_adam import KerasStep, keras, optimizer

MOST_TENSORS = 10_000


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    import torch

    return {"keras": str(keras("torch").__version__), "torch": torch.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Reject more tensors than can be stepped within a second."""
    return most_tensors(work, MOST_TENSORS, "100,000 take four seconds a step")


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    import torch

    torch.set_num_threads(threads)
    return {name: KerasTorchStep(work) for name in names}


class KerasTorchStep(KerasStep):
    """`apply` over lists of tensors."""

    def __init__(self, work: Work) -> None:
        import torch

        variable: Any = keras("torch").Variable
        self._params = [variable(array, dtype=work.dtype) for array in work.params()]
        self._grads = [torch.from_numpy(array).clone() for array in work.grads()]
        adam = optimizer(work, self._params, self.kind())

        def step() -> None:
            with torch.no_grad():
                adam.apply(self._grads, self._params)

        self._step = step

    @staticmethod
    def kind() -> Any:
        """Return the class to time. None means Keras's own Adam."""
        return None

    def set_grad(self, index: int, values: Any) -> None:
        """Copy an array into a gradient."""
        self._grads[index].numpy()[...] = values
