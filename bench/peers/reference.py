# SPDX-License-Identifier: MIT
"""A check of a contender's results against the formula in float64, with a tolerance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from peers import PEERS, Array, Contender, Form, Hyper, Work, load

STEPS = 5
# Sizes that are no multiple of any vector length; the largest is divided among threads. Contenders
# with states in blocks store only the last one in fewer bits.
SIZES = (1, 3, 17, 1_025, 70_001, 1 << 16)
# lr and epsilon are so large that a wrong form of epsilon, or a wrong step number, causes a large
# error.
HYPER = Hyper(lr=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-3)


def error(name: str, work: Work, threads: int) -> str:
    """Step a contender over tensors of odd sizes. Return how its results are wrong, or ""."""
    work = replace(work, sizes=PEERS[name].checked or SIZES, hyper=HYPER)
    contender: Contender = load(name).make([name], work, threads)[name]
    expected = Reference(work, contender.form)
    random = np.random.default_rng(2)
    for step in range(1, STEPS + 1):
        # The scale of the gradients changes in each step: Adam is invariant to a constant scale.
        grads = [0.01 * step * random.standard_normal(n).astype(work.dtype) for n in work.sizes]
        contender.set_grads(grads)
        contender.step()
        expected.step(grads)
    return differences("parameter", contender.params(), expected.params, work, contender) or (
        differences("average", contender.averages(), expected.averages, work, contender)
    )


def differences(
    what: str, actual: Sequence[Array], expected: Sequence[Array], work: Work, contender: Contender
) -> str:
    """Return where arrays differ by more than the tolerance, or ""."""
    if len(actual) != len(expected):
        return f"{len(actual)} {what}s of {len(expected)}"
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape or a.dtype != work.dtype:
            return f"{what} {index} is {a.dtype} {a.shape}, not {work.dtype} {b.shape}"
        off = float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0))
        allowed = tolerance(work, b, contender)
        if not off <= allowed:
            return f"{what} {index} is off by {off:.3g}, more than {allowed:.3g}"
    return ""


def tolerance(work: Work, expected: Array, contender: Contender) -> float:
    """Return the largest error of a correct result.

    Each step rounds the parameter. Many peers also compute 1 - beta_2**t in the precision of the
    tensor, so that the first step's 0.001 has the absolute error of a number near 1. Some store
    weights and moments in fewer bits.
    """
    scalars = float(np.finfo(contender.scalars or work.dtype).eps) / (1 - work.hyper.beta_2)
    of_update = work.hyper.lr * (scalars + contender.rounding.update)
    of_weight = 4 * float(np.finfo(work.dtype).eps) + contender.rounding.weight
    return STEPS * (of_update + of_weight * float(np.max(np.abs(expected), initial=1.0)))


class Reference:
    """The formula of the paper in float64, in either form, or the additions of the twin."""

    def __init__(self, work: Work, form: Form) -> None:
        self._work = work
        self._form = form
        self._t = 0
        self.params = [param.astype(np.float64) for param in work.params()]
        self._m = [np.zeros_like(param) for param in self.params]
        self._v = [np.zeros_like(param) for param in self.params]
        self.averages = [] if work.tail is None else [param.copy() for param in self.params]

    def step(self, grads: Sequence[Array]) -> None:
        """Take a step."""
        self._t += 1
        wide = [grad.astype(np.float64) for grad in grads]
        if self._form == "twin":
            written = self.params + self.averages
            for array, grad in zip(written, itertools.cycle(wide), strict=False):
                array += grad
            return
        tail = self._work.tail
        if tail is not None:
            norm = math.sqrt(sum(float(np.sum(grad * grad)) for grad in wide))
            wide = [grad * min(1.0, tail.clipnorm / norm) for grad in wide]
            for param in self.params:
                param -= self._work.hyper.lr * tail.weight_decay * param
        self._update(wide)
        if tail is not None:
            # The first average equals the parameter.
            weight = 1.0 if self._t == 1 else 1 - tail.ema_momentum
            for average, param in zip(self.averages, self.params, strict=True):
                average += weight * (param - average)

    def _update(self, grads: Sequence[Array]) -> None:
        hyper = self._work.hyper
        a = math.sqrt(1 - hyper.beta_2**self._t)
        b = 1 - hyper.beta_1**self._t
        for param, grad, m, v in zip(self.params, grads, self._m, self._v, strict=True):
            m += (1 - hyper.beta_1) * (grad - m)
            v += (1 - hyper.beta_2) * (grad * grad - v)
            if self._form == "hat":
                param -= hyper.lr * a / b * m / (np.sqrt(v) + hyper.epsilon)
            else:
                param -= hyper.lr / b * m / (np.sqrt(v) / a + hyper.epsilon)
