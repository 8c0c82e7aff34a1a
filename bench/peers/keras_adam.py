# SPDX-License-Identifier: MIT
"""The common part of the Keras 3 contenders on all backends."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from peers import Array, Contender, Work


def keras(backend: str) -> Any:
    """Import Keras with a backend. A process can choose only one."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    return keras


def optimizer(work: Work, params: list[Any], kind: Any = None) -> Any:
    """Return a built optimizer, whose scalars have the precision of its parameters.

    `kind` is its class; None means Keras's own Adam.
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
    """A step of Keras's Adam."""

    form = "hat"

    _params: list[Any]
    _grads: list[Any]
    _step: Callable[[], object]

    @abstractmethod
    def set_grad(self, index: int, values: Array) -> None:
        """Copy an array into a gradient."""

    def step(self) -> object:
        """Take a step."""
        return self._step()

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy arrays into the gradients."""
        for index, values in enumerate(grads):
            self.set_grad(index, values)

    def params(self) -> list[Array]:
        """Return the parameters as NumPy arrays."""
        module = keras(os.environ["KERAS_BACKEND"])
        return [np.asarray(module.ops.convert_to_numpy(param)) for param in self._params]
