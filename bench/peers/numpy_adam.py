# SPDX-License-Identifier: MIT
"""The formula in plain NumPy, in place where possible, on one thread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from peers import Array, Contender, Work


def versions() -> dict[str, str]:
    """Return NumPy's version."""
    return {"numpy": np.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Accept all work."""
    return ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:  # noqa: ARG001
    """Make the contender. NumPy uses threads only for matrix products."""
    return {name: NumPyStep(work) for name in names}


class NumPyStep(Contender):
    """A loop over the tensors."""

    form = "hat"

    def __init__(self, work: Work) -> None:
        self._hyper = work.hyper
        self._params = list(work.params())
        self._grads = list(work.grads())
        self._m = [np.zeros_like(param) for param in self._params]
        self._v = [np.zeros_like(param) for param in self._params]
        self._t = 0

    def step(self) -> object:
        """Take a step."""
        self._t += 1
        lr, beta_1, beta_2, epsilon = (
            self._hyper.lr,
            self._hyper.beta_1,
            self._hyper.beta_2,
            self._hyper.epsilon,
        )
        lr_t = lr * math.sqrt(1 - beta_2**self._t) / (1 - beta_1**self._t)
        for p, g, m, v in zip(self._params, self._grads, self._m, self._v, strict=True):
            m *= beta_1
            m += (1 - beta_1) * g
            v *= beta_2
            v += (1 - beta_2) * g**2
            p -= lr_t * m / (np.sqrt(v) + epsilon)
        return None

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy arrays into the gradients."""
        for grad, values in zip(self._grads, grads, strict=True):
            grad[...] = values

    def params(self) -> list[Array]:
        """Return the arrays themselves."""
        return self._params
