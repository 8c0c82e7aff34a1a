# SPDX-License-Identifier: MIT
"""How far apart two right implementations of the step can be: a bound derived, not measured.

Two programs that follow one formula differ by their roundings alone. `Divergence` follows one of
them and adds up, element by element and step by step, the most that the other can differ, given how
many roundings each makes. With u the unit roundoff of the dtype, first-order terms only (the
products of two of them are covered by `SLACK`):

- m = beta_1 m + (1 - beta_1) g, or m + (1 - beta_1) (g - m): at most 4 roundings a side, each of at
  most u times the sum of the terms' magnitudes, and the difference of the constants.
- v = beta_2 v + (1 - beta_2) g g: all terms >= 0, so at most 4 roundings of v itself a side, and the
  difference of the constants.
- sqrt(a) - sqrt(b) = (a - b) / (sqrt(a) + sqrt(b)), at most |a - b| / sqrt(a).
- the update lr_t m / (sqrt(v) + epsilon): the errors of m and of the root, and at most 8 roundings a
  side where the root may be wrong by 2 units in the last place; and the difference of lr_t.
- p - update: one rounding of the result a side.
"""

from __future__ import annotations

import numpy as np
from helpers import Array

SLACK = 1.01


class Divergence:
    """Bounds on the differences of m, v and p of one tensor, as arrays of float64."""

    def __init__(self, p: Array) -> None:
        info = np.finfo(p.dtype)
        self._u = float(info.eps) / 2
        # What is flushed to zero on either side, or rounds to a subnormal.
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
        """Follow one step of one side: its ``(m, v)`` before, its ``(p, m, v)`` after, its gradient.

        The errors bound differences between the sides: that of lr_t is relative, those of the
        gradient (element by element) and of the constants are absolute.
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
        """Fail unless ``(p, m, v)`` of both sides are within the bounds."""
        for name, bound, a, b in zip("pmv", (self.p, self.m, self.v), ours, theirs, strict=True):
            error = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            worst = float(np.max(error / bound, initial=0.0))
            assert worst <= 1, f"{what}: {name} differs by {worst:.3g} times the bound"
