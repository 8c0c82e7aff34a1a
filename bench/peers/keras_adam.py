# SPDX-License-Identifier: MIT
"""What the contenders of Keras 3 have in common, on whichever backend."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from peers import Array, Contender, Work


def keras(backend: str) -> Any:
    """Import Keras on this backend, which a process chooses once."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    return keras


def optimizer(work: Work, params: list[Any], kind: Any = None) -> Any:
    """Return a built optimizer; its own scalars are of the precision that its parameters have.

    `kind` is its class, Keras' own Adam where it is None.
    """
    module: Any = keras(os.environ["KERAS_BACKEND"])
    module.config.set_floatx(work.dtype)
    hyper = work.hyper
    adam = (kind or module.optimizers.Adam)(
        learning_rate=hyper.lr,
        beta_1=hyper.beta_1,
        beta_2=hyper.beta_2,
        epsilon=hyper.epsilon,
    )
    adam.build(params)
    return adam


class KerasStep(Contender):
    """A step of Keras' Adam."""

    form = "hat"

    _params: list[Any]
    _grads: list[Any]
    _step: Callable[[], object]

    @abstractmethod
    def set_grad(self, index: int, values: Array) -> None:
        """Copy into a gradient."""

    def step(self) -> object:
        """Step."""
        return self._step()

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy into the gradients."""
        for index, values in enumerate(grads):
            self.set_grad(index, values)

    def params(self) -> list[Array]:
        """Return copies."""
        module = keras(os.environ["KERAS_BACKEND"])
        return [np.asarray(module.ops.convert_to_numpy(param)) for param in self._params]
