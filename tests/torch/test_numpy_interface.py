# SPDX-License-Identifier: MIT
"""torch tensors in `fusedadam.Adam`: losses, parameters and gradients."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
import storage_oracle as storage
from fresh_python import output_of
from fusedadam import Adam, adam_step, global_norm
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, running, values

torch: Any = pytest.importorskip("torch")

from torch_helpers import array, leaves, tensor
from training import Training

SHAPES = [(5, 3), (3,), ()]


def loss_of(params: list[Any]) -> Any:
    return sum(((p * p - 0.5) ** 2).sum() for p in params)


def numpy_of(tensors: Any) -> list[Array]:
    return [t.detach().numpy() for t in tensors]


# -- a scalar tensor as the loss --------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_steps_of_a_tensor_loss(dtype: str) -> None:
    limits: dict[str, Any] = {"clipnorm": 0.1, "clipvalue": 0.05}
    params = leaves(SHAPES, dtype)
    addresses = [p.data_ptr() for p in params]
    reference = oracle.OracleAdam([p.copy() for p in numpy_of(params)], lr=0.05, **limits)
    optimizer = Adam(lr=0.05, **limits)
    for _ in range(5):
        grads = [g.numpy() for g in torch.autograd.grad(loss_of(params), params)]
        clipped = optimizer.get_gradients(loss_of(params), params)
        assert_all_same_bits(clipped, oracle.clip(grads, **limits))
        reference.step(grads)
        updates = optimizer.get_updates(loss_of(params), params)
        assert all(u is p for u, p in zip(updates[3::3], params, strict=True))
    assert_all_same_bits(numpy_of(params), reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())
    assert [p.data_ptr() for p in params] == addresses
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in params)
    reference.step([g.numpy() for g in torch.autograd.grad(loss_of(params), params)])
    pickle.loads(pickle.dumps(optimizer)).get_updates(loss_of(params), params)
    assert_all_same_bits(numpy_of(params), reference.params)


@pytest.mark.parametrize("size", [7, 40_000])
def test_expanded_gradients_of_mixed_dtypes(size: int) -> None:
    # The gradient of a sum is one number with stride 0.
    params = [torch.ones(size, dtype=d, requires_grad=True) for d in (torch.float32, torch.float64)]
    reference = oracle.OracleAdam([p.copy() for p in numpy_of(params)])
    reference.step([np.full(size, 2, "float32"), np.full(size, 3.0)])
    Adam().get_updates((2 * params[0]).sum() + (3 * params[1]).sum(), params)
    assert_all_same_bits(numpy_of(params), reference.params)


def test_stale_graph_is_noticed() -> None:
    # As for any in-place change, a graph that saved the old values must not use the new ones.
    p = torch.ones(3, requires_grad=True)
    stale = (p**2).sum()
    Adam().get_updates((p**2).sum(), [p])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_constraint_of_a_tensor() -> None:
    p = torch.tensor([0.4999, -3.0], requires_grad=True)
    p.constraint = lambda q: q.clamp(-0.5, 0.5)
    Adam(lr=0.1).get_updates((-p).sum(), [p])
    assert p.tolist() == [0.5, -0.5]
    assert p.is_leaf
    assert p.requires_grad


def test_tensors_that_record_nothing() -> None:
    with torch.inference_mode():
        p, g = torch.ones(3), torch.full((3,), 0.5)
        Adam().apply_gradients([(g, p)])
    reference = oracle.OracleAdam([np.ones(3, "float32")])
    reference.step([np.full(3, 0.5, "float32")])
    assert_same_bits(p.numpy(), reference.params[0])


MOVES: dict[str, Callable[[Any], Any]] = {
    "data": lambda p: setattr(p, "data", p.data.clone()),
    "swap_tensors": lambda p: torch.utils.swap_tensors(p, p.clone()),
}


@pytest.mark.parametrize("seen", ["stepped", "built", "loaded"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_swap_of_tensors_whose_memory_has_moved(
    move: Callable[[Any], Any], seen: str, tmp_path: Path
) -> None:
    # The tensor is not the first parameter: state belongs to positions in the list.
    adam, params = Adam(use_ema=True, ema_momentum=0.5, lr=1.0), [np.zeros(3), torch.zeros(5)]
    for _ in range(2):
        adam.apply_gradients([(np.ones(3), params[0]), (torch.ones(5), params[1])])
    if seen == "built":
        adam.build(params)
    if seen == "loaded":
        adam.save(tmp_path / "state")
        adam.load(tmp_path / "state", params)
    before, averages = params[1].clone(), adam.ema[1].copy()
    move(params[1])
    for ours, theirs in ((averages, before), (before, averages)):
        adam.swap_ema()
        assert_same_bits(np.asarray(params[1]), np.asarray(ours))
        assert_same_bits(adam.ema[1], np.asarray(theirs))
    params[1].data = torch.zeros(4)
    with pytest.raises(ValueError, match=r"params\[1\] must .*Received: .+"):
        adam.swap_ema()
    params[1].data = before
    adam.apply_gradients([(np.ones(3), params[0]), (torch.ones(5), params[1])])


# -- tensors mixed with arrays ----------------------------------------------------------------


def as_tensors(arrays: list[Array]) -> list[Any]:
    return [torch.from_numpy(a) for a in arrays]


def graph_tensors(arrays: list[Array]) -> list[Any]:
    """Gradients that have a graph of their own, as `create_graph=True` leaves them."""
    return [t.requires_grad_() * 1 for t in as_tensors(arrays)]


def expanded_tensors(arrays: list[Array]) -> list[Any]:
    return [t[..., None].expand(*t.shape, 2)[..., 1] for t in as_tensors(arrays)]


CALLS: dict[str, Callable[[Adam, Any, Any], Any]] = {
    "build": lambda o, params, _: o.build(params),
    "get_updates": lambda o, params, grads: o.get_updates(grads, params),
    "get_gradients": lambda o, params, grads: o.get_gradients(grads, params),
    "apply_gradients": lambda o, params, grads: o.apply_gradients(
        list(zip(grads, params, strict=True))
    ),
}
STEPS = ["get_updates", "get_gradients", "apply_gradients"]


@pytest.mark.parametrize("of_params", [list, as_tensors])
@pytest.mark.parametrize("of_grads", [list, as_tensors, graph_tensors, expanded_tensors])
@pytest.mark.parametrize("method", ["get_updates", "step", "apply_gradients"])
def test_gradients_as_a_sequence(
    of_params: Callable[[list[Array]], list[Any]],
    of_grads: Callable[[list[Array]], list[Any]],
    method: str,
) -> None:
    training = Training([(s, d) for s in SHAPES for d in FLOATS], clipnorm=1.0)
    grads = training.grads()
    training.params = of_params(training.params)
    kept = [g.copy() for g in grads]
    given = of_grads(grads)
    clipped = training.optimizer.get_gradients(given, training.params)
    assert_all_same_bits(clipped, oracle.clip(kept, clipnorm=1.0))
    training.call_by(method, given, as_seen=grads)
    training.check()
    assert_all_same_bits(grads, kept)


def test_adam_step_with_tensor_gradients(rng: np.random.Generator) -> None:
    p, g, m = (values(rng, (3, 4), "float32") for _ in range(3))
    v = m * m
    expected = oracle.adam_step(p, g, m, v, step=2)
    adam_step([p], [torch.from_numpy(g)], [m], [v], step=2)
    assert_all_same_bits([p, m, v], expected)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int64"])
def test_gradient_of_another_dtype_is_cast(dtype: str) -> None:
    params = [torch.ones(3, 2).T for _ in range(2)]  # also a layout other than C order
    grad = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -5.0]]).to(getattr(torch, dtype))
    for param, given in zip(params, (grad, grad.float()), strict=True):
        Adam().apply_gradients([(given, param)])
    assert torch.equal(*params)
    assert not torch.equal(params[0], torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensors", "arrays"])
def test_gradient_of_16_bits_is_read_where_it_is(dtype: Any, as_tensor: bool) -> None:
    grad = torch.arange(-3, 6).to(dtype).reshape(3, 3).T
    expected = np.ones((3, 3), "float32")
    Adam(clipnorm=1.0).apply_gradients([(grad.float().numpy(), expected)])
    for zero_grad in (False, True):
        param: Any = torch.ones(3, 3).T if as_tensor else np.ones((3, 3), "float32")
        given = grad.clone()
        Adam(clipnorm=1.0, zero_grad=zero_grad).apply_gradients([(given, param)])
        np.testing.assert_array_equal(np.asarray(param), expected)
        assert torch.equal(given, torch.zeros_like(grad) if zero_grad else grad)
        assert bool(given._version) == zero_grad


def test_parameters_of_16_bits(tmp_path: Path) -> None:
    x = values(np.random.default_rng(0), (70,), "float32").astype(storage.BFLOAT16)
    grads, path = [np.ones(70, storage.BFLOAT16)], tmp_path / "adam.safetensors"
    of_arrays, of_tensors = (
        Adam(moments="packed", low_bits="int8", clipnorm=0.1) for _ in range(2)
    )
    arrays, tensors = [x.copy()], [tensor(x)]
    expected = of_arrays.get_gradients(grads, arrays)[0]
    assert_same_bits(of_tensors.get_gradients([tensor(grads[0])], tensors)[0], expected)
    of_arrays.step(arrays, grads)
    of_tensors.step(tensors, [tensor(grads[0])])
    assert_same_bits(array(tensors[0]), arrays[0])
    of_tensors.save(path)
    resumed = Adam.load(path, tensors)
    assert_same_bits(resumed.master_weights(tensors)[0], of_arrays.master_weights(arrays)[0])
    unfit = [torch.ones(70, dtype=torch.int16)]
    for call in (resumed.master_weights, lambda params: Adam.load(path, params)):
        with pytest.raises(TypeError, match=r"params\[0\] must be float32.*Received: "):
            call(unfit)


# -- refused calls ----------------------------------------------------------------------------


@pytest.fixture
def tensors(training: Training) -> Iterator[list[Any]]:
    """Parameters in the memory of those of a training, which no refused call may change."""
    before = training.visible()
    yield [torch.from_numpy(p).requires_grad_() for p in training.params]
    training.assert_as(before)
    training.step()
    training.check()


Row = tuple[Callable[[Any], Any], type[Exception], str]
BAD_PARAMS: dict[str, Row] = {
    "meta": (lambda p: torch.empty_like(p, device="meta"), ValueError, "CPU"),
    "sparse": (lambda p: p.detach().to_sparse(), ValueError, "dense"),
    "sparse rows": (lambda p: p.detach().to_sparse_csr(), ValueError, "dense"),
    "int64": (lambda p: p.detach().long(), TypeError, "float32"),
    "complex64": (lambda p: p.detach() * 1j, TypeError, "(real|float32)"),
}
NOT_DENSE: dict[str, Row] = {
    "strided": (lambda _: torch.zeros(3, 10)[:, ::2], ValueError, "without gaps or overlaps"),
    "expanded": (lambda _: torch.zeros(5).expand(3, 5), ValueError, "without gaps or overlaps"),
}


@pytest.mark.parametrize(
    ("method", "make", "error", "rule"),
    [
        pytest.param(method, *row, id=f"{method}-{name}")
        for method in CALLS
        # Only methods that write to a parameter need it to be dense.
        for name, row in (BAD_PARAMS | (NOT_DENSE if method != "get_gradients" else {})).items()
    ],
)
# torch warns that its compressed sparse tensors are in beta.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_parameter(
    training: Training,
    tensors: list[Any],
    make: Any,
    error: type[Exception],
    rule: str,
    method: str,
) -> None:
    params, fresh = [make(tensors[0]), *tensors[1:]], Adam()
    for optimizer in (training.optimizer, fresh):
        with pytest.raises(error, match=rf"(?s)params\[0\].*{rule}.*Received: .+"):
            CALLS[method](optimizer, params, training.grads())
    assert fresh.weights == []


BAD_GRADIENTS: dict[str, Row] = {
    "meta": (lambda g: torch.empty_like(g, device="meta"), ValueError, "CPU"),
    "sparse": (lambda g: g.to_sparse(), ValueError, "dense"),
    "complex64": (lambda g: g * 1j, TypeError, "same_kind"),
    "transposed": (lambda g: g.T, ValueError, "shape"),
}


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize(("make", "error", "rule"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_gradient(
    training: Training,
    tensors: list[Any],
    make: Any,
    error: type[Exception],
    rule: str,
    method: str,
) -> None:
    grads = [make(torch.ones(3, 5)), *training.grads()[1:]]
    with pytest.raises(error, match=rf"(?s)grads\[0\].*{rule}.*Received: .+"):
        CALLS[method](training.optimizer, tensors, grads)


def used_twice(p: list[Any]) -> Any:
    loss = loss_of(p)
    torch.autograd.grad(loss, p)
    return loss


def sparse_gradient(p: list[Any]) -> Any:
    rows = torch.nn.functional.embedding(torch.tensor([0, 2]), p[0], sparse=True)
    return rows.sum() + loss_of(p[1:])


NO_GRAPH = (ValueError, RuntimeError)
# Losses, and the parameters beside them.
BAD_LOSSES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Any, str]] = {
    "not scalar": (lambda p: p[0] ** 2, list, ValueError, r"loss.*scalar.*Received: .+"),
    "no graph": (lambda _: torch.tensor(1.0), list, NO_GRAPH, "grad"),
    "used twice": (used_twice, list, NO_GRAPH, "second time"),
    "sparse": (sparse_gradient, list, ValueError, r"(?s)grads\[0\].*dense.*Received: .+"),
    "a parameter not reached": (
        lambda p: loss_of([p[0], *p[2:]]),
        list,
        ValueError,
        r"(?s)^An operation has `None` for gradient\..*\[1\]",
    ),
    "a parameter that requires no gradient": (
        loss_of,
        lambda p: [p[0].detach(), *p[1:]],
        ValueError,
        r"params\[0\].*requires?_? ?a? ?grad.*Received: .+",
    ),
    "an array as a parameter": (
        loss_of,
        lambda p: [p[0].detach().numpy(), *p[1:]],
        TypeError,
        r"params\[0\].*torch\.Tensor.*Received: .+",
    ),
    "a callable": (lambda _: loss_of, list, TypeError, r"params\[0\].*ndarray.*Received: .+"),
}


@pytest.mark.parametrize("method", ["get_updates", "get_gradients"])
@pytest.mark.parametrize(("loss", "params", "error", "rule"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_loss(
    training: Training,
    tensors: list[Any],
    method: str,
    loss: Any,
    params: Any,
    error: Any,
    rule: str,
) -> None:
    given = loss(tensors)
    with pytest.raises(error, match=rule):
        CALLS[method](training.optimizer, params(tensors), given)


OVERLAPPING: dict[str, Callable[[Any], list[Any]]] = {
    "one tensor twice": lambda b: [b[:4]] * 2,
    "views": lambda b: [b[:4], b[3:7]],
    "a tensor and an array": lambda b: [b[:4], b.numpy()[2:6]],
}


@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
def test_parameters_that_overlap(views: Callable[[Any], list[Any]]) -> None:
    buffer = torch.arange(8.0)
    params = views(buffer)
    optimizer = Adam()
    with pytest.raises(ValueError, match=r"\[\d\].*overlap.*Received: .+"):
        optimizer.get_updates([np.ones(4, "float32")] * 2, params)
    assert buffer.tolist() == list(range(8))
    assert optimizer.weights == []


# -- torch and this package in one process ----------------------------------------------------


def test_norm(rng: np.random.Generator) -> None:
    arrays = [values(rng, shape, dtype) for shape in [(40, 7), (7,)] for dtype in FLOATS]
    assert global_norm(as_tensors(arrays)) == global_norm(arrays)


def test_thread_counts_are_separate() -> None:
    before = torch.get_num_threads()
    with running(threads=before + 3):
        Adam().get_updates([np.ones(40_000)], [np.ones(40_000)])
        assert torch.get_num_threads() == before
    with running(threads=3):
        torch.set_num_threads(before + 1)
        assert fusedadam.get_num_threads() == 3
        torch.set_num_threads(before)


def test_torch_is_not_imported_for_arrays() -> None:
    code = """
        import sys
        import autograd.numpy as anp, numpy as np
        from fusedadam import Adam
        Adam().get_updates(lambda p: anp.sum(p[0] ** 2), [np.ones(3)])
        try:
            Adam().get_updates(0.5, [np.ones(3)])
        except TypeError:
            print("torch" in sys.modules)
    """
    assert output_of(code) == "False"
