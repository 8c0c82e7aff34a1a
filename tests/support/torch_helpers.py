# SPDX-License-Identifier: MIT
"""Shared by the tests of `fusedadam.torch`: pairs of optimizers, and bounds on their difference.

`Drift` derives the tolerance instead of choosing it. Two programs that follow torch's formula
differ only by roundings. Each makes at most 2 units in the last place (ulp) of rounding error per
step in each quantity of the formula, relative to the magnitude of the terms that it adds:

- in m and in v: three roundings and one of a constant, each of half an ulp;
- in the numerator and the denominator of the update: three roundings each, and one of a constant;
- in p: the multiplication by ``1 - lr * weight_decay``, its constant, and two subtractions.

If lr is a float32 tensor, torch computes the scalars in float32: three more roundings.

Errors propagate as in the formula. Those of the moments shrink by beta and stay bounded, those of p
add up. Nothing is averaged: the bound would hold even if all roundings went in the same direction.
It is still far below the size of a step, which the tests check.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import Array, assert_same_bits, values

torch: Any = pytest.importorskip("torch")

import fusedadam.torch

# torch's class for each of this package's.
STOCK: dict[Any, Any] = {
    fusedadam.torch.Adam: torch.optim.Adam,
    fusedadam.torch.AdamW: torch.optim.AdamW,
}
KINDS = list(STOCK)
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": False,
}

ULP = 2.0
SIDES = 2
SHAPES: list[tuple[int, ...]] = [(17, 5), (), (0, 4), (257,)]
# Includes a parameter that is large enough for threads, and not a multiple of any vector width.
LARGE: list[tuple[int, ...]] = [(3,), (41_003,), (), (205, 201)]

Shapes = Sequence[tuple[int, ...]]


def leaves(shapes: Shapes = SHAPES, dtype: str = "float32", *, seed: int = 7) -> list[Any]:
    """Parameters of these shapes. The same seed gives the same values."""
    rng = np.random.default_rng(seed)
    return [torch.nn.Parameter(torch.tensor(values(rng, shape, dtype))) for shape in shapes]


def grads_like(rng: np.random.Generator, params: Iterable[Any], *, zeros: bool = True) -> list[Any]:
    """Gradients over 24 binary orders of magnitude. Without `zeros`, none of them is 0."""
    grads = []
    for p in params:
        g = values(rng, tuple(p.shape), str(p.dtype).removeprefix("torch."))
        if not zeros:
            g = np.asarray(np.where(g == 0, g.dtype.type(0.25), g))
        grads.append(torch.tensor(g))
    return grads


def set_grads(params: Iterable[Any], grads: Iterable[Any]) -> None:
    """Give each parameter its own copy of a gradient, without other views."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def array(t: Any) -> Array:
    """A dense copy of a tensor."""
    dense = t.detach().to_dense() if t.layout is not torch.strided else t.detach()
    copied: Array = dense.resolve_conj().resolve_neg().numpy().copy()
    return copied


def arrays(tensors: Iterable[Any]) -> list[Array]:
    return [array(t) for t in tensors]


def everything(optimizer: Any) -> list[dict[str, Array]]:
    """Copies of all parameters and their state. Missing state is left out."""
    return [
        {"param": array(p)} | {name: array(t) for name, t in optimizer.state.get(p, {}).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_everything_same_bits(
    actual: Sequence[dict[str, Array]], expected: Sequence[dict[str, Array]], what: str = ""
) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert sorted(a) == sorted(e), f"{what}: names of parameter {i}"
        for name in e:
            assert_same_bits(a[name], e[name], f"{what}: {name} of parameter {i}")


def stepped(optimizer: Any, grads: Iterable[Any]) -> None:
    """Set the gradients of all parameters in order, then step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_grads(params, grads)
    optimizer.step()


def train(optimizer: Any, steps: int, *, seed: int = 3) -> None:
    """Take steps with seeded gradients. The same shapes get the same gradients."""
    rng = np.random.default_rng(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        stepped(optimizer, grads_like(rng, params))


class Drift:
    """Bounds on the difference between two optimizers of one parameter, along one of them."""

    def __init__(self, p: Any, **options: Any) -> None:
        self._options = DEFAULTS | options
        info = np.finfo(array(p).dtype)
        self._ulp = ULP * SIDES * float(info.eps)
        # Values that round to a subnormal, or that one side flushes to zero.
        self._tiny = 4 * float(info.smallest_normal)
        self._p = array(p).astype(np.float64)
        self._m = np.zeros(p.shape)
        self.bounds = {
            name: np.zeros(p.shape) for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        }
        # The largest difference seen, relative to its bound.
        self.worst = 0.0

    def follow(
        self, after: dict[str, Array], grad: Any, *, grad_error: float = 0.0, **now: Any
    ) -> None:
        """Follow one step to the state `after`. `now` has options that have changed since.

        `grad_error` is the relative difference between the gradients of the two sides.
        """
        self._options |= now
        if self._p.size == 0:
            return
        o, ulp = self._options, self._ulp
        t = float(after["step"])
        lr, (beta_1, beta_2), decay = float(o["lr"]), o["betas"], float(o["weight_decay"])
        is_single = getattr(o["lr"], "dtype", None) is torch.float32
        wrong_lr = 3 * 2.0**-24 if is_single else 0.0
        p, m, v = (after[name].astype(np.float64) for name in ("param", "exp_avg", "exp_avg_sq"))
        d_p, d_m, d_v, d_max = self.bounds.values()

        g = array(grad).astype(np.float64) * (-1 if o["maximize"] else 1)
        d_g = np.abs(g) * grad_error
        if decay and not o["decoupled_weight_decay"]:
            d_g = d_g + decay * d_p + ulp * (np.abs(g) + decay * np.abs(self._p))
            g = g + decay * self._p

        terms = beta_1 * np.abs(self._m) + (1 - beta_1) * (np.abs(g) + np.abs(self._m))
        d_m = beta_1 * d_m + (1 - beta_1) * d_g + ulp * terms + self._tiny
        d_v = beta_2 * d_v + (1 - beta_2) * (2 * np.abs(g) + d_g) * d_g + ulp * v + self._tiny
        d_root, of_root = d_v, v
        if o["amsgrad"]:
            of_root = after["max_exp_avg_sq"].astype(np.float64)
            d_root = d_max = np.maximum(d_max, d_v)

        # The power may be off by one ulp on one side. Subtracting it from 1 amplifies the error.
        wrong_1, wrong_2 = (b**t * 2.0**-52 / (1 - b**t) for b in (beta_1, beta_2))
        correction = math.sqrt(1 - beta_2**t)
        rate, eps = lr * correction / (1 - beta_1**t), o["eps"] * correction
        root = np.sqrt(of_root)
        with np.errstate(divide="ignore", invalid="ignore"):
            d_root = np.fmin(d_root / root, np.sqrt(d_root))
            least = eps + np.maximum(root - d_root, 0)
            update = np.abs(rate * m / (root + eps))
            d_update = (
                np.abs(rate) * d_m / least
                + update * (d_root + eps * wrong_2) / least
                + update * (2 * ulp + wrong_1 + wrong_2 + wrong_lr)
            )
        # 0 / 0 is NaN on both sides and has no bound.
        defined = ~np.isnan(update)
        assert np.all(least[defined] > 0), "the denominator is known too badly for a bound"
        d_p = d_p + d_update + (ulp * (np.abs(p) + np.abs(self._p))) / 2 + self._tiny
        if decay and o["decoupled_weight_decay"]:
            d_p = d_p * (1 + lr * decay) + wrong_lr * np.abs(self._p)
        self.bounds = dict(zip(self.bounds, (d_p, d_m, d_v, d_max), strict=True))
        self._p, self._m = p, m

    def check(self, ours: dict[str, Array], theirs: dict[str, Array], what: str) -> None:
        assert sorted(ours) == sorted(theirs), f"{what}: names"
        for name, expected in theirs.items():
            actual = ours[name]
            assert actual.dtype == expected.dtype, f"{what}: dtype of {name}"
            assert actual.shape == expected.shape, f"{what}: shape of {name}"
            if name not in self.bounds:
                assert_same_bits(actual, expected, f"{what}: {name}")
                continue
            nan = np.isnan(expected)
            assert np.array_equal(nan, np.isnan(actual)), f"{what}: NaNs of {name}"
            error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))[~nan]
            # Before the first step, there is no difference and the bound is 0.
            bound = np.maximum(self.bounds[name][~nan], np.finfo(np.float64).tiny)
            worst = float(np.max(error / bound, initial=0.0))
            self.worst = max(self.worst, worst)
            assert worst <= 1, f"{what}: {name} differs by {worst:.3g} times the bound"


class Twins:
    """Our optimizer beside torch's, over equal parameters with equal gradients."""

    def __init__(
        self,
        kind: Any,
        *,
        shapes: Shapes = SHAPES,
        dtype: str = "float32",
        seed: int = 7,
        fused: bool = False,
        ours_only: dict[str, Any] | None = None,
        make: Callable[..., list[Any]] = leaves,
        **options: Any,
    ) -> None:
        self._rng = np.random.default_rng(seed + 1)
        self._zeros = options.get("eps", 1e-8) > 0
        self.ours = make(shapes, dtype, seed=seed)
        self.theirs = copy.deepcopy(self.ours)
        self.start = arrays(self.ours)
        self.optimizer = kind(self.ours, **copy.deepcopy(options), **(ours_only or {}))
        how = {"fused": True} if fused else {"foreach": False}
        self.stock = STOCK[kind](self.theirs, **copy.deepcopy(options), **how)
        group = self.stock.param_groups[0]
        self.drifts = [Drift(p, **{name: group[name] for name in DEFAULTS}) for p in self.theirs]

    def grads(self) -> list[Any]:
        return grads_like(self._rng, self.theirs, zeros=self._zeros)

    def step(self, grads: Sequence[Any] | None = None, *, grad_error: float = 0.0) -> None:
        given = self.grads() if grads is None else grads
        set_grads(self.ours, given)
        set_grads(self.theirs, given)
        self.optimizer.step()
        self.stock.step()
        self.follow(given, grad_error=grad_error)

    def follow(self, grads: Sequence[Any], *, grad_error: float = 0.0) -> None:
        """Follow a step that both have taken, with the options of torch's groups."""
        of = {p: group for group in self.stock.param_groups for p in group["params"]}
        after = everything(self.stock)
        for drift, p, state, g in zip(self.drifts, self.theirs, after, grads, strict=True):
            if g is not None:
                now = {name: of[p][name] for name in DEFAULTS}
                drift.follow(state, g, grad_error=grad_error, **now)

    def check(self, what: str = "") -> None:
        both = zip(everything(self.optimizer), everything(self.stock), strict=True)
        for i, (ours, theirs) in enumerate(both):
            self.drifts[i].check(
                ours, theirs, f"{what} parameter {i} of shape {self.start[i].shape}"
            )

    def run(self, steps: int, *, every: int = 1) -> None:
        for count in range(1, steps + 1):
            self.step()
            if count <= 3 or count % every == 0 or count == steps:
                self.check(f"step {count},")
