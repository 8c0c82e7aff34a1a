# SPDX-License-Identifier: MIT
"""`fusedadam.torch` in the tensors' own memory: layouts, offsets, memory that moves, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_same_bits

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import Training, array, drawn, leaves, params_of

EXTRAS: dict[str, Any] = {"amsgrad": True, "ema_decay": 0.9, "max_grad_norm": 0.5}


def laid_out(values_of: Any, order: tuple[int, ...], *, offset: int = 0) -> Any:
    """The same values, dense, with dimensions in this order from slowest to fastest in memory."""
    t = torch.as_tensor(values_of)
    buffer = torch.full((t.numel() + offset,), math.nan, dtype=t.dtype)
    flat = buffer[offset:]
    view = flat.view([t.shape[i] for i in order]).permute(np.argsort(order).tolist())
    view.copy_(t)
    assert view.shape == t.shape
    return view


def odd_strides(t: Any) -> Any:
    """Give a dimension of size 1 an arbitrary stride."""
    return torch.empty_strided(t.shape, (t.shape[-1], 999, 1), dtype=t.dtype).copy_(t)


def channels_last(t: Any) -> Any:
    return t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


# By shape: each has one layout. The last two are enough for threads.
LAYOUTS: dict[tuple[int, ...], Callable[[Any], Any]] = {
    (3, 4): torch.clone,
    (): torch.clone,
    (3, 0, 2): lambda t: t.clone().permute(2, 0, 1).permute(1, 2, 0),
    (5, 7): lambda t: laid_out(t, (1, 0)),
    (2, 3, 4): lambda t: laid_out(t, (1, 2, 0)),
    (2, 3, 4, 5): channels_last,
    (2, 3, 4, 5, 2): channels_last,
    (4, 1, 3, 3): channels_last,
    (6, 1, 4): odd_strides,
    (3, 5): lambda t: laid_out(t, (0, 1), offset=3),
    (5, 3): lambda t: laid_out(t, (1, 0), offset=1),
    (203, 211): lambda t: laid_out(t, (1, 0)),
    (16, 16, 13, 13): channels_last,
}


def lay_out(t: Any) -> Any:
    return LAYOUTS[tuple(t.shape)](t)


GRADIENTS: dict[str, Callable[[Any, Any], Any]] = {
    "of the parameter's layout": lambda g, p: torch.empty_like(p).copy_(g).detach(),
    "contiguous": lambda g, _: g.contiguous(),
    "reversed": lambda g, _: laid_out(g, tuple(reversed(range(g.dim())))),
    "with gaps": lambda g, _: torch.stack([g * 0 + 7, g], dim=-1)[..., 1],
    "at an offset": lambda g, _: laid_out(g, tuple(range(g.dim())), offset=5),
    # Memory holds the negated values. A flag of the tensor (the negative bit) says so.
    "imaginary part of a conjugate": lambda g, _: torch.complex(g * 0, -g).conj().imag,
}


@pytest.mark.parametrize("place", GRADIENTS.values(), ids=GRADIENTS)
def test_layout_changes_no_bit(place: Callable[[Any, Any], Any]) -> None:
    training = Training(AdamW, list(LAYOUTS), lay_out=lay_out, place=place, **EXTRAS)
    before = [(p.data_ptr(), p.stride()) for p in training.params]
    training.run(2)
    assert [(p.data_ptr(), p.stride()) for p in training.params] == before
    training.optimizer.param_groups[0]["zero_grad_in_step"] = True
    training.step()


@pytest.mark.parametrize(
    ("dtypes", "extras"),
    [
        ("float32 float64", EXTRAS),
        ("complex64 complex128", {"ema_decay": 0.9}),
        ("bfloat16", {"moments": "packed", "low_bits": "int8"}),
        ("bfloat16", {"low_bits": "int16"}),
        ("float16", {}),
    ],
)
def test_tensors_of_torch_before_2_10(
    monkeypatch: pytest.MonkeyPatch, dtypes: str, extras: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)
    training = Training(AdamW, [(5, 7), (2, 3, 4), ()], dtypes, lay_out=lay_out, **extras)
    before = [p.data_ptr() for p in training.params]
    training.run(2)
    assert [p.data_ptr() for p in training.params] == before
    training.give(training.grads())
    with training.refused(r"\[0\] must be a CPU tensor", ValueError, spoilt=True):
        name = min(training.state[0].keys() - {"step"})
        training.state[0][name] = training.state[0][name].to("meta")
        training.optimizer.step()


def test_layouts_beside_torch() -> None:
    # torch's fused step is no reference here: it pairs elements by memory position, whatever the
    # strides.
    training = Training(AdamW, list(LAYOUTS), "float64", lay_out=lay_out, beside_torch=True)
    training.run(3)
    training.check_torch()
    for p, state in zip(params_of(training.stock), training.state, strict=True):
        for name, t in training.stock.state[p].items():
            assert state[name].stride() == t.stride(), name


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 5)])
def test_layout_changed_in_the_middle_or_by_a_checkpoint(shape: tuple[int, ...]) -> None:
    training = Training(Adam, [shape], **EXTRAS)
    training.step()
    saved = copy.deepcopy(training.optimizer.state_dict())
    (p,) = training.params
    p.data = lay_out(p.detach())
    training.run(2)
    # The state of contiguous tensors, for a parameter of another layout.
    training.optimizer.load_state_dict(saved)
    training.adopt()
    training.run(2)
    assert training.state[0]["exp_avg"].stride() == p.stride()


# -- memory owned by others -------------------------------------------------------------------


def test_one_gradient_for_two_parameters_and_one_that_is_expanded() -> None:
    g = torch.ones(3, 4)
    training = Training(Adam, [(3, 4), (3, 4), (300, 150)], place=lambda *_: next(held))
    # The gradient of a sum is one number with stride 0.
    held = iter([g, g, torch.tensor(0.25).expand(300, 150)])
    training.step([g, g, torch.full((300, 150), 0.25)])
    training = Training(Adam, [(5, 3)], zero_grad_in_step=True)
    training.params[0].grad = torch.tensor(0.25).expand(5, 3)
    training.stepped([torch.full((5, 3), 0.25)], training.optimizer.step)


def shrink(t: Any) -> None:
    storage, kept = t.untyped_storage(), t.clone()
    if storage.resizable():
        storage.resize_(0)
        storage.resize_(4 * kept.nbytes + 64)
        t.copy_(kept)


def transpose(t: Any) -> None:
    """Same object, address and shape: only the strides differ."""
    if t.dim() == 2:
        kept = t.clone()
        t.t_().copy_(kept)


MOVES: dict[str, Callable[[Any], Any]] = {
    "set_": lambda t: t.set_(t.clone()),
    "data": lambda t: setattr(t, "data", t.detach().clone()),
    "storage": shrink,
    "swap_tensors": lambda t: torch.utils.swap_tensors(t, t.clone()),
    "transposed": transpose,
}
STATE = ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema"]


# torch cannot swap tensors with other references, such as parameters with gradients.
@pytest.mark.parametrize(
    ("of", "how"),
    [
        (of, how)
        for of in ("param", "grad", *STATE)
        for how in MOVES
        if of in STATE or how != "swap_tensors"
    ],
)
def test_memory_that_moves(of: str, how: str) -> None:
    move = MOVES[how]
    training = Training(Adam, [(7, 7), (5,)], amsgrad=True, ema_decay=0.9)
    for _ in range(3):
        training.give(grads := training.grads())
        for p in training.params:
            if of == "grad":
                move(p.grad)
        training.stepped(grads, training.optimizer.step)
        # Another allocation may reuse the freed memory.
        taken = [torch.full((size,), 1.2e30) for size in (1, 1, 5, 5, 49, 49)]
        for p, state in zip(training.params, training.state, strict=True):
            if of == "param":
                move(t := p if how == "data" else p.data)
                p.data = t.data
            elif of in STATE:
                move(state[of])
        assert all((t == 1.2e30).all() for t in taken)
    training.check()


def test_data_of_parameters_exchanged_between_steps() -> None:
    training = Training(Adam, [(50,), (50,), (41_003,)])
    first, second, large = training.params
    left = []
    for _ in range(4):
        training.step()
        left.append((large.data, array(large)))
        large.data = large.data.clone()
        # Two weights swapped through their data, as some averaging code does.
        first.data, second.data = second.data, first.data
        training.adopt()
    for memory, kept in left:
        assert np.array_equal(array(memory), kept)


# -- refused calls ----------------------------------------------------------------------------


def leaf(t: Any) -> Any:
    """A leaf tensor over exactly this memory."""
    return t.detach().requires_grad_(t.is_floating_point() or t.is_complex())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "expanded": (lambda: torch.zeros(3).expand(5, 3), "gaps or overlaps"),
    "every other column": (lambda: torch.zeros(5, 6)[:, ::2], "gaps or overlaps"),
    "some columns": (lambda: torch.zeros(5, 6)[:, :3], "gaps or overlaps"),
    "windows that overlap": (lambda: torch.zeros(9).as_strided((5, 3), (1, 1)), "gaps or overlaps"),
    "on no device": (lambda: torch.zeros(5, 3, device="meta"), "CPU"),
    "integers": (lambda: torch.zeros(5, 3, dtype=torch.int16), "float32"),
    "conjugated": (lambda: torch.ones(5, dtype=torch.complex64).conj(), "not a conjugated view"),
    "negated": (lambda: torch.ones(1, dtype=torch.complex64).conj().imag, "negated view"),
    "sparse": (lambda: torch.eye(5, 3).to_sparse(), "strided CPU tensor"),
    "sparse rows": (lambda: torch.eye(5, 3).to_sparse_csr(), "strided CPU tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), ""),
}


# torch warns that its compressed sparse tensors are in beta, and quantized ones deprecated.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(("make", "rule"), REFUSED.values(), ids=REFUSED)
def test_parameter_is_refused(make: Callable[[], Any], rule: str, steps: int) -> None:
    training = Training(AdamW, [(4,), (41_003,)], zero_grad_in_step=True)
    training.run(steps)
    training.give(training.grads())
    with training.refused(rf"(?s)params\[1\].*({rule}).*Received: .+", spoilt=True):
        bad = leaf(make())
        # In the middle, so that a check of either end alone would miss it.
        training.optimizer.param_groups[0]["params"].insert(1, bad)
        bad.grad = bad.detach()
        training.optimizer.step()
    training.step()


OVERLAPPING: dict[str, Callable[[Any], list[Any]]] = {
    "the same memory": lambda b: [b[:6], b[:6]],
    "views that share an element": lambda b: [b[:4], b[3:7]],
    "one within another": lambda b: [b[:12].view(3, 4), b[5:6]],
}


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
def test_parameters_that_overlap(views: Callable[[Any], list[Any]], later: bool) -> None:
    buffer = torch.arange(16.0)
    shared = views(buffer)
    params = [leaf(v.clone() if later else v) for v in shared]
    optimizer = Adam(params)
    for p in params:
        p.grad = torch.ones_like(p)
    if later:
        optimizer.step()
        for p, memory in zip(params, shared, strict=True):
            p.data = memory
    with pytest.raises(ValueError, match=r"(?s)params\[\d\].*overlap.*Received: .+"):
        optimizer.step()
    assert buffer.tolist() == list(range(16))


def test_parameters_side_by_side_do_not_overlap() -> None:
    buffer = torch.zeros(16)
    params = [leaf(buffer[:5]), leaf(buffer[5:5].view(0)), leaf(buffer[5:16])]
    for p in params:
        p.grad = torch.ones_like(p)
    Adam(params, lr=1.0).step()
    np.testing.assert_allclose(buffer.numpy(), -1, rtol=1e-6)


OVER_THE_PARAMETER: dict[str, Callable[[Any], Any]] = {
    "is the parameter": lambda b: b[4:8],
    "has gaps that reach over it": lambda b: b.as_strided((4,), (2,)),
}


@pytest.mark.parametrize("known", [False, True], ids=["new", "where the last one lay"])
@pytest.mark.parametrize("view", OVER_THE_PARAMETER.values(), ids=OVER_THE_PARAMETER)
def test_gradient_over_the_parameter_is_not_zeroed(view: Any, known: bool) -> None:
    buffer = torch.arange(12.0)
    p = torch.nn.Parameter(buffer[4:8])
    optimizer = Adam([p], lr=0.0, zero_grad_in_step=True)
    if known:
        p.grad = buffer[:4]
        optimizer.step()
    before = buffer.tolist()
    p.grad = view(buffer)
    with pytest.raises(ValueError, match=r"(?s)overlap.*Received: .+"):
        optimizer.step()
    assert buffer.tolist() == before


def no_sparse_dimension(g: Any, *_: Any) -> Any:
    index = torch.zeros(0, 1, dtype=torch.long)
    return torch.sparse_coo_tensor(index, g[None], g.shape, check_invariants=True)


def of_a_transposed_table(g: Any, p: Any, _: Any) -> Any:
    p.data = p.data.t().contiguous().t()
    return g.to_sparse(1)


# An attribute or a state of the last parameter, and what replaces it: a function of what is there,
# the parameter, and the state of the first parameter.
SPOILT: dict[str, tuple[str, Callable[[Any, Any, Any], Any], str]] = {
    "two sparse dimensions": ("grad", lambda g, *_: g.to_sparse(), r"grads\[3\] must .*sparse"),
    "no sparse dimension": ("grad", no_sparse_dimension, r"\[3\].*sparse"),
    "rows of a transposed table": ("grad", of_a_transposed_table, r"\[3\].*contiguous"),
    "parameter of another dtype": ("data", lambda t, *_: t.double(), r"\[3\].*dtype"),
    "parameter of another shape": ("data", lambda t, *_: t[:3], r"\[3\].*shape"),
    "moment of another dtype": ("exp_avg_sq", lambda t, *_: t.double(), "dtype"),
    "moment of another shape": ("exp_avg", lambda t, *_: t[:3], r"exp_avg\[3\] .*shape"),
    "moment elsewhere": ("exp_avg_sq", lambda t, *_: t.to("meta"), "CPU"),
    "moment that is the parameter": ("exp_avg", lambda _, p, __: p.data, "overlap"),
    "moment of another parameter": ("exp_avg", lambda _, __, first: first["exp_avg"], "overlap"),
    "no moment": ("exp_avg_sq", lambda *_: None, "exp_avg_sq"),
    "count NaN": ("step", lambda *_: torch.tensor(math.nan), "step"),
    "count of another parameter": ("step", lambda _, __, first: first["step"], "overlap"),
    "count in the parameter": ("step", lambda _, p, __: p.detach().view(-1)[0], "overlap"),
}


@pytest.mark.parametrize(("name", "make", "rule"), SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("rows", [5, 8_201])
def test_error_leaves_everything_as_it_was(
    name: str, make: Callable[[Any, Any, Any], Any], rule: str, rows: int
) -> None:
    shapes, groups = [(rows, 5)] * 2, [{"zero_grad_in_step": True}] * 2
    training = Training(AdamW, shapes, groups=groups, ema_decay=0.9)
    training.run(2)
    training.give(training.grads())
    p, state = training.params[-1], training.state[-1]
    errors = (ValueError, TypeError, KeyError, RuntimeError)
    with training.refused(rf"(?s){rule}", errors, spoilt=True):
        if name in state:
            state[name] = make(state[name], p, training.state[0])
        else:
            setattr(p, name, make(getattr(p, name), p, None))
        training.optimizer.step()
    training.step()


def put(name: str, make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda _, state: state.update({name: make(state[name])})


@pytest.mark.parametrize(
    ("dtype", "spoil", "rule"),
    [
        (
            "complex64",
            lambda p, _: setattr(p, "data", p.data.conj()),
            r"params\[0\] must .*conjugated",
        ),
        ("complex64", put("exp_avg", lambda _: torch.ones(3, 2)), r"exp_avg\[0\] must .*dtype"),
        ("complex64", lambda p, _: setattr(p, "grad", (torch.ones(3) * 1j).to_sparse()), "complex"),
        ("bfloat16", put("low_bits", torch.Tensor.byte), "low_bits must .*int8"),
        ("bfloat16", put("low_bits", torch.Tensor.int), "low_bits must .*int8"),
    ],
    ids=["conjugated", "real moment", "sparse", "unsigned low bits", "low bits of 32 bits"],
)
def test_what_does_not_fit_a_complex_or_16_bit_parameter_is_refused(
    dtype: str, spoil: Callable[[Any, Any], Any], rule: str
) -> None:
    extras: dict[str, Any] = {"low_bits": "int8"} if dtype == "bfloat16" else {}
    training = Training(Adam, [(3,)], dtype, **extras)
    training.step()
    with training.refused(rf"(?s){rule}.*Received: .+", (ValueError, TypeError), spoilt=True):
        spoil(training.params[0], training.state[0])
        training.optimizer.step()


@pytest.mark.parametrize(
    ("of", "size", "rule"),
    [
        ("param", 400, "not be larger than its storage"),
        *((of, 0, ".*CPU tensor") for of in ("param", "grad", "step")),
    ],
)
def test_tensor_larger_than_its_storage_is_refused(of: str, size: int, rule: str) -> None:
    # torch allows shrinking a storage under its tensors. FullyShardedDataParallel frees parameters
    # like this.
    p, q = leaves([(40_000,)] * 2)
    optimizer = Adam([p, q])
    p.grad, q.grad = torch.ones(40_000), torch.ones(40_000)
    optimizer.step()
    before = array(p)
    shrunk = {"param": q, "grad": q.grad, "step": optimizer.state[q]["step"]}[of]
    shrunk.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=rf"\[1\] must {rule}"):
        optimizer.step()
    assert_same_bits(array(p), before)


# -- gradients of other dtypes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "of_gradient"),
    [("float32", "float16"), ("float32", "bfloat16"), ("bfloat16 float16", "float32")],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "ema_decay": 0.5, "weight_decay": 0.1, "zero_grad_in_step": True},
        {"max_grad_norm": 0.5},
        {"moments": "packed"},
    ],
    ids=str,
)
def test_gradients_of_another_dtype(dtypes: str, of_gradient: str, options: dict[str, Any]) -> None:
    # torch accumulates such gradients where a parameter requests it.
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("gradients have the dtype of their parameter before torch 2.10")
    training = Training(AdamW, [(3, 67), (), (2500,), (33_001,)], dtypes, **options)
    training.place = lambda g, _: g.t().contiguous().t() if g.dim() == 2 else g
    for p in training.params:
        p.grad_dtype = getattr(torch, of_gradient)
    for _ in range(2):
        training.step([drawn(training.rng, tuple(p.shape), of_gradient) for p in training.params])
