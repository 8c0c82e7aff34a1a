# SPDX-License-Identifier: MIT
"""`fusedadam.torch` in the tensors' own memory: layouts, offsets, refusals, version counters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fresh_python import output_of
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, values
from hypothesis import given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import (
    KINDS,
    STOCK,
    Shapes,
    Twins,
    array,
    arrays,
    assert_everything_same_bits,
    everything,
    grads_like,
    leaves,
    set_grads,
    stepped,
)

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
    n = t.shape[-1]
    view = torch.empty_strided(t.shape, (n, 999, 1), dtype=t.dtype)
    return view.copy_(t)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "contiguous": ((3, 4), torch.clone),
    "a number": ((), torch.clone),
    "empty": ((3, 0, 2), lambda t: t.clone().permute(2, 0, 1).permute(1, 2, 0)),
    "transposed": ((5, 7), lambda t: laid_out(t, (1, 0))),
    "permuted": ((2, 3, 4), lambda t: laid_out(t, (1, 2, 0))),
    "channels_last": ((2, 3, 4, 5), lambda t: t.to(memory_format=torch.channels_last)),
    "channels_last_3d": (
        (2, 3, 4, 5, 2),
        lambda t: t.to(memory_format=torch.channels_last_3d),
    ),
    "channels_last with one channel": (
        (4, 1, 3, 3),
        lambda t: t.to(memory_format=torch.channels_last),
    ),
    "a size of 1 with an odd stride": ((6, 1, 4), odd_strides),
    "at an offset": ((3, 5), lambda t: laid_out(t, (0, 1), offset=3)),
    "transposed at an offset": ((5, 3), lambda t: laid_out(t, (1, 0), offset=1)),
    "transposed, enough for threads": ((203, 211), lambda t: laid_out(t, (1, 0))),
    "channels_last, enough for threads": (
        (16, 16, 13, 13),
        lambda t: t.to(memory_format=torch.channels_last),
    ),
}

GRADIENTS: dict[str, Callable[[Any, Any], Any]] = {
    "of the parameter's layout": lambda g, p: torch.empty_like(p).copy_(g),
    "contiguous": lambda g, _: g.contiguous(),
    "reversed": lambda g, _: laid_out(g, tuple(reversed(range(g.dim())))),
    "with gaps": lambda g, _: torch.stack([g * 0 + 7, g], dim=-1)[..., 1],
    "at an offset": lambda g, _: laid_out(g, tuple(range(g.dim())), offset=5),
    # Memory holds the negated values. A flag of the tensor (the negative bit) says so.
    "imaginary part of a conjugate": lambda g, _: torch.complex(g * 0, -g).conj().imag,
}


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout_changes_no_bit(
    shape: tuple[int, ...], layout: Callable[[Any], Any], gradient: Callable[[Any, Any], Any]
) -> None:
    (plain,) = leaves([shape])
    p = torch.nn.Parameter(layout(plain.detach()))
    where, strides = p.data_ptr(), p.stride()
    optimizer, reference = AdamW([p], **EXTRAS), AdamW([plain], **EXTRAS)
    rng = np.random.default_rng(4)
    for _ in range(3):
        (g,) = grads_like(rng, [plain])
        p.grad = gradient(g, p.detach())
        kept = p.grad
        optimizer.step()
        stepped(reference, [g])
        assert p.grad is kept
        assert_same_bits(array(p.grad), array(g))
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert (p.data_ptr(), p.stride()) == (where, strides)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts_beside_torch(dtype: str) -> None:
    # torch's fused step is no reference here: it pairs elements by memory position, whatever the
    # strides.
    makers = [layout for _, layout in LAYOUTS.values()]

    def make(shapes: Shapes, dtype: str, *, seed: int) -> list[Any]:
        plain = leaves(shapes, dtype, seed=seed)
        return [
            torch.nn.Parameter(layout(p.detach())) for p, layout in zip(plain, makers, strict=True)
        ]

    both = Twins(AdamW, dtype=dtype, make=make, shapes=[shape for shape, _ in LAYOUTS.values()])
    both.run(10)
    for ours, theirs in zip(both.ours, both.theirs, strict=True):
        for name, t in both.stock.state[theirs].items():
            assert both.optimizer.state[ours][name].stride() == t.stride(), name


@settings(max_examples=60)
@given(st.data())
def test_any_dense_layout(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=5))
    orders = st.permutations(range(len(sizes))).map(tuple)
    (plain,) = leaves([tuple(sizes)], seed=data.draw(st.integers(0, 9)))
    view = laid_out(plain.detach(), data.draw(orders), offset=data.draw(st.integers(0, 17)))
    p = torch.nn.Parameter(view)
    kind = data.draw(st.sampled_from(KINDS))
    optimizer, reference = kind([p], zero_grad_in_step=True), kind([plain])
    for order in data.draw(st.lists(orders, min_size=1, max_size=3)):
        (g,) = grads_like(np.random.default_rng(1), [plain])
        p.grad = laid_out(g, order, offset=data.draw(st.integers(0, 3)))
        optimizer.step()
        stepped(reference, [g])
        assert not p.grad.any()
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_expanded_gradient() -> None:
    # The gradient of a sum is one number with stride 0.
    p, plain = leaves([(300, 150)]) + leaves([(300, 150)])
    optimizer, reference = Adam([p]), Adam([plain])
    p.grad = torch.tensor(0.25).expand(300, 150)
    optimizer.step()
    stepped(reference, [torch.full((300, 150), 0.25)])
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_gradient_that_autograd_negates_lazily() -> None:
    # The gradient of the imaginary part of a conjugated number.
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Adam([p], lr=0.1)
    z = torch.complex(torch.tensor([1.0]), p)
    (z.conj() * torch.tensor([1j])).real.sum().backward()
    assert p.grad.item() == 1.0
    optimizer.step()
    np.testing.assert_allclose(array(p), 1.9, rtol=1e-6)


def test_expanded_gradient_is_zeroed_or_refused_before_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = Adam([p], zero_grad_in_step=True)
    p.grad = torch.tensor(0.25).expand(5, 3)
    try:
        optimizer.step()
    except (ValueError, RuntimeError):
        assert (p == 1).all()
    else:
        assert (p != 1).all()
        assert not p.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_in_channels_last(kind: Any) -> None:
    def model_of() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
        ).to(torch.float64, memory_format=torch.channels_last)

    ours, theirs = model_of(), model_of()
    optimizer, stock = kind(ours.parameters(), lr=0.01), STOCK[kind](theirs.parameters(), lr=0.01)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    for model, of in ((ours, optimizer), (theirs, stock)):
        for _ in range(10):
            of.zero_grad()
            (model(x) ** 2).mean().backward()
            of.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Ten steps of a smooth loss amplify roundings of 2**-53 only slightly.
        np.testing.assert_allclose(array(p), array(q), rtol=1e-10, atol=1e-12)
        assert p.stride() == q.stride()


@pytest.mark.parametrize("name", ["transposed", "channels_last", "permuted"])
def test_state_of_another_layout(name: str) -> None:
    shape, layout = LAYOUTS[name]
    (plain,) = leaves([shape])
    reference = Adam([plain], **EXTRAS)
    rng = np.random.default_rng(4)
    stepped(reference, grads_like(rng, [plain]))
    # Load a checkpoint of contiguous tensors for a parameter of another layout.
    p = torch.nn.Parameter(layout(plain.detach()))
    optimizer = Adam([p], **EXTRAS)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    where = p.data_ptr()
    for _ in range(3):
        grads = grads_like(rng, [plain])
        stepped(optimizer, grads)
        stepped(reference, grads)
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert p.data_ptr() == where


@pytest.mark.parametrize("name", ["transposed", "channels_last"])
def test_memory_format_changed_in_the_middle(name: str) -> None:
    shape, layout = LAYOUTS[name]
    (p,), (plain,) = leaves([shape]), leaves([shape])
    optimizer, reference = AdamW([p], **EXTRAS), AdamW([plain], **EXTRAS)
    rng = np.random.default_rng(4)
    for i in range(4):
        if i == 2:
            p.data = layout(p.detach())
        grads = grads_like(rng, [plain])
        stepped(optimizer, grads)
        stepped(reference, grads)
    assert_everything_same_bits(everything(optimizer), everything(reference))


# -- memory owned by others -------------------------------------------------------------------


def test_views_into_buckets() -> None:
    # DistributedDataParallel lays out gradients like this, and ZeroRedundancyOptimizer parameters.
    shapes = [(7,), (3, 5), (), (41_000,), (0, 3)]
    plain = leaves(shapes)
    gap = 3
    size = sum(p.numel() + gap for p in plain)
    bucket, grads_bucket = torch.full((size,), 9.0), torch.full((size,), 9.0)
    params, grads, start = [], [], 0
    for p in plain:
        place = slice(start, start + p.numel())
        view = bucket[place].view(p.shape)
        view.copy_(p.detach())
        params.append(torch.nn.Parameter(view))
        grads.append(grads_bucket[place].view(p.shape))
        start += p.numel() + gap
    optimizer, reference = Adam(params, zero_grad_in_step=True), Adam(plain)
    rng = np.random.default_rng(2)
    for _ in range(3):
        drawn = grads_like(rng, plain)
        for p, view, g in zip(params, grads, drawn, strict=True):
            p.grad = view.copy_(g)
        optimizer.step()
        stepped(reference, drawn)
    assert_everything_same_bits(everything(optimizer), everything(reference))
    for buffer, inside in ((bucket, params), (grads_bucket, grads)):
        kept = torch.ones(size, dtype=torch.bool)
        for view in inside:
            first = view.detach().storage_offset()
            kept[first : first + view.numel()] = False
        assert (buffer[kept] == 9).all()
        assert int(kept.sum()) == gap * len(shapes)
    assert not any(g.any() for g in grads)


def test_one_gradient_for_two_parameters() -> None:
    params, plain = leaves([(3, 4), (3, 4)]), leaves([(3, 4), (3, 4)])
    g = torch.ones(3, 4)
    optimizer, reference = Adam(params), Adam(plain)
    params[0].grad = params[1].grad = g
    optimizer.step()
    stepped(reference, [g, g])
    assert_everything_same_bits(everything(optimizer), everything(reference))


def by_a_queue(t: Any) -> None:
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(t)  # moves the storage of `t` into shared memory
    queue.get()


def shrink(t: Any) -> None:
    storage, kept = t.untyped_storage(), t.clone()
    if storage.resizable():
        storage.resize_(0)
        storage.resize_(4 * kept.nbytes + 64)
        t.copy_(kept)


def resize(t: Any) -> None:
    if t.untyped_storage().resizable():
        shape = t.shape
        t.resize_(5000).resize_(shape)


MOVES: dict[str, Callable[[Any], Any]] = {
    "share_memory_": lambda t: t.share_memory_(),
    "resize_": resize,
    "set_": lambda t: t.set_(t.clone()),
    "data": lambda t: setattr(t, "data", t.detach().clone()),
    "storage": shrink,
    "a queue": by_a_queue,
    "swap_tensors": lambda t: torch.utils.swap_tensors(t, t.clone()),
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
    options: dict[str, Any] = {"amsgrad": True, "ema_decay": 0.9}
    params, plain = leaves([(7, 3), (5,)]), leaves([(7, 3), (5,)])
    optimizer, reference = Adam(params, **options), Adam(plain, **options)
    rng = np.random.default_rng(2)
    for _ in range(4):
        grads = grads_like(rng, plain)
        set_grads(params, grads)
        if of == "grad":
            for p in params:
                move(p.grad)
        optimizer.step()
        stepped(reference, grads)
        # Another allocation may reuse the freed memory.
        taken = [torch.full((size,), 1.2e30) for size in (1, 1, 5, 5, 21, 21)]
        for p in params:
            if of == "param":
                move(p if how == "data" else p.detach())
            elif of in optimizer.state[p]:
                move(optimizer.state[p][of])
        assert all((t == 1.2e30).all() for t in taken)
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_parameter_swapped_for_another_between_steps() -> None:
    (p,), (plain,) = leaves([(7, 3)]), leaves([(7, 3)])
    optimizer, reference = Adam([p]), Adam([plain])
    rng = np.random.default_rng(2)
    for _ in range(3):
        grads = grads_like(rng, [plain])
        stepped(optimizer, grads)
        stepped(reference, grads)
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_tensor_larger_than_its_storage_is_refused() -> None:
    # torch allows shrinking a storage under its tensors, and would itself write out of bounds.
    (p,) = leaves([(4000,)])
    optimizer = Adam([p])
    stepped(optimizer, [torch.ones(4000)])
    p.untyped_storage().resize_(400)
    with pytest.raises(ValueError, match=r"params\[0\] must not be larger than its storage"):
        stepped(optimizer, [torch.ones(4000)])


@pytest.mark.parametrize("size", [7, 41_003])
def test_memory_swapped_between_steps(size: int) -> None:
    (p,), (plain,) = leaves([(size,)]), leaves([(size,)])
    optimizer, reference = Adam([p]), Adam([plain])
    rng = np.random.default_rng(2)
    old = []
    for _ in range(4):
        grads = grads_like(rng, [plain])
        stepped(optimizer, grads)
        stepped(reference, grads)
        old.append((p.data, array(p)))
        p.data = p.data.clone()
    assert_everything_same_bits(everything(optimizer), everything(reference))
    for memory, kept in old:
        assert_same_bits(memory.numpy(), kept)


def test_square_tensors_transposed_in_place() -> None:
    # Same objects, addresses and shapes: only the strides differ.
    p, plain = leaves([(5, 5)]) + leaves([(5, 5)])
    optimizer, reference = Adam([p]), Adam([plain])
    rng = np.random.default_rng(2)
    for turn in (None, "grad", "param", "exp_avg"):
        (g,) = grads_like(rng, [plain])
        p.grad = g.clone()
        tensor = {"grad": p.grad, "param": p.data}.get(turn or "", optimizer.state[p].get(turn))
        if tensor is not None:
            kept = tensor.clone()
            tensor.t_().copy_(kept)
        if turn == "param":
            p.data = tensor
        optimizer.step()
        stepped(reference, [g])
        assert_everything_same_bits(everything(optimizer), everything(reference), str(turn))


def test_memory_that_moves_back_and_forth() -> None:
    # Swap two weights through their data, as some averaging code does.
    params, plain = leaves([(5,), (5,)]), leaves([(5,), (5,)])
    optimizer, reference = Adam(params), Adam(plain)
    rng = np.random.default_rng(2)
    for _ in range(5):
        params[0].data, params[1].data = params[1].data, params[0].data
        with torch.no_grad():
            first = plain[0].clone()
            plain[0].copy_(plain[1])
            plain[1].copy_(first)
        grads = grads_like(rng, plain)
        stepped(optimizer, grads)
        stepped(reference, grads)
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_gradients_swapped_between_steps() -> None:
    (p,), (plain,) = leaves([(50,)]), leaves([(50,)])
    optimizer, reference = Adam([p]), Adam([plain])
    buffers = [torch.empty(50), torch.empty(50)]
    rng = np.random.default_rng(2)
    for i in range(6):
        (g,) = grads_like(rng, [plain])
        p.grad = buffers[i % 2].copy_(g)
        optimizer.step()
        stepped(reference, [g])
    assert_everything_same_bits(everything(optimizer), everything(reference))


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
    "conjugated": (
        lambda: torch.zeros(5, 3, dtype=torch.complex64).conj(),
        "not a conjugated view",
    ),
    "sparse": (lambda: torch.eye(5, 3).to_sparse(), "strided CPU tensor"),
    "sparse rows": (lambda: torch.eye(5, 3).to_sparse_csr(), "strided CPU tensor"),
}


# torch warns that its compressed sparse tensors are in beta.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("after", ["first", "later"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "rule"), REFUSED.values(), ids=REFUSED)
def test_parameter_is_refused(make: Callable[[], Any], rule: str, kind: Any, after: str) -> None:
    good = leaves([(4,), (41_003,)])
    optimizer = kind(good, zero_grad_in_step=True)
    if after == "later":
        stepped(optimizer, [torch.ones_like(p) for p in good])
    before = everything(optimizer)
    bad = leaf(make())
    # In the middle, so that a check of either end alone would miss it.
    optimizer.param_groups[0]["params"].insert(1, bad)
    set_grads([*good, bad], [*(torch.ones_like(p) for p in good), bad.detach()])
    with pytest.raises((ValueError, TypeError), match=rf"(?s)params\[1\].*({rule}).*Received: .+"):
        optimizer.step()
    assert all((p.grad == 1).all() for p in good)
    optimizer.param_groups[0]["params"].pop(1)
    optimizer.state.pop(bad, None)
    assert_all_same_bits(arrays(good), [s["param"] for s in before])
    stepped(optimizer, [torch.ones_like(p) for p in good])
    twin = kind(leaves([(4,), (41_003,)]))
    for _ in range(1 if after == "first" else 2):
        stepped(twin, [torch.ones_like(p) for p in good])
    assert_everything_same_bits(everything(optimizer), everything(twin))


# torch's quantized tensors are deprecated.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_parameter_is_refused() -> None:
    q = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    good = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([good, q])
    set_grads([good, q], [torch.ones(3), q])
    with pytest.raises((ValueError, TypeError), match=r"(?s)params\[1\].*Received: .+"):
        optimizer.step()
    assert good.tolist() == [1.0, 1.0, 1.0]


OVERLAPPING: dict[str, Callable[[Any], list[Any]]] = {
    "the same memory": lambda b: [b[:6], b[:6]],
    "views that share an element": lambda b: [b[:4], b[3:7]],
    "one within another": lambda b: [b[:12].view(3, 4), b[5:6]],
    "a tensor and its transpose": lambda b: [b[:12].view(3, 4), b[:12].view(3, 4).t()],
}


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
def test_parameters_that_overlap(views: Callable[[Any], list[Any]], later: bool) -> None:
    buffer = torch.arange(16.0)
    params = [leaf(v) for v in views(buffer)]
    optimizer = Adam(params)
    if later:
        shared = [p.data for p in params]
        for p in params:
            p.data = p.data.clone()
        stepped(optimizer, [torch.ones_like(p) for p in params])
        for p, memory in zip(params, shared, strict=True):
            p.data = memory
    set_grads(params, [torch.ones_like(p) for p in params])
    with pytest.raises(ValueError, match=r"(?s)params\[\d\].*overlap.*Received: .+"):
        optimizer.step()
    assert buffer.tolist() == list(range(16))


def test_parameters_side_by_side_do_not_overlap() -> None:
    buffer = torch.zeros(16)
    params = [leaf(buffer[:5]), leaf(buffer[5:5].view(0)), leaf(buffer[5:16])]
    optimizer = Adam(params, lr=1.0)
    stepped(optimizer, [torch.ones_like(p) for p in params])
    np.testing.assert_allclose(buffer.numpy(), -1, rtol=1e-6)


def test_gradient_that_is_the_parameter_is_not_zeroed() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Adam([p], lr=0.1, zero_grad_in_step=True)
    p.grad = p.data
    with pytest.raises(ValueError, match=r"(?s)overlap.*Received: .+"):
        optimizer.step()
    assert p.tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("known", [False, True], ids=["new", "where the last one lay"])
def test_gradient_with_gaps_that_reach_over_the_parameter_is_not_zeroed(known: bool) -> None:
    buffer = torch.arange(12.0)
    p = torch.nn.Parameter(buffer[4:8])
    optimizer = Adam([p], lr=0.0, zero_grad_in_step=True)
    if known:
        p.grad = buffer[:4]
        optimizer.step()
    before = buffer.tolist()
    p.grad = buffer.as_strided((4,), (2,))
    with pytest.raises(ValueError, match=r"(?s)overlap.*Received: .+"):
        optimizer.step()
    assert buffer.tolist() == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda p: p.data.double(), "dtype"),
        (lambda p: p.data[:3].clone(), "shape"),
    ],
    ids=["float64", "shorter"],
)
def test_memory_swapped_for_what_does_not_fit(change: Callable[[Any], Any], word: str) -> None:
    p, other = leaves([(5,), (4,)])
    optimizer = Adam([other, p])
    stepped(optimizer, [torch.ones(4), torch.ones(5)])
    before = array(other)
    p.grad = None
    p.data = change(p)
    p.grad = torch.ones_like(p)
    other.grad = torch.ones(4)
    with pytest.raises((ValueError, TypeError), match=rf"(?s)\[1\].*({word}).*Received: .+"):
        optimizer.step()
    assert_same_bits(array(other), before)


def test_storage_that_was_freed() -> None:
    # FullyShardedDataParallel frees parameters like this. A crash must not end the other tests.
    code = """
        import torch
        from fusedadam.torch import Adam

        for of in ("param", "grad", "exp_avg", "exp_avg_sq", "step"):
            p, q = (torch.nn.Parameter(torch.ones(100_000)) for _ in "pq")
            optimizer = Adam([p, q])
            p.grad, q.grad = torch.ones(100_000), torch.ones(100_000)
            optimizer.step()
            kept = p.detach().clone()
            tensor = {"param": q, "grad": q.grad}.get(of, optimizer.state[q].get(of))
            storage = tensor.untyped_storage()
            if not storage.resizable():
                continue
            storage.resize_(0)
            try:
                optimizer.step()
                print(of, "was not noticed", flush=True)
            except (ValueError, RuntimeError) as e:
                if "[1]" not in str(e) or not torch.equal(p, kept):
                    print(of, str(e), torch.equal(p, kept), flush=True)
    """
    assert output_of(code) == ""


# -- version counters and shared memory -------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [*KINDS, *STOCK.values()], ids=lambda k: f"{k.__module__}.{k.__name__}"
)
def test_step_between_forward_and_backward_is_noticed(kind: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    optimizer = kind(model.parameters())
    stale = model(torch.ones(2, 3)).sum()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_every_step_counts_as_a_change() -> None:
    params = leaves([(3,), (4,)])
    optimizer = Adam(params)
    for _ in range(3):
        versions = [p._version for p in params]
        stepped(optimizer, [torch.ones(3), None])
        assert params[0]._version > versions[0]
        assert params[1]._version == versions[1]


def test_views_and_arrays_of_a_parameter_see_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(3, 4))
    view, shared = p.detach()[1:], p.detach().numpy()
    optimizer = Adam([p], lr=0.5)
    stepped(optimizer, [torch.ones(3, 4)])
    expected: Array = np.full((3, 4), 0.5, "float32")
    np.testing.assert_allclose(shared, expected, rtol=1e-6)
    np.testing.assert_allclose(view.numpy(), expected[1:], rtol=1e-6)


def test_step_of_what_values_drew() -> None:
    # A parameter over NumPy's memory is stepped in place.
    a = values(np.random.default_rng(0), (4, 5), "float32")
    kept = a.copy()
    p = leaf(torch.from_numpy(a))
    (plain,) = [torch.nn.Parameter(torch.tensor(kept))]
    optimizer, reference = Adam([p]), Adam([plain])
    stepped(optimizer, [torch.ones(4, 5)])
    stepped(reference, [torch.ones(4, 5)])
    assert_same_bits(a, array(plain))


# ---- 16-bit gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "ema_decay": 0.5, "weight_decay": 0.1}, {"max_grad_norm": 0.5}],
    ids=str,
)
def test_gradients_of_16_bits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    # torch accumulates 16-bit gradients where a parameter requests it.
    shapes = [(3, 67), (), (2500,), (40_001,)]
    ours, theirs = leaves(shapes), leaves(shapes)
    for _ in range(3):
        for param, twin in zip(ours, theirs, strict=True):
            param.grad_dtype = dtype
            param.grad = torch.randn(param.shape).to(dtype)
            twin.grad = param.grad.float()
    optimizers = [AdamW(params, **options) for params in (ours, theirs)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        for param, twin in zip(ours, theirs, strict=True):
            assert_same_bits(array(param), array(twin))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bits_in_another_layout_and_zeroed(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.ones(4, 6))
    twin = torch.nn.Parameter(torch.ones(4, 6))
    p.grad_dtype = dtype
    p.grad = torch.randn(6, 4).to(dtype).T
    twin.grad = p.grad.float().contiguous()
    for param in (p, twin):
        Adam([param], zero_grad_in_step=True).step()
        assert not param.grad.any()
    assert_same_bits(array(p), array(twin))
