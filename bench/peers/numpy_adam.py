# SPDX-License-Identifier: MIT
"""The formula in plain NumPy, in place where possible, on one thread."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from peers import Array, Contender, Hyper, Work, copies_to


class Formula:
    """Moments of parameters, and the step as usually written."""

    def __init__(self, params: list[Array], hyper: Hyper) -> None:
        self._hyper = hyper
        self._params = params
        self._m = [np.zeros_like(param) for param in params]
        self._v = [np.zeros_like(param) for param in params]
        self._t = 0

    def step(self, grads: Sequence[Array]) -> None:
        """Take a step."""
        self._t += 1
        h = self._hyper
        lr_t = h.lr * math.sqrt(1 - h.beta_2**self._t) / (1 - h.beta_1**self._t)
        for p, g, m, v in zip(self._params, grads, self._m, self._v, strict=True):
            m *= h.beta_1
            m += (1 - h.beta_1) * g
            v *= h.beta_2
            v += (1 - h.beta_2) * g**2
            p -= lr_t * m / (np.sqrt(v) + h.epsilon)


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:  # noqa: ARG001
    """Make the contender. NumPy uses threads only for matrix products."""
    params, grads = list(work.params()), list(work.grads())
    formula = Formula(params, work.hyper)
    step = Contender("hat", lambda: formula.step(grads), copies_to(grads), lambda: params)
    return dict.fromkeys(names, step)
