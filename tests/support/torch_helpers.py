# SPDX-License-Identifier: MIT
"""A training of `fusedadam.torch` beside the oracle, and beside torch's own optimizer."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import oracle
import pytest
import storage_oracle as storage
from helpers import Array, assert_same_bits, values

torch: Any = pytest.importorskip("torch")

import fusedadam.torch
from fusedadam.torch.settings import EXTRAS

# On a busy machine, torch's other threads cost far more time than they save.
torch.set_num_threads(1)

# torch's class for each of this package's.
STOCK: dict[Any, Any] = {
    fusedadam.torch.Adam: torch.optim.Adam,
    fusedadam.torch.AdamW: torch.optim.AdamW,
}
KINDS = list(STOCK)

Shapes: TypeAlias = Sequence[tuple[int, ...]]
# A number, an empty matrix, a partial group of 64 elements, and several vectors.
SHAPES: Shapes = [(17, 5), (), (0, 4), (257,)]
# Includes a parameter that is large enough for threads, and not a multiple of any vector width.
LARGE: Shapes = [(3,), (41_003,), ()]

# torch's names of the arrays of state, and the oracle's.
NAMES = {
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "max_exp_avg_sq": "vhat",
    "packed_moments": "packed",
    "low_bits": "low_bits",
    "ema": "ema",
}

# Settings, of which the first one is named, and what is raised.
BAD_SETTINGS: list[tuple[dict[str, Any], Any]] = [
    *(({"lr": bad}, ValueError) for bad in (math.nan, math.inf)),
    *(({"lr": bad}, TypeError) for bad in (True, "high", None)),
    *(({"betas": bad}, ValueError) for bad in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9)),
    *(({"betas": bad}, TypeError) for bad in ((True, 0.9), (0.9, "0.9"))),
    *(({"eps": bad}, ValueError) for bad in (-1.0, math.nan, math.inf)),
    *(({"weight_decay": bad}, ValueError) for bad in (-1.0, math.nan)),
    ({"weight_decay": -1.0, "decoupled_weight_decay": False}, ValueError),
    *(({"max_grad_norm": bad}, ValueError) for bad in (-1.0, math.nan, math.inf)),
    *(({"max_grad_norm": bad}, TypeError) for bad in ("1", b"1", np.bool_(1), torch.tensor(True))),
    *(({"ema_decay": bad}, ValueError) for bad in (-0.1, 1.5, math.nan)),
    ({"ema_decay": "0.9"}, TypeError),
    *(({n: True}, TypeError) for n in ("max_grad_norm", "ema_decay", "eps", "weight_decay")),
    ({"zero_grad_in_step": "no"}, ValueError),
    ({"differentiable": True}, ValueError),
    ({"moments": "packed", "amsgrad": True}, ValueError),
    ({"moments": "packed", "rounding": "nearest"}, ValueError),
    ({"low_bits": "int8", "rounding": "nearest"}, ValueError),
    *(({"moments": bad}, (ValueError, TypeError)) for bad in ("float16", 16)),
    *(({"low_bits": bad}, (ValueError, TypeError)) for bad in ("int32", 8)),
    ({"rounding": "up"}, ValueError),
    *(({"seed": bad}, (ValueError, TypeError)) for bad in (-1, 2**63, 1.5, "1")),
]  # fmt: skip


def array(t: Any) -> Array:
    """A dense copy of a tensor; of complex numbers, as pairs of reals."""
    t = (t.detach().to_dense() if t.layout is not torch.strided else t.detach()).resolve_conj()
    t = torch.view_as_real(t) if t.is_complex() else t.resolve_neg()
    is_bfloat16 = t.dtype == torch.bfloat16  # which NumPy lacks
    x: Array = (t.view(torch.int16) if is_bfloat16 else t).numpy().copy()
    return x.view(storage.BFLOAT16) if is_bfloat16 else x


def arrays(tensors: Iterable[Any]) -> list[Array]:
    return [array(t) for t in tensors]


def tensor(x: Array) -> Any:
    """A copy of an array as a tensor: the inverse of `array`."""
    is_bfloat16 = x.dtype == storage.BFLOAT16
    return torch.tensor(x.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.tensor(x)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """A tensor of numbers over 24 binary orders of magnitude, a tenth of them zero."""
    name = str(dtype).removeprefix("torch.")
    if name.startswith("complex"):
        parts = (tensor(values(rng, shape, f"float{int(name[7:]) // 2}")) for _ in range(2))
        return torch.complex(*parts)
    return tensor(values(rng, shape, name))


def drawn_rows(rng: np.random.Generator, indices: Array, p: Any) -> Any:
    """A sparse gradient of a table, for these rows."""
    rows = drawn(rng, (len(indices), *p.shape[1:]), p.dtype)
    return sparse(indices, rows, p.shape)


def sparse(indices: Any, rows: Any, shape: tuple[int, ...]) -> Any:
    index = torch.as_tensor(indices)[None].long()
    return torch.sparse_coo_tensor(index, rows, shape, check_invariants=True)


def leaves(shapes: Shapes = SHAPES, dtype: str = "float32", *, seed: int = 7) -> list[Any]:
    """Parameters of these shapes. The same seed gives the same values."""
    rng = np.random.default_rng(seed)
    return [torch.nn.Parameter(drawn(rng, shape, dtype)) for shape in shapes]


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer: Any) -> list[dict[str, Array]]:
    """Copies of all parameters and their state. Missing state is left out."""
    return [
        {"param": array(p)} | {name: array(t) for name, t in optimizer.state.get(p, {}).items()}
        for p in params_of(optimizer)
    ]


def assert_everything_same_bits(
    actual: Sequence[dict[str, Array]], expected: Sequence[dict[str, Array]], what: str = ""
) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert sorted(a) == sorted(e), f"{what}: names of parameter {i}"
        for name in e:
            assert_same_bits(a[name], e[name], f"{what}: {name} of parameter {i}")


def assert_close(ours: Any, theirs: Any, *, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    """Two optimizers have the same parameters and state, but for roundings."""
    for i, (a, e) in enumerate(zip(everything(ours), everything(theirs), strict=True)):
        assert sorted(set(a) - {"ema"}) == sorted(e), f"names of parameter {i}"
        for name, expected in e.items():
            assert a[name].dtype == expected.dtype, f"dtype of {name} of parameter {i}"
            message = f"{name} of parameter {i}"
            np.testing.assert_allclose(a[name], expected, rtol=rtol, atol=atol, err_msg=message)


def train(optimizer: Any, steps: int, *, seed: int = 3) -> None:
    """Take steps with seeded gradients. The same shapes get the same gradients."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        for p in params_of(optimizer):
            p.grad = drawn(rng, tuple(p.shape), p.dtype)
        optimizer.step()


def in_memory_order(p: Any) -> Array:
    """The position in memory of each element, relative to the first one of the tensor."""
    like = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
    index: Array = torch.arange(like.numel()).as_strided(like.shape, like.stride()).numpy()
    return index


class Training:
    """An optimizer, and what the oracle expects of each of its parameters.

    The oracle reads the settings of the groups at each step, so they may change in between, and so
    may the formats of state: both sides convert it to nearest. `lay_out` makes a parameter of a
    tensor, and `place` the gradient of a parameter of a new tensor. With `beside_torch`, torch's
    optimizer takes the same steps on copies of the parameters.
    """

    def __init__(
        self,
        kind: Any = fusedadam.torch.Adam,
        shapes: Shapes = SHAPES,
        dtypes: str = "float32",
        *,
        groups: Iterable[Mapping[str, Any]] = ({},),
        lay_out: Callable[[Any], Any] = torch.clone,
        place: Callable[[Any, Any], Any] = lambda g, _: g,
        beside_torch: bool = False,
        **options: Any,
    ) -> None:
        self.rng = np.random.default_rng(7)
        self.place = place
        self.zeros = options.get("eps") != 0  # 0 / 0 is NaN without epsilon
        of = list(itertools.product(dtypes.split(), shapes))
        made = [
            {"params": [torch.nn.Parameter(lay_out(drawn(self.rng, s, d))) for d, s in of], **group}
            for group in groups
        ]
        self.stock: Any = None
        if beside_torch:
            theirs = [g | {"params": copy.deepcopy(g["params"])} for g in copy.deepcopy(made)]
            known = {name: value for name, value in options.items() if name not in EXTRAS}
            self.stock = STOCK[kind](theirs, **copy.deepcopy(known) | {"foreach": False})
        self.optimizer = kind(made, **copy.deepcopy(options))
        self.adopt()

    @classmethod
    def of(cls, optimizer: Any) -> Training:
        """Follow an optimizer that is already there."""
        training = cls(shapes=[])
        training.optimizer = optimizer
        training.adopt()
        return training

    @property
    def params(self) -> list[Any]:
        return params_of(self.optimizer)

    @property
    def state(self) -> list[dict[str, Any]]:
        return [self.optimizer.state.get(p, {}) for p in self.params]

    @property
    def group_of(self) -> list[dict[str, Any]]:
        """The group of each parameter."""
        return [group for group in self.optimizer.param_groups for _ in group["params"]]

    def adopt(self) -> None:
        """Expect what is there: after a change by hand."""
        self.stored = [
            {"params": array(p)} | {NAMES[n]: array(t) for n, t in state.items() if n != "step"}
            for p, state in zip(self.params, self.state, strict=True)
        ]
        self.steps = [int(state.get("step", 0)) for state in self.state]

    def grads(self, *, missing: float = 0.0) -> list[Any]:
        """Draw gradients. A part of them is `missing`."""
        grads: list[Any] = []
        for p in self.params:
            g = drawn(self.rng, tuple(p.shape), p.dtype)
            g = g if self.zeros else torch.where(g == 0, 0.25, g).to(g.dtype)
            grads.append(None if self.rng.random() < missing else g)
        return grads

    def give(self, grads: Sequence[Any]) -> None:
        """Give each parameter a copy of its gradient, where `place` says."""
        for p, g in zip(self.params, grads, strict=True):
            p.grad = None  # whose dtype or layout may be another one
            if g is not None:
                p.grad = self.place(g.clone(), p) if g.layout is torch.strided else g.clone()

    def run(self, steps: int, *, missing: float = 0.0) -> None:
        for _ in range(steps):
            self.step(missing=missing)

    def step(self, grads: Sequence[Any] | None = None, *, missing: float = 0.0) -> None:
        """Take a step and check it."""
        grads = self.grads(missing=missing) if grads is None else grads
        self.give(grads)
        self.stepped(grads, self.optimizer.step)
        if self.stock is not None:
            for p, g in zip(params_of(self.stock), grads, strict=True):
                p.grad = None if g is None else g.clone()
            self.stock.step()

    def stepped(self, grads: Sequence[Any], step: Callable[[], object]) -> None:
        """Check a step by any other call, with gradients that the parameters have."""
        scale = getattr(self.optimizer, "grad_scale", None)
        scale = None if scale is None else float(scale)
        held = [p.grad for p in self.params]
        if scale is None or 2.0**-127 <= scale <= 2.0**127:
            self.expect(grads, scale)
        else:  # torch divides
            self.expect([g if g is None else g / scale for g in grads])
        step()
        for i, (g, state, stored) in enumerate(zip(grads, self.state, self.stored, strict=True)):
            # A step may also convert the state of parameters without gradients.
            actual = {NAMES[name]: array(t).dtype for name, t in state.items() if name != "step"}
            expected = {name: x.dtype for name, x in stored.items() if name != "params"}
            if g is None and actual != expected:
                self.convert(i)
        self.check()
        for i, (p, g, group) in enumerate(zip(self.params, grads, self.group_of, strict=True)):
            assert p.grad is held[i]
            if g is None:
                continue
            left = array(g) if scale is None else array(g / scale)
            is_zeroed = group.get("zero_grad_in_step")
            left = np.zeros_like(left) if is_zeroed else left
            assert_same_bits(array(p.grad), left, f"gradient {i} after the step")
            if is_zeroed and p.grad.is_sparse:
                assert p.grad._nnz() == 0

    def expect(self, grads: Sequence[Any], scale: float | None = None) -> None:
        """Let the oracle step the parameters that have a gradient, or the rows that are in it."""
        given: dict[int, tuple[Any, Array]] = {}
        flat: dict[int, Array] = {}  # in memory order, in which norms are added up
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is not None and g.is_sparse:
                rows = storage.widen(array(g._values()))
                given[i] = oracle.sum_rows(array(g._indices()[0]), rows)
                flat[i] = given[i][1].ravel()
            elif g is not None:
                given[i] = ..., in_memory_order(p)
                flat[i] = np.empty(given[i][1].size, storage.widen(array(g)).dtype)
                flat[i][given[i][1].ravel()] = storage.widen(array(g)).ravel()
        groups = self.group_of
        for k, (i, (rows, placed)) in enumerate(given.items()):
            group = groups[i]
            clipped = oracle.clip(
                list(flat.values()),
                clipnorm=group.get("max_grad_norm"),
                divisor=scale,
                sign=-1.0 if group["maximize"] else 1.0,
            )[k]
            dense = rows is ...
            grad = np.asarray(clipped[placed]) if dense else clipped.reshape(placed.shape)
            self._expect_one(i, group, rows, grad)

    def _expect_one(self, i: int, group: dict[str, Any], rows: Any, grad: Array) -> None:
        if group.get("ema_decay") is not None and "ema" not in self.stored[i]:
            self.stored[i]["ema"] = storage.load(self.stored[i])["params"].copy()
        unwanted = self.convert(i)
        p, step, eps = self.params[i], self.steps[i] + 1, float(group["eps"])
        beta_1, beta_2 = map(float, group["betas"])
        decoupled = isinstance(self.optimizer, torch.optim.AdamW)
        decay = "weight_decay" if group.get("decoupled_weight_decay", decoupled) else "l2"
        decays: dict[str, Any] = {decay: float(group["weight_decay"])}
        dither = None
        is_rounded = any(x.dtype.itemsize < 4 for x in self.stored[i].values())
        if is_rounded and group.get("rounding") != "nearest":
            index = in_memory_order(p)
            dither = storage.dither(group.get("seed", 0), step, np.asarray(index[rows]))
        new = oracle.stored_step(
            {n: np.asarray(x[rows]) for n, x in self.stored[i].items() if n not in unwanted},
            grad,
            dither,
            step=step,
            lr=float(group["lr"]),
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=eps,
            bias_corrected_epsilon=rows is ...,  # sparse ones are as in SparseAdam
            flush_denormals=eps >= 1e-12,
            ema_momentum=group.get("ema_decay") or 0.0,
            **decays,
        )
        for name, x in new.items():
            self.stored[i][name] = self.stored[i][name].copy()
            self.stored[i][name][rows] = x
        self.steps[i] = step

    def convert(self, i: int) -> set[str]:
        """Convert what is expected to the formats of the group, or begin its moments.

        Return the names of averages and maxima that are no longer wanted: they stay as they are.
        """
        group, stored = self.group_of[i], self.stored[i]
        dtype, moments = stored["params"].dtype, group.get("moments", "auto")
        moment = storage.moment_dtype(dtype, moments)
        is_packed = moments == "packed"
        formats = {"packed": np.dtype(np.int16)} if is_packed else {"m": moment, "v": moment}
        if group["amsgrad"]:
            formats["vhat"] = moment
        if group.get("ema_decay") is not None and "ema" in stored:
            formats["ema"] = storage.compute_dtype(dtype)
        if group.get("low_bits") and dtype == storage.BFLOAT16:
            formats["low_bits"] = np.dtype(group["low_bits"])
        unwanted: set[str] = {
            name for name in ("vhat", "ema") if name in stored and name not in formats
        }
        used = {name: x for name, x in stored.items() if name not in unwanted}
        if {name: x.dtype for name, x in used.items() if name != "params"} != formats:
            loaded = storage.load(used)
            zeros = np.zeros_like(loaded["params"])
            begun = {"m": zeros, "v": zeros, "vhat": zeros}
            like = {name: np.empty(zeros.shape, of) for name, of in formats.items()}
            new = storage.store(begun | loaded, like | {"params": stored["params"]})
            new |= {name: stored[name] for name in unwanted}
            # What keeps its format keeps its bits, unless a weight is split into other low bits.
            same = {n: x for n, x in stored.items() if n in new and new[n].dtype == x.dtype}
            if "low_bits" in stored.keys() - same.keys() and "low_bits" in new:
                del same["params"]
            self.stored[i] = new | same
        return unwanted

    def convert_all(self) -> None:
        """Convert what is expected of parameters that have state."""
        for i, state in enumerate(self.state):
            if state:
                self.convert(i)

    def check(self, what: str = "") -> None:
        """Everything is as expected, to the last bit."""
        both = zip(self.params, self.state, self.stored, self.steps, strict=True)
        for i, (p, state, stored, steps) in enumerate(both):
            assert float(state.get("step", 0)) == steps, f"{what} step of parameter {i}"
            actual = {"params": array(p)}
            actual |= {NAMES[name]: array(t) for name, t in state.items() if name != "step"}
            assert sorted(actual) == sorted(stored), f"{what} names of parameter {i}"
            for name, x in actual.items():
                assert_same_bits(x, stored[name], f"{what} {name} of parameter {i}")

    def check_torch(self, **tolerance: float) -> None:
        """Check that torch's optimizer has the same parameters and state, but for roundings."""
        assert_close(self.optimizer, self.stock, **tolerance)

    def swap_ema(self) -> None:
        """Swap the averages in, check them, and swap them back to the same bits."""
        before = everything(self.optimizer)
        self.optimizer.swap_ema()
        for old, p, state in zip(before, self.params, self.state, strict=True):
            low = state.get("low_bits")
            if "ema" in old:
                of = None if low is None else array(low).dtype
                weight, low_bits = storage.store_weight(old["ema"], old["param"].dtype, of)
                assert_same_bits(array(p), weight, "average swapped in")
                joined = storage.load_weight(old["param"], old.get("low_bits"))
                assert_same_bits(array(state["ema"]), joined, "weight swapped out")
                if low is not None and low_bits is not None:
                    assert_same_bits(array(low), low_bits, "low bits swapped in")
        self.optimizer.swap_ema()
        self.check("swapped back")

    @contextlib.contextmanager
    def refused(
        self, match: str, error: Any = (TypeError, ValueError), *, spoilt: bool = False
    ) -> Iterator[None]:
        """A block that raises, after which nothing has changed, and the next step is right.

        If the block itself has spoilt groups, state or memory before, this is first undone.
        """
        optimizer, params = self.optimizer, self.params
        held = [(p.data, p.grad, None if p.grad is None else p.grad.clone()) for p in params]
        groups = [dict(g) | {"params": list(g["params"])} for g in optimizer.param_groups]
        state = {p: dict(own) for p, own in optimizer.state.items()}
        with pytest.raises(error, match=match):
            yield
        for p, (_, grad, copied) in zip(params, held, strict=True):
            if p.grad is grad and grad is not None:
                assert_same_bits(array(grad), array(copied), "a gradient after a refused call")
        if spoilt:
            optimizer.param_groups[:] = groups
            optimizer.state.clear()
            optimizer.state.update(state)
            for p, (memory, *_) in zip(params, held, strict=True):
                p.grad = None
                p.data = memory
        assert len(optimizer.param_groups) == len(groups)
        self.check("after the refused call,")
