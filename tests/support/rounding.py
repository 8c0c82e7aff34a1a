# SPDX-License-Identifier: MIT
"""A derived bound on the difference between two correct implementations of the step.

Two programs that follow one formula differ only by their roundings. `Divergence` follows one of
them. For each element and step, it adds up the largest possible difference to the other, given the
number of roundings of each. u is the unit roundoff of the dtype. Only first-order terms count;
`SLACK` covers products of two of them:

- m = beta_1 m + (1 - beta_1) g, or m + (1 - beta_1) (g - m): at most 4 roundings per side, each at
  most u times the sum of the terms' magnitudes, plus the difference of the constants.
- v = beta_2 v + (1 - beta_2) g g: all terms are >= 0, so at most 4 roundings of v itself per side,
  plus the difference of the constants.
- sqrt(a) - sqrt(b) = (a - b) / (sqrt(a) + sqrt(b)), at most |a - b| / sqrt(a).
- the update lr_t m / (sqrt(v) + epsilon): the errors of m and of the root, at most 8 roundings per
  side if the root may be off by 2 units in the last place, and the difference of lr_t.
- p - update: one rounding of the result per side.
"""

from __future__ import annotations

import numpy as np
from helpers import Array

SLACK = 1.01


class Divergence:
    """Bounds on the differences of m, v and p of one tensor, as float64 arrays."""

    def __init__(self, p: Array) -> None:
        info = np.finfo(p.dtype)
        self._u = float(info.eps) / 2
        # Values that either side flushes to zero or rounds to a subnormal.
        self._tiny = 4 * float(info.smallest_normal)
        self.m = np.zeros(p.shape)
        self.v = np.zeros(p.shape)
        self.p = np.zeros(p.shape)

    def step(
        self,
        before: tuple[Array, Array],
        after: tuple[Array, Array, Array],
        g: Array,
        *,
        lr_t: float,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        lr_t_error: float = 0.0,
        one_minus_beta_1_error: float = 0.0,
        one_minus_beta_2_error: float = 0.0,
        g_error: Array | float = 0.0,
    ) -> None:
        """Follow one step of one side: ``(m, v)`` before, ``(p, m, v)`` after, and gradient.

        The errors bound differences between the sides. The error of lr_t is relative. Those of the
        gradient (per element) and of the constants are absolute.
        """
        u = self._u
        m_before, _ = (np.asarray(x, np.float64) for x in before)
        p, m, v = (np.asarray(x, np.float64) for x in after)
        g = np.asarray(g, np.float64)

        terms = np.abs(m_before) + (1 - beta_1) * (np.abs(g) + np.abs(m_before))
        from_g = (1 - beta_1) * g_error + one_minus_beta_1_error * np.abs(g)
        self.m = SLACK * (beta_1 * self.m + 8 * u * terms + from_g) + self._tiny

        squared_error = (2 * np.abs(g) + g_error) * g_error
        from_g = (1 - beta_2) * squared_error + one_minus_beta_2_error * g * g
        self.v = SLACK * (beta_2 * self.v + 8 * u * v + from_g) + self._tiny

        root = np.sqrt(v)
        with np.errstate(divide="ignore"):
            root_error = np.minimum(self.v / root, np.sqrt(self.v))
        least = root + epsilon - root_error
        assert np.all(least > 0), "the denominator is known too badly for a bound"
        update = np.abs(lr_t * m / (root + epsilon))
        update_error = (
            lr_t * self.m / least + update * root_error / least + update * (16 * u + lr_t_error)
        )
        self.p = self.p + SLACK * update_error + 2 * u * (np.abs(p) + self.p) + self._tiny

    def check(self, ours: tuple[Array, ...], theirs: tuple[Array, ...], what: str) -> None:
        """Fail unless the differences of ``(p, m, v)`` are within the bounds."""
        for name, bound, a, b in zip("pmv", (self.p, self.m, self.v), ours, theirs, strict=True):
            error = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            worst = float(np.max(error / bound, initial=0.0))
            assert worst <= 1, f"{what}: {name} differs by {worst:.3g} times the bound"
