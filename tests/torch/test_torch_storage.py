# SPDX-License-Identifier: MIT
"""What `fusedadam.torch` stores in 16 bits or fewer: steps, state that moves, averages, refusals."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fusedadam
import numpy as np
import pytest
import storage_oracle as storage
from helpers import Array, assert_same_bits, running, values
from oracle import OracleAdam

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import AdamW, attach, fused_step
from torch_helpers import KINDS, assert_everything_same_bits

DTYPES: dict[str, Any] = {
    "bf16": storage.BFLOAT16,
    "f16": storage.FLOAT16,
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
MOMENTS = ("auto", "float32", "bfloat16", "packed")
LOW_BITS = (None, "int8", "int16")
# One element, partial groups of 64, several vectors; the matrix is transposed in memory.
SHAPES: list[tuple[int, ...]] = [(), (37,), (9, 17), (3, 5, 7), (1300,)]

# torch's names of the arrays, and the oracle's.
NAMES = {
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "max_exp_avg_sq": "vhat",
    "packed_moments": "packed",
    "low_bits": "low_bits",
    "ema": "ema",
}


def array(t: Any) -> Array:
    """A copy of a tensor; NumPy itself has no bfloat16."""
    is_bfloat16 = t.dtype == torch.bfloat16
    x: Array = (t.detach().view(torch.int16) if is_bfloat16 else t.detach()).numpy().copy()
    return x.view(storage.BFLOAT16) if is_bfloat16 else x


def tensor(x: Array) -> Any:
    """A copy of an array; matrices are transposed in memory."""
    is_bfloat16 = x.dtype == storage.BFLOAT16
    t = torch.tensor(x.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.tensor(x)
    return t.t().contiguous().t() if t.dim() == 2 else t


def contents(optimizer: Any) -> list[dict[str, Array]]:
    """Copies of all parameters and their state."""
    return [
        {"param": array(p)} | {name: array(t) for name, t in optimizer.state.get(p, {}).items()}
        for p in params_of(optimizer)
    ]


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Beside:
    """An optimizer beside oracles, one for all parameters of a group with one kind of moments.

    Each group has parameters of these dtypes, and its own settings.
    """

    def __init__(
        self,
        kind: Any,
        dtypes: str,
        groups: Iterable[Mapping[str, Any]] = ({},),
        *,
        shapes: Iterable[tuple[int, ...]] = tuple(SHAPES),
        **settings: Any,
    ) -> None:
        self.rng = np.random.default_rng(1)
        of = list(itertools.product(dtypes.split(), shapes))
        self.optimizer = kind(
            [
                {
                    "params": [
                        torch.nn.Parameter(tensor(values(self.rng, shape, DTYPES[dtype])))
                        for dtype, shape in of
                    ],
                    **group,
                }
                for group in groups
            ],
            **{"lr": 0.01, "weight_decay": 0.1, "seed": 7, **settings},
        )
        self.oracles = list(self.new_oracles())
        assert len(self.oracles) == 1 or "max_grad_norm" not in settings  # the norm of all

    @property
    def params(self) -> list[Any]:
        return params_of(self.optimizer)

    def new_oracles(self) -> Iterator[tuple[list[int], OracleAdam]]:
        first = 0
        for group in self.optimizer.param_groups:
            by_moments: dict[str, list[int]] = {}
            for i, p in enumerate(group["params"], first):
                auto = "bfloat16" if p.dtype.itemsize == 2 else "float32"
                moments = group.get("moments", "auto")
                by_moments.setdefault(auto if moments == "auto" else moments, []).append(i)
            first += len(group["params"])
            for moments, positions in by_moments.items():
                yield positions, self.new_oracle(group, moments, positions)

    def new_oracle(self, group: Any, moments: str, positions: list[int]) -> OracleAdam:
        decay = "weight_decay" if isinstance(self.optimizer, AdamW) else "l2"
        reference = OracleAdam(
            [array(self.params[i]) for i in positions],
            lr=float(group["lr"]),
            beta_1=group["betas"][0],
            beta_2=group["betas"][1],
            epsilon=group["eps"],
            bias_corrected_epsilon=True,
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            clipnorm=group.get("max_grad_norm"),
            use_ema="ema_decay" in group,
            ema_momentum=group.get("ema_decay", 0.0),
            zero_grad=group.get("zero_grad_in_step", False),
            flush_denormals=group["eps"] >= 1e-12,
            moments=moments,
            low_bits=group.get("low_bits"),
            rounding=group.get("rounding", "stochastic"),
            seed=group.get("seed", 0),
            **{decay: group["weight_decay"]},
        )
        reference.transposed = {k for k, p in enumerate(reference.params) if p.ndim == 2}
        return reference

    def step(self, count: int = 1, *, missing: float = 0.0) -> None:
        """Take steps and check each. A part of the gradients is `missing`.

        At every second step, the layout of gradients is not that of parameters.
        """
        for i in range(count):
            grads: list[Any] = []
            for p in self.params:
                is_missing = self.rng.random() < missing
                like: Any = array(p)
                grad = values(self.rng, like.shape, like.dtype)
                grads.append(None if is_missing else grad)
                p.grad = None
                if not is_missing:
                    p.grad = tensor(grad).contiguous() if i % 2 else tensor(grad)
            self.optimizer.step()
            for positions, reference in self.oracles:
                left = reference.step([grads[k] for k in positions])
                for k, grad in zip(positions, left, strict=True):
                    if grad is not None:
                        assert_same_bits(array(self.params[k].grad), grad, f"gradient {k}")
            self.check()

    def check(self) -> None:
        for positions, reference in self.oracles:
            for k, i in enumerate(positions):
                p = self.params[i]
                state = dict(self.optimizer.state.get(p, {}))
                assert float(state.pop("step", 0.0)) == reference.steps[k]
                expected = reference._stored(k)
                actual = {"params": array(p)} | {NAMES[n]: array(t) for n, t in state.items()}
                if reference.steps[k]:
                    assert sorted(actual) == sorted(expected)
                for name in actual:
                    assert_same_bits(actual[name], expected[name], f"{name} of parameter {i}")

    def reformat(self, **formats: Any) -> None:
        """Set the formats of all groups. Let the oracles convert everything to nearest."""
        for group in self.optimizer.param_groups:
            group.update(formats)
        old_oracles, self.oracles = self.oracles, list(self.new_oracles())
        for (_, old), (_, new) in zip(old_oracles, self.oracles, strict=True):
            new.steps = list(old.steps)
            for k in range(len(new.params)):
                stored, like = old._stored(k), new._stored(k)
                converted = storage.store(storage.load(stored), like)
                if "low_bits" not in like:  # its low bits are dropped
                    converted["params"] = stored["params"]
                new._replace(k, converted)


# -- steps ------------------------------------------------------------------------------------

# Every combination of formats that is not refused.
FORMATS = [
    pytest.param(dtype, moments, low_bits, rounding, id=f"{dtype}-{moments}-{low_bits}-{rounding}")
    for dtype, moments, low_bits, rounding in itertools.product(
        DTYPES, MOMENTS, LOW_BITS, ("stochastic", "nearest")
    )
    if not (low_bits and dtype != "bf16")
    and not (dtype == "f64" and moments in ("bfloat16", "packed"))
    and not (rounding == "nearest" and (moments == "packed" or low_bits == "int8"))
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "moments", "low_bits", "rounding"), FORMATS)
def test_steps_equal_those_of_the_oracle(
    dtype: str, moments: str, low_bits: str | None, rounding: str, kind: Any
) -> None:
    formats: Any = {"moments": moments, "low_bits": low_bits, "rounding": rounding}
    Beside(kind, dtype, **formats).step(4)


OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True, "betas": (0.5, 0.5)},
    "average": {"ema_decay": 0.9},
    "norm": {"max_grad_norm": 0.5},
    "ascent": {"maximize": True},
    "zeroing": {"zero_grad_in_step": True},
    "epsilon 0": {"eps": 0.0},
    "lr as a tensor": {"lr": torch.tensor(0.02)},
    "all": {
        "amsgrad": True,
        "ema_decay": 0.5,
        "max_grad_norm": 0.5,
        "maximize": True,
        "zero_grad_in_step": True,
    },
}
SOME: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("bf16", {}),
    "default, f16": ("f16", {}),
    "float32": ("bf16 f16 f32", {"moments": "float32"}),
    "bfloat16": ("bf16 f16 f32", {"moments": "bfloat16"}),
    "bfloat16 + int16": ("bf16", {"moments": "bfloat16", "low_bits": "int16"}),
    "packed": ("bf16 f16 f32", {"moments": "packed"}),
    "packed + int8": ("bf16", {"moments": "packed", "low_bits": "int8"}),
}
# Formats, with dtypes that may have them.
some_formats = pytest.mark.parametrize(("dtypes", "formats"), SOME.values(), ids=SOME)


@some_formats
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_options(kind: Any, option: str, dtypes: str, formats: dict[str, Any]) -> None:
    options = dict(OPTIONS[option])
    if formats.get("moments") == "packed":
        options.pop("amsgrad", None)  # refused below
    Beside(kind, dtypes, **formats, **options).step(4)


def test_groups_of_different_formats_and_dtypes_with_missing_gradients() -> None:
    groups: list[dict[str, Any]] = [
        {},
        {"moments": "float32", "seed": 2**63 - 1, "amsgrad": True},
        {"rounding": "nearest", "ema_decay": 0.9},
        {"lr": 0.1, "weight_decay": 0.0},
    ]
    Beside(AdamW, "bf16 f64 f16 f32", groups).step(6, missing=0.3)
    groups = [
        {"moments": "packed", "low_bits": "int8"},
        {"moments": "packed", "low_bits": "int16"},
        {"moments": "bfloat16", "low_bits": "int8", "amsgrad": True},
        {"low_bits": "int16", "rounding": "nearest"},
        {},
    ]
    Beside(AdamW, "bf16 f32", groups, moments="bfloat16").step(6, missing=0.3)


@some_formats
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9}], ids=str)
def test_rows_of_an_embedding(dtypes: str, formats: dict[str, Any], options: Any) -> None:
    dtype, *_ = dtypes.split()
    beside = Beside(AdamW, dtype, shapes=[(50, 7)], **formats, **options)
    p = torch.nn.Parameter(beside.params[0].detach().contiguous())
    beside.optimizer.param_groups[0]["params"] = [p]
    ((_, reference),) = beside.oracles
    reference.transposed = set()
    for i in range(6):
        is_sparse = i % 3 != 2
        reference.bias_corrected_epsilon = not is_sparse  # as in SparseAdam
        words = torch.tensor(beside.rng.integers(0, 50, 12))
        out = torch.nn.functional.embedding(words, p, sparse=is_sparse)
        p.grad = None
        (out * tensor(values(beside.rng, (12, 7), DTYPES[dtype]))).sum().backward()
        if is_sparse:
            reference.apply_sparse(array(p.grad._indices()[0]), array(p.grad._values()))
        else:
            reference.step([array(p.grad)])
        beside.optimizer.step()
        beside.check()


@some_formats
def test_gradients_in_float32(dtypes: str, formats: dict[str, Any]) -> None:
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("gradients have the dtype of their parameter before torch 2.10")
    beside = Beside(AdamW, dtypes, **formats)
    for p in beside.params:
        p.grad_dtype = torch.float32
    for is_transposed in (True, False):
        grads = [values(beside.rng, tuple(p.shape), "float32") for p in beside.params]
        for p, grad in zip(beside.params, grads, strict=True):
            p.grad = tensor(grad) if is_transposed else torch.tensor(grad)
        beside.optimizer.step()
        for positions, reference in beside.oracles:
            reference.step([grads[i] for i in positions])
        beside.check()


@pytest.mark.parametrize("formats", [{}, {"moments": "packed"}], ids=str)
def test_scaler_of_a_float16_model(formats: dict[str, Any]) -> None:
    beside = Beside(AdamW, "f16", fused=True, **formats)  # fused: the step divides
    ((_, reference),) = beside.oracles
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(8):
        reference.loss_scale = scaler.get_scale()
        beside.optimizer.zero_grad()
        scaler.scale(sum((p * p.sin()).sum() for p in beside.params)).backward()
        grads = [array(p.grad) for p in beside.params]
        scaler.step(beside.optimizer)
        scaler.update()
        if all(np.isfinite(g).all() for g in grads):
            reference.step(grads)
        beside.check()
    assert 0 < reference.iterations < 8  # some overflow
    for p, grad in zip(beside.params, grads, strict=True):
        assert_same_bits(array(p.grad), grad / np.float16(reference.loss_scale), "unscaled")


@some_formats
def test_attached(dtypes: str, formats: dict[str, Any]) -> None:
    dtype, *_ = dtypes.split()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model.to(tensor(np.zeros(1, DTYPES[dtype])).dtype)
    twin = copy.deepcopy(model)
    optimizer, reference = (AdamW(m.parameters(), seed=3, **formats) for m in (model, twin))
    attach(model, optimizer)
    for i in range(4):
        x = torch.rand(6, 9, generator=torch.Generator().manual_seed(i)).to(model[0].weight.dtype)
        for m in (model, twin):
            m(x).square().mean().backward()
        reference.step()
        reference.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        assert_everything_same_bits(contents(optimizer), contents(reference), f"step {i}")


# The shape of a tensor, and the offset and shape of its part in one process.
PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((90, 70), (31, 0), (40, 70)),
    "columns": ((90, 70), (0, 13), (90, 29)),
    "one column": ((90, 70), (0, 69), (90, 1)),
    "block": ((90, 70), (5, 13), (37, 29)),
    "all": ((90, 70), (0, 0), (90, 70)),
    "some of a vector": ((5000,), (1237,), (2500,)),
    "middle of three": ((7, 50, 33), (0, 11, 0), (7, 17, 33)),
    "last of three": ((7, 50, 33), (2, 0, 5), (4, 50, 13)),
    "many columns": ((700, 300), (0, 100), (700, 100)),
}


@some_formats
@pytest.mark.parametrize(("whole", "offset", "shape"), PARTS.values(), ids=PARTS)
def test_parts_have_the_bits_of_the_whole(
    whole: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    dtypes: str,
    formats: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype = DTYPES[dtypes.split()[0]]
    rng = np.random.default_rng(6)
    start, *grads = (values(rng, whole, dtype) for _ in range(3))
    part = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))

    def stepped(of: Callable[[Array], Array], threads: int) -> dict[str, Array]:
        p = torch.nn.Parameter(tensor(of(start)).contiguous())
        optimizer = AdamW([p], lr=0.01, seed=3, **formats)
        for grad in grads:
            p.grad = tensor(of(grad)).contiguous()
            with running(threads=threads):
                optimizer.step()
        return contents(optimizer)[0]

    expected = stepped(lambda x: x, 1)
    monkeypatch.setattr(fused_step, "any_distributed", lambda _: True)
    monkeypatch.setattr(fused_step, "part_of", lambda _: (whole, offset))
    for threads in (1, 3):
        actual = stepped(lambda x: np.ascontiguousarray(x[part]), threads)
        for name, x in actual.items():
            assert_same_bits(x, expected[name][part] if x.ndim else expected[name], name)


# -- state that moves -------------------------------------------------------------------------


def loaded(state_dict: Any, optimizer: Any) -> Any:
    """Load into a new optimizer of copies of the parameters, with other settings."""
    groups = [
        {"params": [p.detach().clone().requires_grad_() for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    new = type(optimizer)(groups, lr=0.5, seed=3)
    new.load_state_dict(state_dict)
    return new


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def in_c_order(state_dict: Any) -> Any:
    """As of formats that store no strides."""
    for state in state_dict["state"].values():
        state.update(
            {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
        )
    return state_dict


WAYS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda o: loaded(copy.deepcopy(o.state_dict()), o),
    "file": lambda o: loaded(through_a_file(o.state_dict()), o),
    "file without strides": lambda o: loaded(in_c_order(through_a_file(o.state_dict())), o),
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


@some_formats
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies_go_on_with_the_same_bits(
    way: Callable[[Any], Any], dtypes: str, formats: dict[str, Any]
) -> None:
    beside = Beside(AdamW, dtypes, [formats, {}], ema_decay=0.9)
    beside.step(3)
    before = contents(beside.optimizer)
    beside.optimizer, old = way(beside.optimizer), beside.optimizer
    assert_everything_same_bits(contents(beside.optimizer), before)
    beside.step(3)
    assert_everything_same_bits(contents(old), before, "the original")


def test_integers_survive_loading() -> None:
    # torch casts state to the dtype of its parameter: in bfloat16, 12345 is 12352.
    optimizer = Beside(AdamW, "bf16", shapes=[(5,)], **SOME["packed + int8"][1]).optimizer
    (p,) = params_of(optimizer)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["packed_moments"].fill_(12345)
    optimizer.state[p]["low_bits"].fill_(-77)
    (state,) = loaded(through_a_file(optimizer.state_dict()), optimizer).state.values()
    assert state["packed_moments"].tolist() == [12345] * 5
    assert state["low_bits"].tolist() == [-77] * 5


def test_the_seed_chooses_the_roundings() -> None:
    beside = Beside(AdamW, "bf16")
    beside.step(2)
    one, same, other = (copy.deepcopy(beside.optimizer) for _ in range(3))
    other.param_groups[0]["seed"] += 1
    for optimizer in (one, same, other):
        for p in params_of(optimizer):
            p.grad = p.detach() / 2
        optimizer.step()
    assert_everything_same_bits(contents(same), contents(one))
    *_, a, b = contents(other)[-1], contents(one)[-1]
    for name in ("param", "exp_avg", "exp_avg_sq"):
        words = (x[name].view(np.int16).astype(np.int64) for x in (a, b))
        steps = np.abs(np.subtract(*words))
        # Neighbours: numbers between them were rounded to either.
        assert steps.max() == 1, name
        assert np.count_nonzero(steps) > steps.size / 10, name


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_state_of_torch_is_converted(dtype: str, moments: Any) -> None:
    rng = np.random.default_rng(2)

    def normal(shape: tuple[int, ...]) -> Array:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    def go(*optimizers: Any) -> None:
        for same in zip(*map(params_of, optimizers), strict=True):
            grad = tensor(normal(tuple(same[0].shape)))
            for p in same:
                p.grad = grad.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()

    params = [torch.nn.Parameter(tensor(normal(shape))) for shape in SHAPES]
    stock = torch.optim.AdamW(params, lr=0.05, eps=1e-3)  # in float16, torch's v underflows to zero
    for _ in range(5):
        go(stock)
    ours = AdamW([p.detach().clone().requires_grad_() for p in params_of(stock)], moments=moments)
    ours.load_state_dict(through_a_file(stock.state_dict()))
    for a, b in zip(contents(ours), contents(stock), strict=True):
        m, v = (storage.widen(b[name]) for name in ("exp_avg", "exp_avg_sq"))
        if moments == "packed":
            assert_same_bits(a["packed_moments"], storage.encode(m, v))
        else:
            kept = moments == "float32" or (moments, dtype) == ("auto", "f32")
            for name, x in (("exp_avg", m), ("exp_avg_sq", v)):
                assert_same_bits(a[name], x if kept else storage.to_bfloat16(x), name)
        assert a["step"] == b["step"] == 5

    # Training goes on as torch's would in float32.
    wide = torch.optim.AdamW([p.detach().float().requires_grad_() for p in params_of(stock)])
    wide.load_state_dict(through_a_file(stock.state_dict()))
    *_, start = (array(p) for p in params_of(wide))
    for _ in range(10):
        go(ours, wide)
    actual, expected = (storage.widen(array(params_of(o)[-1])) for o in (ours, wide))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected - start)

    # Measured: 0.06 if moments are packed; of rounded weights, 0.05 in bfloat16, 0.01 in float16.
    assert error < 0.15


def test_state_goes_to_torch_as_decoded() -> None:
    beside = Beside(AdamW, "f32", moments="packed")
    beside.step(3)
    words = [x["packed_moments"] for x in contents(beside.optimizer)]
    beside.optimizer.param_groups[0]["moments"] = "float32"
    stock = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in beside.params])
    stock.load_state_dict(through_a_file(beside.optimizer.state_dict()))
    for state, word in zip(contents(stock), words, strict=True):
        assert sorted(state) == ["exp_avg", "exp_avg_sq", "param", "step"]
        for name, x in zip(("exp_avg", "exp_avg_sq"), storage.decode(word), strict=True):
            assert_same_bits(state[name], x, name)
    for p in params_of(stock):
        p.grad = torch.ones_like(p)
    stock.step()


MIXES = [
    (dtype, {"moments": moments, "low_bits": low_bits})
    for dtype, moments, low_bits in itertools.product(("bf16", "f32"), MOMENTS, LOW_BITS)
    if dtype == "bf16" or not low_bits
]


@pytest.mark.parametrize("at", ["step", "state_dict"])
@pytest.mark.parametrize(("dtype", "before"), MIXES, ids=str)
def test_formats_change_between_steps(dtype: str, before: dict[str, Any], at: str) -> None:
    for other, after in MIXES:
        if other == dtype:
            beside = Beside(AdamW, dtype, **before)
            beside.step(2)
            beside.reformat(**after)
            if at == "state_dict":
                beside.optimizer.state_dict()
                beside.check()
            beside.step(2)


# -- averages ---------------------------------------------------------------------------------


@some_formats
def test_averages_begin_later(dtypes: str, formats: dict[str, Any]) -> None:
    beside = Beside(AdamW, dtypes, **formats)
    beside.step(2)
    beside.optimizer.param_groups[0]["ema_decay"] = 0.9
    for _, reference in beside.oracles:
        weights = [storage.load(reference._stored(k)) for k in range(len(reference.params))]
        reference.ema = [x["params"].copy() for x in weights]
        reference.ema_momentum = 0.9
    beside.step(2)


@some_formats
def test_averages_are_swapped_in_and_back(dtypes: str, formats: dict[str, Any]) -> None:
    beside = Beside(AdamW, dtypes, [formats, {}], ema_decay=0.9)
    beside.step(3)
    before = contents(beside.optimizer)
    for is_in in (True, False):
        beside.optimizer.swap_ema()
        for _, reference in beside.oracles:
            reference.swap_ema()
        beside.check()
        for p, old in zip(beside.params, before, strict=True):
            low = beside.optimizer.state[p].get("low_bits")
            of = None if low is None else array(low).dtype
            if is_in:
                # The nearest weight with these bits.
                weight, _ = storage.store_weight(old["ema"], old["param"].dtype, of)
                assert_same_bits(array(p), weight)
        if is_in:
            for refused in (beside.optimizer.step, beside.optimizer.state_dict):
                with pytest.raises(ValueError, match="swapped out first"):
                    refused()
    assert_everything_same_bits(contents(beside.optimizer), before)
    beside.step()


# -- refusals ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed with amsgrad": ("bfloat16", {"moments": "packed", "amsgrad": True}),
    "packed of float64": ("float64", {"moments": "packed"}),
    "bfloat16 of float64": ("float64", {"moments": "bfloat16"}),
    "packed of complex numbers": ("complex64", {"moments": "packed"}),
    "bfloat16 of complex numbers": ("complex64", {"moments": "bfloat16"}),
    "int8 of float16": ("float16", {"low_bits": "int8"}),
    "int16 of float16": ("float16", {"low_bits": "int16"}),
    "packed to nearest": ("float32", {"moments": "packed", "rounding": "nearest"}),
    "int8 to nearest": ("bfloat16", {"low_bits": "int8", "rounding": "nearest"}),
    "unknown moments": ("float32", {"moments": "float16"}),
    "moments of no name": ("float32", {"moments": 16}),
    "unknown low bits": ("bfloat16", {"low_bits": "int32"}),
    "low bits of no name": ("bfloat16", {"low_bits": 8}),
    "unknown rounding": ("bfloat16", {"rounding": "up"}),
    "negative seed": ("bfloat16", {"seed": -1}),
    "seed of 65 bits": ("bfloat16", {"seed": 2**64}),
    "broken seed": ("bfloat16", {"seed": 1.5}),
    "seed of a word": ("bfloat16", {"seed": "1"}),
}


@pytest.mark.parametrize("when", ["at first", "later"])
@pytest.mark.parametrize(("dtype", "settings"), REFUSED.values(), ids=REFUSED)
def test_refused(dtype: str, settings: dict[str, Any], when: str) -> None:
    def new(**formats: Any) -> Any:
        torch.manual_seed(0)
        return AdamW(
            [torch.nn.Parameter(torch.randn(9, 3, dtype=getattr(torch, dtype)))], **formats
        )

    def go(optimizer: Any, steps: int) -> None:
        for (p,) in [params_of(optimizer)] * steps:
            p.grad = torch.ones_like(p)
            optimizer.step()

    name = next(iter(settings))
    refusal = pytest.raises(
        (TypeError, ValueError), match=rf"{name}|low bits|16 bits.*Received: .+"
    )
    if when == "at first":
        with refusal:
            optimizer = new(**settings)  # many are refused here, before there is an optimizer
            before = contents(optimizer)
            try:
                go(optimizer, 1)
            finally:
                assert not optimizer.state
                assert_everything_same_bits(contents(optimizer), before)
        return
    amsgrad = {"amsgrad": True} if "amsgrad" in settings else {}
    optimizer, twin = new(**amsgrad), new(**amsgrad)
    for each in (optimizer, twin):
        go(each, 2)
    kept = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(settings)
    with refusal:
        go(optimizer, 1)
    assert_everything_same_bits(contents(optimizer), contents(twin), "after the refused step")
    optimizer.state_dict()
    optimizer.param_groups[0] = kept
    for each in (optimizer, twin):
        go(each, 1)
    assert_everything_same_bits(contents(optimizer), contents(twin), "after the next step")


def test_numpy_interface_takes_tensors_of_16_bits(tmp_path: Path) -> None:
    x = values(np.random.default_rng(0), (70,), "float32").astype(storage.BFLOAT16)
    of_arrays, of_tensors = (
        fusedadam.Adam(moments="packed", low_bits="int8", clipnorm=0.1) for _ in range(2)
    )
    arrays, tensors = [x.copy()], [tensor(x)]
    grads = [np.ones(70, storage.BFLOAT16)]
    expected = of_arrays.get_gradients(grads, arrays)[0]
    assert_same_bits(of_tensors.get_gradients([tensor(grads[0])], tensors)[0], expected)
    assert expected.dtype == np.float32
    of_arrays.step(arrays, grads)
    of_tensors.step(tensors, [tensor(grads[0])])
    assert_same_bits(array(tensors[0]), arrays[0])
    of_tensors.save(tmp_path / "adam.safetensors")
    resumed = fusedadam.Adam.load(tmp_path / "adam.safetensors", tensors)
    assert_same_bits(resumed.master_weights(tensors)[0], of_arrays.master_weights(arrays)[0])
    of_two = fusedadam.Adam(low_bits="int8")
    of_two.build([torch.ones(70, dtype=torch.bfloat16) for _ in range(2)])
    with pytest.raises(TypeError, match=r"params\[1\] must be float32.*Received: "):
        of_two.master_weights([tensors[0], torch.ones(70, dtype=torch.int16)])
    with pytest.raises(TypeError, match=r"params\[0\] must be float32.*Received: "):
        fusedadam.Adam.load(tmp_path / "adam.safetensors", [torch.ones(70, dtype=torch.int16)])


@pytest.mark.parametrize("low_bits", ["int8", None])
def test_error_after_a_change_of_formats_changes_nothing(low_bits: str | None) -> None:
    p = torch.nn.Parameter(tensor(values(np.random.default_rng(0), (70,), "float32")).bfloat16())
    optimizer = AdamW([p], low_bits="int16")
    p.grad = torch.ones_like(p)
    optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(dict(optimizer.state[p]))
    optimizer.param_groups[0].update(moments="packed", low_bits=low_bits)
    p.grad = torch.ones(70, dtype=torch.bfloat16).to_sparse()
    p.grad._indices()[0, 0] = 10**6  # out of range
    with pytest.raises(ValueError, match=r"indices.*Received: "):
        optimizer.step()
    assert_same_bits(array(p), array(before))
    assert optimizer.state[p].keys() == state.keys()
    for name, value in state.items():
        assert_same_bits(array(optimizer.state[p][name]), array(value), name)
