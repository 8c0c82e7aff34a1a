# SPDX-License-Identifier: MIT
"""The rules of the package once more, in plain NumPy and out of place: what the kernel is held to.

Every operation is one IEEE operation in the dtype of the parameter, so a right kernel agrees with
this file to the last bit. Constants are made scalars of that dtype first: NumPy 1.26 and NumPy 2
promote a Python float or a float64 scalar differently, two operands of one dtype they do not.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

TILE = 1024
LANES = 16
MAX_BLOCKS = 4096

# A power can lie exactly halfway between two floats only if its odd part fits 54 bits: t <= 34,
# or beta a power of two, where it underflows to zero by t = 1076. Up to here the power is exact.
LARGEST_EXACT_POWER = 1_500
_DECIMAL = decimal.Context(
    prec=120,
    Emin=decimal.MIN_EMIN,
    Emax=decimal.MAX_EMAX,
    traps=[],
)


def power(beta: float, t: int) -> float:
    """Return ``beta**t``, correctly rounded to float64, for ``0 < beta < 1`` and ``t >= 0``.

    A small power is an exact fraction, which Python rounds once. A large one would have millions of
    digits: it is taken to 120 digits, far more than the 38 that a `t` below 2**63 can cost
    and the 17 that a float64 holds, and its bounds must round to the same float.
    """
    if t <= LARGEST_EXACT_POWER:
        return float(Fraction(beta) ** t)
    approximation = _DECIMAL.power(decimal.Decimal(beta), t)
    error = _DECIMAL.multiply(approximation, decimal.Decimal("1e-60"))
    low = float(_DECIMAL.subtract(approximation, error))
    high = float(_DECIMAL.add(approximation, error))
    if low != high:
        message = f"{beta!r}**{t} is too near a rounding boundary for 60 digits"
        raise ArithmeticError(message)
    return low


def decayed(lr: float, decay: float, iterations: int) -> float:
    """Return `lr` after inverse-time decay by the count of steps taken before this one."""
    return lr * (1.0 / (1.0 + decay * iterations))


def lr_t(lr: float, beta_1: float, beta_2: float, t: int) -> float:
    """Return the learning rate of step `t`, both bias corrections folded in, in float64."""
    return lr * (math.sqrt(1.0 - power(beta_2, t)) / (1.0 - power(beta_1, t)))


@np.errstate(all="ignore")
def adam_step(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    lr: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    flush_denormals: bool = True,
) -> tuple[Array, Array, Array]:
    """Step one tensor once: the new ``(p, m, v)``."""
    T = p.dtype.type
    b1, one_minus_b1 = T(beta_1), T(1.0 - beta_1)
    b2, one_minus_b2 = T(beta_2), T(1.0 - beta_2)
    rate, eps = T(lr_t(lr, beta_1, beta_2, step)), T(epsilon)

    m = (b1 * m) + (one_minus_b1 * g)
    v = (b2 * v) + (one_minus_b2 * (g * g))
    if flush_denormals:
        tiny = np.finfo(T).smallest_normal
        m = np.where(np.abs(m) < tiny, T(0), m)
        v = np.where(np.abs(v) < tiny, T(0), v)
    p = p - (rate * m) / (np.sqrt(v) + eps)
    return np.asarray(p), np.asarray(m), np.asarray(v)


@np.errstate(all="ignore")
def sum_of_squares(g: Array) -> float:
    """Add the squares of one tensor, in float64 and in the one order that is promised.

    Tiles of 1,024 elements; in a tile 16 running sums, element i to sum i % 16, then halved. The
    tile sums are added within at most 4,096 blocks of consecutive tiles, then the blocks.
    """
    tiles = -(-g.size // TILE)
    padded = np.zeros(tiles * TILE)
    padded[: g.size] = g.ravel()
    rows = padded.reshape(tiles, TILE // LANES, LANES)

    acc = np.zeros((tiles, LANES))
    for i in range(TILE // LANES):
        acc = acc + rows[:, i] * rows[:, i]
    width = LANES
    while width > 1:
        width //= 2
        acc = acc[:, :width] + acc[:, width:]
    tile_sums = [float(s) for s in acc[:, 0]]

    per_block = max(1, -(-tiles // MAX_BLOCKS))
    blocks = [tile_sums[i : i + per_block] for i in range(0, tiles, per_block)]
    return add_in_order(add_in_order(block) for block in blocks)


def add_in_order(values: Iterable[float]) -> float:
    """Add from left to right. The built-in `sum` compensates its rounding since Python 3.12."""
    total = 0.0
    for value in values:
        total = total + value
    return total


def global_norm(grads: Sequence[Array]) -> float:
    """Return the norm over all gradients together, whatever their dtypes."""
    return math.sqrt(add_in_order(sum_of_squares(g) for g in grads))


@np.errstate(all="ignore")
def clip(
    grads: Sequence[Array], *, clipnorm: float | None = None, clipvalue: float | None = None
) -> list[Array]:
    """Scale the gradients down to the global norm `clipnorm`, then clamp them to `clipvalue`."""
    clipped = list(grads)
    if clipnorm:
        n = global_norm(grads)
        if n >= clipnorm:
            clipped = [g.dtype.type(clipnorm / n) * g for g in clipped]
    if clipvalue:
        clipped = [_clamp(g, clipvalue) for g in clipped]
    return [np.asarray(g) for g in clipped]


def _clamp(g: Array, clipvalue: float) -> Array:
    c = g.dtype.type(clipvalue)
    g = np.where(g < -c, -c, g)
    return np.where(g > c, c, g)


class OracleAdam:
    """A whole optimizer: several tensors of mixed dtypes, stepped together.

    `params`, `m` and `v` are lists of new arrays after each step; nothing is written in place.
    """

    def __init__(
        self,
        params: Iterable[Array],
        *,
        lr: float = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        decay: float = 0.0,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        flush_denormals: bool = True,
    ) -> None:
        self.params = [p.copy() for p in params]
        self.m = [np.zeros_like(p) for p in self.params]
        self.v = [np.zeros_like(p) for p in self.params]
        self.iterations = 0
        self.lr = lr
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.decay = decay
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.flush_denormals = flush_denormals

    def step(self, grads: Sequence[Array]) -> None:
        """Step every tensor once."""
        clipped = clip(grads, clipnorm=self.clipnorm, clipvalue=self.clipvalue)
        stepped = [
            adam_step(
                p,
                g,
                m,
                v,
                step=self.iterations + 1,
                lr=decayed(self.lr, self.decay, self.iterations),
                beta_1=self.beta_1,
                beta_2=self.beta_2,
                epsilon=self.epsilon,
                flush_denormals=self.flush_denormals,
            )
            for p, g, m, v in zip(self.params, clipped, self.m, self.v, strict=True)
        ]
        self.params = [p for p, _, _ in stepped]
        self.m = [m for _, m, _ in stepped]
        self.v = [v for _, _, v in stepped]
        self.iterations += 1

    def weights(self) -> list[Array]:
        """Return ``[iterations] + m + v``, as the optimizer under test lists them."""
        return [np.array(self.iterations, dtype=np.int64), *self.m, *self.v]
