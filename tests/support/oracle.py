# SPDX-License-Identifier: MIT
"""The reference for all results: the package's rules in plain NumPy, out of place.

Every operation is one IEEE operation in the dtype of the parameter, so a correct kernel agrees with
this file to the last bit. Constants are first converted to scalars of that dtype: NumPy 1.26 and
NumPy 2 promote Python floats and float64 scalars differently, but agree on operands of one dtype.

What is stored in fewer bits is computed in float32. `storage_oracle` has its formats.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import storage_oracle as storage

Array: TypeAlias = npt.NDArray[Any]

TILE = 1024
LANES = 16
MAX_BLOCKS = 4096

# Counts stop here: above it, float64 cannot represent odd integers.
LARGEST_COUNT = 2**53

# The initial and the largest dynamic loss scale, and the number of good steps until it doubles.
FIRST_LOSS_SCALE = 2.0**15
LARGEST_LOSS_SCALE = 2.0**127
GROWTH_INTERVAL = 2000

# A power can lie exactly halfway between two floats only if its odd part fits into 54 bits. That
# means t <= 34, or that beta is a power of two, which underflows to zero by t = 1076. Powers up to
# this exponent are computed exactly.
LARGEST_EXACT_POWER = 1_500
_DECIMAL = decimal.Context(prec=120, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])


def power(beta: float, t: int) -> float:
    """Return ``beta**t``, correctly rounded to float64, for ``0 <= beta < 1`` and ``t >= 0``.

    A small power is an exact fraction, which Python rounds once. A large power would have millions
    of digits. It is computed to 120 digits, far more than the 38 that a `t` below 2**63 can cost
    and the 17 of a float64. Its error bounds must round to the same float.
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
    """Return `lr` after inverse-time decay by the number of previous steps."""
    return lr * (1.0 / (1.0 + decay * iterations))


def lr_t(lr: float, beta_1: float, beta_2: float, t: int) -> float:
    """Return the learning rate of step `t` with both bias corrections, in float64."""
    return lr * (math.sqrt(1.0 - power(beta_2, t)) / (1.0 - power(beta_1, t)))


@np.errstate(all="ignore")
def adam_step(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    iterations: int | None = None,
    lr: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    bias_corrected_epsilon: bool = False,
    decay: float = 0.0,
    vhat: Array | None = None,
    ema: Array | None = None,
    ema_momentum: float = 0.99,
    weight_decay: float | None = None,
    l2: float = 0.0,
    flush_denormals: bool = True,
    rests_without_v: bool = False,
) -> tuple[Array, ...]:
    """Step one tensor. Return ``(p, m, v)``, followed by `vhat` and `ema` if given.

    The gradient is already scaled and clipped by `clip`. `step` counts the steps of the moments.
    `iterations` is the number of steps of the optimizer, if it differs. `rests_without_v` is the
    rule of packed moments: where the root is zero, the parameter only decays.
    """
    T = p.dtype.type
    b1, one_minus_b1 = T(beta_1), T(1.0 - beta_1)
    b2, one_minus_b2 = T(beta_2), T(1.0 - beta_2)
    decayed_lr = decayed(lr, decay, step - 1 if iterations is None else iterations)
    rate = T(lr_t(decayed_lr, beta_1, beta_2, step))
    eps = T(epsilon * math.sqrt(1.0 - power(beta_2, step)) if bias_corrected_epsilon else epsilon)

    if l2:
        g = g + (T(l2) * p)
    if weight_decay:
        p = p - (T(decayed_lr * weight_decay) * p)
    m = (b1 * m) + (one_minus_b1 * g)
    v = (b2 * v) + (one_minus_b2 * (g * g))
    if flush_denormals:
        tiny = np.finfo(T).smallest_normal
        m = np.where(np.abs(m) < tiny, T(0), m)
        v = np.where(np.abs(v) < tiny, T(0), v)
    largest = v
    if vhat is not None:
        vhat = largest = np.where((v <= vhat) | np.isnan(vhat), vhat, v)
    root = np.sqrt(largest)
    update = (rate * m) / (root + eps)
    p = p - (np.where(root == 0, T(0), update) if rests_without_v else update)
    if ema is not None:
        ema = averaged(ema, p, step=step, ema_momentum=ema_momentum)
    return tuple(np.asarray(x) for x in (p, m, v, vhat, ema) if x is not None)


@np.errstate(all="ignore")
def averaged(ema: Array, p: Array, *, step: int, ema_momentum: float) -> Array:
    """Return the moving average of a parameter after a step. The first one is the parameter."""
    T = p.dtype.type
    mu = 0.0 if step == 1 else ema_momentum
    return np.asarray((T(mu) * ema) + (T(1.0 - mu) * p))


def stored_step(
    stored: Mapping[str, Array],
    g: Array,
    dither: storage.Dither | None = None,
    *,
    step: int,
    ema_momentum: float = 0.99,
    overwrites: bool = False,
    **settings: Any,
) -> dict[str, Array]:
    """Step one tensor in its storage formats, which are those of the arrays for `storage.load`.

    Without dithers, everything is rounded to nearest. The average is that of the stored weight, which
    its rounding to nearest replaces if `overwrites`.
    """
    old = storage.load(stored)
    settings |= {"step": step, "vhat": old.get("vhat"), "rests_without_v": "packed" in stored}
    new_values = adam_step(old["params"], storage.widen(g), old["m"], old["v"], **settings)
    values = old | dict(zip(("params", "m", "v", "vhat"), new_values, strict=False))
    new = storage.store(values, stored, dither)
    if "ema" in old:
        weight = storage.load(new)["params"]
        new["ema"] = averaged(old["ema"], weight, step=step, ema_momentum=ema_momentum)
        if overwrites:
            new |= storage.store_weight_like(new["ema"].copy(), stored)
    return new


@np.errstate(all="ignore")
def sum_of_squares(g: Array) -> float:
    """Add the squares of one tensor in float64, in the specified order.

    Tiles have 1,024 elements. A tile has 16 running sums (element i goes to sum i % 16), which are
    then added in halves. The sums of tiles are added within at most 4,096 blocks of consecutive
    tiles, then the sums of blocks.
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
    """Add from left to right. The built-in `sum` compensates roundings since Python 3.12."""
    total = 0.0
    for value in values:
        total = total + value
    return total


def global_norm(grads: Sequence[Array]) -> float:
    """Return the norm of all gradients together, whatever their dtypes."""
    return math.sqrt(add_in_order(sum_of_squares(g) for g in grads))


@np.errstate(all="ignore")
def clip(
    grads: Sequence[Array],
    *,
    clipnorm: float | None = None,
    clipnorm_per_tensor: float | None = None,
    clipvalue: float | None = None,
    divisor: float | None = None,
    sign: float = 1.0,
) -> list[Array]:
    """Return the gradients as a step uses them: divided, clipped, and negated (-1) to ascend.

    `divisor` is the loss scale times the number of gradients in a mean, or None if neither applies.
    Norms are those of the divided gradients.
    """
    S = 1.0 if divisor is None else 1.0 / divisor
    bound = clipnorm or clipnorm_per_tensor or 0.0
    norms = [0.0] * len(grads)
    if clipnorm:
        norms = [global_norm(grads)] * len(grads)
    elif clipnorm_per_tensor:
        norms = [global_norm([g]) for g in grads]

    clipped = []
    for g, norm in zip(grads, norms, strict=True):
        n = norm * S
        is_long = bound > 0 and n >= bound
        if is_long or divisor is not None or sign != 1:
            f = S * (bound / n if is_long else 1.0)
            g = g.dtype.type(sign * f) * g
        if clipvalue:
            g = _clamp(g, clipvalue)
        clipped.append(np.asarray(g))
    return clipped


def _clamp(g: Array, clipvalue: float) -> Array:
    c = g.dtype.type(clipvalue)
    g = np.where(g < -c, -c, g)
    return np.where(g > c, c, g)


def all_finite(grads: Iterable[Array]) -> bool:
    """Whether no gradient has an infinity or a NaN."""
    return all(bool(np.isfinite(g).all()) for g in grads)


@np.errstate(all="ignore")
def sum_rows(indices: Array, grad_rows: Array) -> tuple[Array, Array]:
    """Return the named rows in ascending order, each once, with the sums of their gradients.

    Gradients of one row are added in input order: ``(r1 + r2) + r3``.
    """
    sums: dict[int, Array] = {}
    for index, row in zip(indices.tolist(), grad_rows, strict=True):
        sums[index] = np.asarray(sums[index] + row if index in sums else row.copy())
    rows = sorted(sums)
    summed = np.zeros((len(rows), *grad_rows.shape[1:]), grad_rows.dtype)
    for k, row in enumerate(rows):
        summed[k] = sums[row]
    return np.array(rows, dtype=np.intp), summed


@dataclass(eq=False, repr=False)
class OracleAdam:
    """A whole optimizer: several tensors of mixed dtypes, stepped together.

    After each step, `params`, `m`, `v`, `vhat` and `ema` are lists of new arrays (the last two
    empty if not requested). Nothing is written in place. `excluded` has the positions of parameters
    that do not decay, and `own` maps positions to settings. `transposed` has the positions of
    parameters in Fortran order, in which their norms are added up. Attributes may be set between
    steps.

    Parameters may also be float16 or bfloat16. With moments="packed", the list `packed` has the
    words of both moments, and `m` and `v` are empty. With `low_bits`, a list of that name has the
    low bits of each bfloat16 parameter, and None for others. It is None without that setting.
    `first_index` maps the positions of shards to the index of their first element.
    """

    params: Any
    _: KW_ONLY
    lr: float | Callable[[int], float] = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    bias_corrected_epsilon: bool = False
    decay: float = 0.0
    amsgrad: bool = False
    weight_decay: float | None = None
    l2: float = 0.0
    clipnorm: float | None = None
    clipnorm_per_tensor: float | None = None
    clipvalue: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale: float | str | None = None
    skip_nonfinite: bool = False
    gradient_accumulation_steps: int | None = None
    zero_grad: bool = False
    maximize: bool = False
    flush_denormals: bool = True
    moments: str = "float32"
    low_bits: Any = None
    rounding: str = "stochastic"
    seed: int = 0
    excluded: Any = ()
    own: Any = None

    def __post_init__(self) -> None:
        self.low_bits_dtype = self.low_bits
        self.build(self.params)
        self.iterations = self.skipped_steps = self.good_steps = 0
        self.dynamic_loss_scale = FIRST_LOSS_SCALE
        self.excluded = set(self.excluded)
        self.own = {i: dict(each) for i, each in (self.own or {}).items()}
        self.transposed: set[int] = set()
        self.first_index: dict[int, int] = {}

    def set_count(self, count: int) -> None:
        """Continue as if the optimizer and each parameter had taken this many steps."""
        self.iterations = count
        self.steps = [count] * len(self.params)

    def build(self, params: Iterable[Array]) -> None:
        """Start new moments for these parameters."""
        self.params = [p.copy() for p in params]
        self.low_bits = self.low_bits_dtype and [
            np.zeros_like(p, self.low_bits_dtype) if p.dtype == storage.BFLOAT16 else None
            for p in self.params
        ]
        is_packed = self.moments == "packed"
        assert not (is_packed and (self.amsgrad or any(p.dtype == np.float64 for p in self.params)))
        self.packed = [np.zeros_like(p, np.int16) for p in self.params] if is_packed else []
        self.m = [] if is_packed else self._zero_moments()
        self.v = [] if is_packed else self._zero_moments()
        self.vhat = self._zero_moments() if self.amsgrad else []
        self.ema = [storage.widen(p).copy() for p in self.params] if self.use_ema else []
        self.steps = [0] * len(self.params)
        self.accumulators: list[Array | None] = []
        self.accumulated = 0
        self._averages: list[Array] = []  # while they are swapped in

    def _zero_moments(self) -> list[Array]:
        return [np.zeros_like(p, storage.moment_dtype(p.dtype, self.moments)) for p in self.params]

    @property
    def current_loss_scale(self) -> float:
        """The factor by which to multiply the next loss."""
        if self.loss_scale is None:
            return 1.0
        return self.dynamic_loss_scale if self.loss_scale == "dynamic" else float(self.loss_scale)

    def step(self, grads: Sequence[Any]) -> list[Any]:
        """Take one call, which accumulates, skips or steps. Return the gradients as it leaves them.

        A gradient of None adds nothing to a mean. A parameter without any gradient does not change.
        """
        given = [None if g is None else storage.widen(g).copy() for g in grads]
        if self.accumulated:
            with np.errstate(all="ignore"):
                given = [
                    g if a is None else a if g is None else np.asarray(a + g)
                    for a, g in zip(self.accumulators, given, strict=True)
                ]
        if self.accumulated + 1 < (self.gradient_accumulation_steps or 1):
            self.accumulators = given
            self.accumulated += 1
        else:
            self.accumulated = 0
            self._step_or_skip(given)
        return self._after(grads)

    def apply_sparse(self, indices: Array, grad_rows: Array, *, lazy: bool = True) -> Array:
        """Step the only parameter with sparse gradients and return them as the call leaves them."""
        (p,) = self.params
        rows, summed = sum_rows(indices, storage.widen(grad_rows))
        if lazy:
            self._step_or_skip([summed], rows)
        else:
            g = np.zeros_like(p, storage.compute_dtype(p.dtype))
            g[rows] = summed
            self._step_or_skip([g])
        left: Array = self._after([grad_rows])[0]
        return left

    def gradients(self, grads: Sequence[Array]) -> list[Array]:
        """The result of `get_gradients`: unscaled and clipped, but neither averaged nor negated."""
        divisor = None if self.loss_scale is None else self.current_loss_scale
        positions = range(len(grads))
        turned = self._turned(positions, [storage.widen(g) for g in grads])
        clipped = [clip(turned, divisor=divisor, **self._clips(i))[i] for i in positions]
        return self._turned(positions, clipped)

    def swap_ema(self) -> None:
        """Swap the parameters with their averages, which are rounded to nearest, and back exactly.

        What was written to 16-bit parameters in between is lost.
        """
        kept, self._averages = self._averages, list(self.ema)
        for i, average in enumerate(list(self.ema)):
            stored = self._stored(i)
            self.ema[i] = storage.load(stored)["params"]
            self._replace(i, storage.store_weight_like(average, stored))
        if kept:
            pairs = zip(self.params, kept, self.ema, strict=True)
            self.ema = [average if p.dtype.itemsize == 2 else old for p, average, old in pairs]
            self._averages = []

    def weights(self) -> list[Array]:
        """Return ``[iterations] + packed + m + v + vhat``, as in the `weights` of `Adam`."""
        count = np.array(self.iterations, dtype=np.int64)
        return [count, *self.packed, *self.m, *self.v, *self.vhat]

    def _turned(self, positions: Iterable[int], grads: Sequence[Array]) -> list[Array]:
        """Transpose the gradients of Fortran-ordered parameters to memory order, or back."""
        pairs = zip(positions, grads, strict=True)
        return [g.T if i in self.transposed else g for i, g in pairs]

    def _clips(self, i: int) -> dict[str, Any]:
        names = ("clipnorm", "clipnorm_per_tensor", "clipvalue")
        return {name: self._setting(i, name) for name in names}

    def _after(self, grads: Sequence[Any]) -> list[Any]:
        return [g if g is None else np.zeros_like(g) if self.zero_grad else g.copy() for g in grads]

    def _setting(self, i: int, name: str) -> Any:
        """A setting of tensor `i`, its own or the shared one."""
        shared = getattr(self, name)
        if i in self.excluded and name in ("weight_decay", "l2"):
            shared = 0.0
        if callable(shared):
            shared = shared(self.iterations)
        return self.own.get(i, {}).get(name, shared)

    def _step_or_skip(self, grads: Sequence[Array | None], rows: Any = ...) -> None:
        """Step all tensors with gradients, or only these rows. Skip if one is not finite."""
        is_dynamic = self.loss_scale == "dynamic"
        positions = [i for i, g in enumerate(grads) if g is not None]
        present = [g for g in grads if g is not None]
        if (self.skip_nonfinite or is_dynamic) and not all_finite(present):
            self.skipped_steps = min(self.skipped_steps + 1, LARGEST_COUNT)
            if is_dynamic:
                self.dynamic_loss_scale = max(self.dynamic_loss_scale / 2, 1.0)
                self.good_steps = 0
            return

        count = self.gradient_accumulation_steps or 1
        is_divided = self.loss_scale is not None or count > 1
        for k, i in enumerate(positions):
            clipped = clip(
                self._turned(positions, present),
                divisor=self.current_loss_scale * count if is_divided else None,
                sign=-1.0 if self._setting(i, "maximize") else 1.0,
                **self._clips(i),
            )
            self._replace(i, self._stepped(i, self._turned(positions, clipped)[k], rows))
            self.steps[i] = min(self.steps[i] + 1, LARGEST_COUNT)
        self.iterations = min(self.iterations + 1, LARGEST_COUNT)
        if is_dynamic:
            self.good_steps += 1
            if self.good_steps >= GROWTH_INTERVAL:
                self.dynamic_loss_scale = min(2 * self.dynamic_loss_scale, LARGEST_LOSS_SCALE)
                self.good_steps = 0

    def _stored(self, i: int) -> dict[str, Array]:
        """The arrays of tensor `i` by the names of their lists."""
        names = ("params", "low_bits", "packed", "m", "v", "vhat", "ema")
        lists = {name: getattr(self, name) for name in names}
        return {name: of[i] for name, of in lists.items() if of and of[i] is not None}

    def _replace(self, i: int, news: Mapping[str, Array]) -> None:
        for name, array in news.items():
            getattr(self, name)[i] = array

    def _stepped(self, i: int, g: Array, rows: Any) -> dict[str, Array]:
        """Return the new arrays of tensor `i`."""
        olds = self._stored(i)
        is_rounded = any(old.dtype.itemsize < 4 for old in olds.values())
        is_nearest = self._setting(i, "rounding") == "nearest"
        settings = (
            *("lr", "beta_1", "beta_2", "epsilon", "bias_corrected_epsilon", "decay"),
            *("ema_momentum", "weight_decay", "l2", "flush_denormals"),
        )
        frequency = self._setting(i, "ema_overwrite_frequency")
        news = stored_step(
            {name: np.asarray(old[rows]) for name, old in olds.items()},
            g,
            self._dither(i, rows) if is_rounded and not is_nearest else None,
            step=self.steps[i] + 1,
            iterations=self.iterations,
            overwrites=bool(frequency) and (self.iterations + 1) % frequency == 0,
            **{name: self._setting(i, name) for name in settings},
        )
        whole = {name: old.copy() for name, old in olds.items()}
        for name, new in news.items():
            whole[name][rows] = new
        return whole

    def _dither(self, i: int, rows: Any) -> storage.Dither:
        """The dithers of these rows, by the indices of their elements in memory order."""
        p = self.params[i]
        index = self.first_index.get(i, 0) + np.arange(p.size)
        index = index.reshape(p.shape, order="F" if i in self.transposed else "C")
        seed = self._setting(i, "seed")
        return storage.dither(seed, self.steps[i] + 1, np.asarray(index[rows]))
