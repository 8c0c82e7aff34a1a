# SPDX-License-Identifier: MIT
"""torch: tensor losses, parameters stepped in place, and a comparison with torch's own Adam."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
from fresh_python import output_of
from fusedadam import Adam, adam_step
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, running, values
from rounding import Divergence

torch: Any = pytest.importorskip("torch")

SHAPES = [(5, 3), (3,), ()]


def leaves(dtype: str, seed: int = 4) -> list[Any]:
    """Parameters as users create them."""
    rng = np.random.default_rng(seed)
    return [torch.tensor(values(rng, s, dtype), requires_grad=True) for s in SHAPES]


def loss_of(params: list[Any]) -> Any:
    weight, bias, scale = params
    inputs = torch.linspace(-1, 1, 20, dtype=weight.dtype).reshape(4, 5)
    return ((torch.tanh(inputs @ weight + bias) * scale - 0.5) ** 2).mean()


def numpy_of(tensors: Any) -> list[Array]:
    return [t.detach().numpy() for t in tensors]


# -- a scalar tensor as the loss --------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("limits", [{}, {"clipnorm": 0.1, "clipvalue": 0.05}], ids=["", "clipped"])
def test_steps_of_a_tensor_loss(dtype: str, limits: dict[str, Any]) -> None:
    params = leaves(dtype)
    addresses = [p.data_ptr() for p in params]
    reference = oracle.OracleAdam([p.copy() for p in numpy_of(params)], lr=0.05, **limits)
    optimizer = Adam(lr=0.05, **limits)
    for _ in range(10):
        grads = [g.numpy() for g in torch.autograd.grad(loss_of(params), params)]
        clipped = optimizer.get_gradients(loss_of(params), params)
        assert_all_same_bits(clipped, oracle.clip(grads, **limits))
        reference.step(grads)
        updates = optimizer.get_updates(loss_of(params), params)
        assert len(updates) == 10
        assert all(u is p for u, p in zip(updates[3::3], params, strict=True))
    assert_all_same_bits(numpy_of(params), reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())
    assert [p.data_ptr() for p in params] == addresses
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in params)


def test_mixed_dtypes() -> None:
    params = [
        torch.ones(3, requires_grad=True),
        torch.ones(2, dtype=torch.float64, requires_grad=True),
    ]
    reference = oracle.OracleAdam([p.copy() for p in numpy_of(params)])
    reference.step([np.full(3, 2, "float32"), np.full(2, 3.0)])
    Adam().get_updates((2 * params[0]).sum() + (3 * params[1]).sum(), params)
    assert_all_same_bits(numpy_of(params), reference.params)


@pytest.mark.parametrize("size", [7, 100_000])
def test_expanded_gradient(size: int) -> None:
    # The gradient of a sum is one number with stride 0.
    p = torch.ones(size, requires_grad=True)
    assert torch.autograd.grad(p.sum(), p)[0].stride() == (0,)
    reference = oracle.OracleAdam([p.detach().numpy().copy()])
    reference.step([np.ones(size, "float32")])
    Adam().get_updates(p.sum(), [p])
    assert_same_bits(p.detach().numpy(), reference.params[0])


def test_module_trained_from_its_grad_attributes() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
    optimizer = Adam(lr=0.02)
    reference = oracle.OracleAdam(numpy_of(model.parameters()), lr=0.02)
    losses = []
    for count in range(1, 101):
        model.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        reference.step([p.grad.numpy() for p in model.parameters()])
        assert optimizer.apply_gradients((p.grad, p) for p in model.parameters()) == count
        losses.append(loss.item())
    assert_all_same_bits(numpy_of(model.parameters()), reference.params)
    assert losses[-1] < 0.5 * losses[0]


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


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_tensors_that_record_nothing(mode: str) -> None:
    with getattr(torch, mode)():
        p, g = torch.ones(3), torch.full((3,), 0.5)
        Adam().apply_gradients([(g, p)])
        reference = oracle.OracleAdam([np.ones(3, "float32")])
        reference.step([np.full(3, 0.5, "float32")])
        assert_same_bits(p.numpy(), reference.params[0])


MOVES: dict[str, Callable[[Any], Any]] = {
    "data": lambda p: setattr(p, "data", p.data.clone()),
    "set_": lambda p: p.set_(p.clone()),
    "share_memory_": lambda p: p.share_memory_(),
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


def test_copies_of_an_optimizer_of_tensors() -> None:
    params = leaves("float32")
    optimizer = Adam()
    optimizer.get_updates(loss_of(params), params)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twins = copy.deepcopy(params)
        twin.get_updates(loss_of(twins), twins)
        ours = copy.deepcopy(params)
        copy.deepcopy(optimizer).get_updates(loss_of(ours), ours)
        assert_all_same_bits(numpy_of(twins), numpy_of(ours))


# -- tensors mixed with arrays ----------------------------------------------------------------


def as_tensors(arrays: list[Array]) -> list[Any]:
    return [torch.from_numpy(a) for a in arrays]


def graph_tensors(arrays: list[Array]) -> list[Any]:
    """Gradients that have a graph of their own, as `create_graph=True` leaves them."""
    return [t.requires_grad_() * 1 for t in as_tensors(arrays)]


def expanded_tensors(arrays: list[Array]) -> list[Any]:
    return [t[..., None].expand(*t.shape, 2)[..., 1] for t in as_tensors(arrays)]


@pytest.mark.parametrize("of_params", [list, as_tensors])
@pytest.mark.parametrize("of_grads", [list, as_tensors, graph_tensors, expanded_tensors])
@pytest.mark.parametrize("method", ["get_updates", "apply_gradients", "get_gradients"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_as_a_sequence(
    rng: np.random.Generator,
    of_params: Callable[[list[Array]], list[Any]],
    of_grads: Callable[[list[Array]], list[Any]],
    method: str,
    dtype: str,
) -> None:
    params = [values(rng, shape, dtype) for shape in SHAPES]
    grads = [values(rng, shape, dtype) for shape in SHAPES]
    kept = [g.copy() for g in grads]
    reference = oracle.OracleAdam(params, clipnorm=1.0)
    reference.step(grads)
    optimizer = Adam(clipnorm=1.0)
    given, stepped = of_grads(grads), of_params(params)
    if method == "get_updates":
        optimizer.get_updates(given, stepped)
    elif method == "apply_gradients":
        optimizer.apply_gradients(list(zip(given, stepped, strict=True)))
    else:
        clipped = optimizer.get_gradients(given, stepped)
        assert_all_same_bits(clipped, oracle.clip(kept, clipnorm=1.0))
        optimizer.get_updates(given, stepped)
    assert_all_same_bits(params, reference.params)
    assert_all_same_bits(grads, kept)


def test_unclipped_gradients_are_arrays() -> None:
    p = torch.ones(3, requires_grad=True)
    (grad,) = Adam().get_gradients((2 * p).sum(), [p])
    assert_same_bits(grad, np.full(3, 2, "float32"))


def test_adam_step_with_tensor_gradients(rng: np.random.Generator) -> None:
    p, g, m = (values(rng, (3, 4), "float32") for _ in range(3))
    v = m * m
    expected = oracle.adam_step(p, g, m, v, step=2)
    adam_step([p], [torch.from_numpy(g)], [m], [v], step=2)
    assert_all_same_bits([p, m, v], expected)


# -- refused calls ----------------------------------------------------------------------------


class Training:
    def __init__(self) -> None:
        self.params = leaves("float32")
        self.optimizer = Adam(clipnorm=1.0)
        self.optimizer.get_updates(loss_of(self.params), self.params)
        self.before = self.everything()

    def everything(self) -> list[Array]:
        return [a.copy() for a in (*numpy_of(self.params), *self.optimizer.weights)]


@pytest.fixture
def training() -> Iterator[Training]:
    """A training that the test must not change, and that continues as if nothing had happened."""
    training, twin = Training(), Training()
    yield training
    assert_all_same_bits(training.everything(), training.before)
    for t in (training, twin):
        t.optimizer.get_updates(loss_of(t.params), t.params)
    assert_all_same_bits(training.everything(), twin.everything())


CALLS: dict[str, Callable[[Adam, Any, Any], Any]] = {
    "build": lambda o, params, _: o.build(params),
    "get_updates": lambda o, params, grads: o.get_updates(grads, params),
    "get_gradients": lambda o, params, grads: o.get_gradients(grads, params),
    "apply_gradients": lambda o, params, grads: o.apply_gradients(
        list(zip(grads, params, strict=True))
    ),
}


def replaced(params: list[Any], tensor: Any) -> list[Any]:
    return [tensor, *params[1:]]


BAD_PARAMS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "meta": (lambda p: torch.empty_like(p, device="meta"), ValueError, "CPU"),
    "sparse": (lambda p: p.detach().to_sparse(), ValueError, "dense"),
    "sparse rows": (lambda p: p.detach().to_sparse_csr(), ValueError, "dense"),
    "int64": (lambda p: p.detach().long(), TypeError, "float32"),
    "complex64": (lambda p: p.detach() * 1j, TypeError, "(real|float32)"),
}
NOT_DENSE: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "strided": (lambda _: torch.zeros(5, 6)[:, ::2], ValueError, "without gaps or overlaps"),
    "expanded": (lambda _: torch.zeros(3).expand(5, 3), ValueError, "without gaps or overlaps"),
}


@pytest.mark.parametrize("fresh", [False, True], ids=["built", "fresh"])
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
    make: Callable[[Any], Any],
    error: type[Exception],
    rule: str,
    method: str,
    fresh: bool,
) -> None:
    optimizer = Adam() if fresh else training.optimizer
    params = replaced(training.params, make(training.params[0]))
    grads = [np.ones(shape, "float32") for shape in SHAPES]
    with pytest.raises(error, match=rf"(?s)params\[0\].*{rule}.*Received: .+"):
        CALLS[method](optimizer, params, grads)
    assert fresh is False or optimizer.weights == []


BAD_GRADIENTS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "meta": (lambda g: torch.empty_like(g, device="meta"), ValueError, "CPU"),
    "sparse": (lambda g: g.to_sparse(), ValueError, "dense"),
    "complex64": (lambda g: g * 1j, TypeError, "same_kind"),
    "transposed": (lambda g: g.T, ValueError, "shape"),
    "flat": (lambda g: g.ravel(), ValueError, "shape"),
}


@pytest.mark.parametrize("method", ["apply_gradients", "get_updates", "get_gradients"])
@pytest.mark.parametrize(("make", "error", "rule"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_gradient(
    training: Training,
    make: Callable[[Any], Any],
    error: type[Exception],
    rule: str,
    method: str,
) -> None:
    grads = replaced([torch.ones(s) for s in SHAPES], make(torch.ones(SHAPES[0])))
    with pytest.raises(error, match=rf"(?s)grads\[0\].*{rule}.*Received: .+"):
        CALLS[method](training.optimizer, training.params, grads)


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


@pytest.mark.parametrize("method", ["get_updates", "get_gradients"])
def test_parameter_that_the_loss_does_not_reach(training: Training, method: str) -> None:
    loss = (training.params[0] ** 2).sum() + training.params[2] ** 2
    with pytest.raises(ValueError, match=r"(?s)^An operation has `None` for gradient\..*\[1\]"):
        getattr(training.optimizer, method)(loss, training.params)


def test_grad_attribute_that_is_none(training: Training) -> None:
    with pytest.raises(ValueError, match=r"^grads must not all be None"):
        training.optimizer.apply_gradients([(p.grad, p) for p in training.params])


@pytest.mark.parametrize("method", ["get_updates", "get_gradients"])
def test_sparse_gradient_of_a_loss(training: Training, method: str) -> None:
    rows = torch.nn.functional.embedding(torch.tensor([0, 2]), training.params[0], sparse=True)
    loss = rows.sum() + training.params[1].sum() + training.params[2]
    with pytest.raises(ValueError, match=r"(?s)grads\[0\].*dense.*Received: .+"):
        getattr(training.optimizer, method)(loss, training.params)


@pytest.mark.parametrize("method", ["get_updates", "get_gradients"])
@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (lambda p: p[0] ** 2, ValueError, r"loss.*scalar.*Received: .+"),
        (lambda _: torch.tensor(1.0), (ValueError, RuntimeError), r"grad"),
        (lambda p: loss_of(p).detach(), (ValueError, RuntimeError), r"grad"),
    ],
    ids=["not scalar", "no graph", "detached"],
)
def test_loss(
    training: Training, method: str, make: Callable[[Any], Any], error: Any, pattern: str
) -> None:
    with pytest.raises(error, match=pattern):
        getattr(training.optimizer, method)(make(training.params), training.params)


def test_loss_whose_graph_is_gone(training: Training) -> None:
    loss = loss_of(training.params)
    training.optimizer.get_gradients(loss, training.params)
    with pytest.raises((RuntimeError, ValueError), match="second time"):
        training.optimizer.get_updates(loss, training.params)


def test_parameter_that_requires_no_gradient(training: Training) -> None:
    params = replaced(training.params, training.params[0].detach())
    with pytest.raises(ValueError, match=r"params\[0\].*requires?_? ?a? ?grad.*Received: .+"):
        training.optimizer.get_updates(loss_of(training.params), params)


def test_arrays_as_parameters_of_a_tensor_loss(training: Training) -> None:
    params = replaced(training.params, training.params[0].detach().numpy())
    with pytest.raises(TypeError, match=r"params\[0\].*torch\.Tensor.*Received: .+"):
        training.optimizer.get_updates(loss_of(training.params), params)


def test_tensors_as_parameters_of_a_callable(training: Training) -> None:
    with pytest.raises(TypeError, match=r"params\[0\].*ndarray.*Received: .+"):
        training.optimizer.get_updates(loss_of, training.params)


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


# -- comparison with torch.optim.Adam ---------------------------------------------------------


class SideBySide:
    """Step this package, with converted epsilon, and `torch.optim.Adam` on the same gradients."""

    def __init__(self, dtype: str, *, convert: bool = True) -> None:
        self._rng = np.random.default_rng(8)
        self._convert = convert
        self._beta_1, self._beta_2, self._eps = 0.9, 0.999, 1e-3
        self.p = values(self._rng, 1000, dtype)
        self.theirs = torch.tensor(self.p)  # a copy
        self.ours = Adam(lr=0.01, epsilon=self._eps)
        self._torch = torch.optim.Adam([self.theirs], lr=0.01, eps=self._eps)
        self.divergence = Divergence(self.p)
        self.ours.build([self.p])

    def step(self) -> None:
        # From far below epsilon, where its place in the formula matters, to far above.
        g = values(self._rng, 1000, self.p.dtype.name)
        t = self.ours.iterations + 1
        root = math.sqrt(1 - self._beta_2**t)
        if self._convert:
            self.ours.epsilon = self._eps * root
        before = self.ours.get_weights()
        self.ours.apply_gradients([(g, self.p)])
        self.theirs.grad = torch.from_numpy(g)
        self._torch.step()
        _, m, v = self.ours.weights
        self.divergence.step(
            (before[1], before[2]),
            (self.p, m, v),
            g,
            lr_t=0.01 * root / (1 - self._beta_1**t),
            beta_1=self._beta_1,
            beta_2=self._beta_2,
            epsilon=self.ours.epsilon,
        )

    def check(self) -> None:
        state = self._torch.state[self.theirs]
        theirs = (self.theirs, state["exp_avg"], state["exp_avg_sq"])
        self.divergence.check(
            (self.p, *self.ours.weights[1:]),
            tuple(t.numpy() for t in theirs),
            f"step {self.ours.iterations}",
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_torch_within_the_derived_bound(dtype: str) -> None:
    both = SideBySide(dtype)
    for _ in range(50):
        both.step()
        both.check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_epsilon_must_be_converted(dtype: str) -> None:
    # The bound is tight enough to distinguish the two forms of epsilon.
    both = SideBySide(dtype, convert=False)
    both.step()
    with pytest.raises(AssertionError, match="times the bound"):
        both.check()


# -- torch and this package in one process ----------------------------------------------------


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_flushing_by_torch_changes_nothing_and_is_left_on(
    rng: np.random.Generator, size: int, threads: int
) -> None:
    p, g, m = (values(rng, size, "float32") * np.float32(1e-38) for _ in range(3))
    v = np.abs(m)
    expected = oracle.adam_step(p, g, m, v, step=3, flush_denormals=False)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        adam_step(p, g, m, v, step=3, flush_denormals=False)
        flushed = (torch.tensor([1e-40]) * 0.5).item()
    finally:
        torch.set_flush_denormal(False)
    assert_all_same_bits([p, m, v], expected, f"threads={threads}")
    assert flushed == 0.0


def test_thread_counts_are_separate() -> None:
    before = torch.get_num_threads()
    with running(threads=before + 3):
        Adam().get_updates([np.ones(100_000)], [np.ones(100_000)])
        assert torch.get_num_threads() == before
    with running():
        torch.set_num_threads(1)
        try:
            fusedadam.set_num_threads(3)
            assert fusedadam.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("order", ["torch, fusedadam", "fusedadam, torch"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_import_orders(order: str, first: str) -> None:
    # Each library brings an OpenMP runtime. Both must find their threads in either import order.
    code = f"""
        import {order}
        import numpy as np, oracle
        from helpers import assert_all_same_bits
        rng = np.random.default_rng(0)
        p, g = rng.standard_normal((2, 100_000)).astype("float32")
        reference = oracle.OracleAdam([p])
        optimizer = fusedadam.Adam()

        def ours():
            reference.step([g])
            optimizer.get_updates([g], [p])

        def theirs():
            x = torch.ones(400, 400)
            assert (x @ x).sum().item() == 400.0**3
            assert torch.ones(1_000_000).add(1).sum().item() == 2_000_000

        for work in {"[ours, theirs]" if first == "ours" else "[theirs, ours]"} * 3:
            work()
        assert_all_same_bits([p, *optimizer.weights], [*reference.params, *reference.weights()])
        print("same")
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "same"


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
