# SPDX-License-Identifier: MIT
"""Sparse gradients in `fusedadam.torch`: lazy as in `torch.optim.SparseAdam`, with dense ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
from fresh_python import output_of
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, running, values

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import (
    array,
    arrays,
    assert_everything_same_bits,
    everything,
    leaves,
    set_grads,
)

ROWS, WIDTH = 50, 6
STEPS = 60
# In 60 steps a row is stepped about 20 times, with about ten roundings per side, relative to terms
# that are at most 100 times their sum.
RTOL = {"float32": 100 * 400 * 2.0**-24, "float64": 100 * 400 * 2.0**-53}

Draw = Callable[[np.random.Generator], Array]
INDICES: dict[str, Draw] = {
    "unsorted and repeated": lambda rng: rng.integers(0, ROWS, 12),
    "each once": lambda rng: rng.permutation(ROWS)[:12],
    "one row many times": lambda rng: np.full(9, rng.integers(0, ROWS)),
    "all rows": lambda rng: rng.permutation(ROWS),
    "first and last": lambda _: np.array([ROWS - 1, 0]),
    "none, some, none": lambda rng: rng.integers(0, ROWS, 5 * int(rng.integers(0, 2))),
}


def sparse(indices: Array, rows: Array, shape: tuple[int, ...], *, coalesced: bool = False) -> Any:
    g = torch.sparse_coo_tensor(
        torch.tensor(indices)[None].long(), torch.tensor(rows), shape, check_invariants=True
    )
    return g.coalesce() if coalesced else g


def draw(
    rng: np.random.Generator, of: Draw, dtype: str, shape: tuple[int, ...] = (ROWS, WIDTH)
) -> tuple[Array, Array]:
    indices = of(rng)
    return indices, values(rng, (len(indices), *shape[1:]), dtype)


def table(dtype: str = "float32", shape: tuple[int, ...] = (ROWS, WIDTH)) -> Any:
    return leaves([shape], dtype)[0]


# -- comparison with SparseAdam ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("of", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.5, 0.9), "eps": 1e-2, "maximize": True},
        {"lr": torch.tensor(0.02, dtype=torch.float64)},
    ],
    ids=["plain", "others", "lr as a tensor"],
)
def test_beside_sparse_adam(
    options: dict[str, Any], of: Draw, dtype: str, rng: np.random.Generator
) -> None:
    p, q = table(dtype), table(dtype)
    ours = Adam([p], **{"lr": 0.01} | copy.deepcopy(options))
    theirs = torch.optim.SparseAdam([q], **{"lr": 0.01} | copy.deepcopy(options))
    for i in range(STEPS):
        indices, rows = draw(rng, of, dtype)
        p.grad = sparse(indices, rows, p.shape, coalesced=i % 3 == 0)
        q.grad = sparse(indices, rows, q.shape)
        ours.step()
        theirs.step()
    assert ours.state[p]["step"].item() == theirs.state[q]["step"] == STEPS
    rtol = RTOL[dtype]
    for a, b, scale in (
        (p, q, 1.0),
        (ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], 1.0),
        (ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"], 0.0),
    ):
        # After cancellation, p is known to a fraction of an update, and m to a fraction of a
        # gradient's share.
        np.testing.assert_allclose(array(a), array(b), rtol=rtol, atol=scale * rtol * 1e-2)
    assert isinstance(ours.state[p]["step"], torch.Tensor)


# -- bitwise equality with the oracle ---------------------------------------------------------

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Adam, {}),
    "decay apart": (AdamW, {"weight_decay": 0.1}),
    "decay in the gradient": (Adam, {"weight_decay": 0.1}),
    "amsgrad": (Adam, {"amsgrad": True, "betas": (0.5, 0.5)}),
    "ascent": (Adam, {"maximize": True}),
    "averages": (Adam, {"ema_decay": 0.9}),
    "norm": (Adam, {"max_grad_norm": 0.5}),
    "all at once": (
        AdamW,
        {
            "weight_decay": 0.1,
            "amsgrad": True,
            "maximize": True,
            "ema_decay": 0.5,
            "max_grad_norm": 0.5,
        },
    ),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("of", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)
def test_bits_of_the_oracle(
    kind: Any, options: dict[str, Any], of: Draw, dtype: str, rng: np.random.Generator
) -> None:
    p = table(dtype)
    betas = options.get("betas", (0.9, 0.999))
    decay = options.get("weight_decay", 0.0)
    reference = oracle.OracleAdam(
        [array(p)],
        beta_1=betas[0],
        beta_2=betas[1],
        epsilon=1e-8,  # "epsilon hat", as in SparseAdam
        weight_decay=decay if kind is AdamW else None,
        l2=0.0 if kind is AdamW else decay,
        amsgrad=options.get("amsgrad", False),
        maximize=options.get("maximize", False),
        use_ema="ema_decay" in options,
        ema_momentum=options.get("ema_decay", 0.0),
        clipnorm=options.get("max_grad_norm"),
        flush_denormals=False,
    )
    optimizer = kind([p], **options)
    for _ in range(10):
        indices, rows = draw(rng, of, dtype)
        p.grad = sparse(indices, rows, p.shape)
        optimizer.step()
        reference.apply_sparse(indices, rows)
    (state,) = everything(optimizer)
    assert state.pop("step") == 10
    names = {"param": "params", "exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vhat"}
    assert set(state) == {
        "param",
        "exp_avg",
        "exp_avg_sq",
        *(["max_exp_avg_sq"] if options.get("amsgrad") else []),
        *(["ema"] if "ema_decay" in options else []),
    }
    for name, a in state.items():
        assert_same_bits(a, getattr(reference, names.get(name, name))[0], name)


@pytest.mark.parametrize("shape", [(20_000, 8), (3000, 3, 5), (1000,), (4, 0), (1, 5)], ids=str)
def test_shapes_of_tables_and_threads(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    start = array(table("float32", shape))
    gradients = [
        draw(rng, lambda r: r.integers(0, shape[0], 4 * shape[0] // 5), "float32", shape)
        for _ in range(3)
    ]
    reference = oracle.OracleAdam([start], flush_denormals=False)
    for indices, rows in gradients:
        reference.apply_sparse(indices, rows)
    for count in (1, 3):
        p = torch.nn.Parameter(torch.tensor(start))
        optimizer = Adam([p])
        with running(threads=count):
            for indices, rows in gradients:
                p.grad = sparse(indices, rows, shape)
                optimizer.step()
        assert_same_bits(array(p), reference.params[0], f"threads={count}")
        assert_same_bits(array(optimizer.state[p]["exp_avg_sq"]), reference.v[0])


@pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)
def test_other_rows_stay_to_the_bit(
    kind: Any, options: dict[str, Any], rng: np.random.Generator
) -> None:
    p = table()
    optimizer = kind([p], **options)
    p.grad = sparse(*draw(rng, INDICES["all rows"], "float32"), p.shape)
    optimizer.step()
    before = everything(optimizer)[0]
    indices, rows = draw(rng, INDICES["unsorted and repeated"], "float32")
    p.grad = sparse(indices, rows, p.shape)
    optimizer.step()
    others = np.setdiff1d(np.arange(ROWS), indices)
    after = everything(optimizer)[0]
    for name in before.keys() - {"step"}:
        assert_same_bits(after[name][others], before[name][others], name)
        if name != "max_exp_avg_sq":
            assert not np.array_equal(after[name][indices], before[name][indices]), name


# -- embeddings -------------------------------------------------------------------------------


class Words(torch.nn.Module):  # type: ignore[misc]
    """A sparse embedding, a sparse embedding bag, and dense layers."""

    def __init__(self, *, is_sparse: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(40, 4, sparse=is_sparse)
        self.bag = torch.nn.EmbeddingBag(40, 4, mode="sum", sparse=is_sparse)
        self.head = torch.nn.Linear(8, 1)

    def forward(self, words: Any) -> Any:
        both = torch.cat([self.embedding(words).mean(1), self.bag(words)], dim=-1)
        return self.head(torch.tanh(both))


def test_model_of_sparse_and_dense_parameters() -> None:
    torch.manual_seed(0)
    ours = Words().double()
    theirs = copy.deepcopy(ours)
    optimizer = Adam(ours.parameters(), lr=0.05)
    stock = [
        torch.optim.SparseAdam([theirs.embedding.weight, theirs.bag.weight], lr=0.05),
        torch.optim.Adam(theirs.head.parameters(), lr=0.05),
    ]
    losses = []
    for i in range(40):
        words = torch.randint(0, 40, (8, 3), generator=torch.Generator().manual_seed(i % 4))
        target = (words.sum(1, keepdim=True) % 2).double()
        for model, parts in ((ours, [optimizer]), (theirs, stock)):
            for of in parts:
                of.zero_grad()
            loss = torch.nn.functional.mse_loss(model(words), target)
            loss.backward()
            for of in parts:
                of.step()
        losses.append(loss.item())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        # 40 steps of a smooth loss amplify roundings of 2**-53.
        np.testing.assert_allclose(array(p), array(q), rtol=1e-8, atol=1e-10)
    assert losses[-1] < 0.5 * losses[0]
    assert [s["step"] for s in everything(optimizer)] == [40] * 4


def test_sparse_and_dense_in_one_step_are_as_alone(rng: np.random.Generator) -> None:
    shapes = [(ROWS, WIDTH), (7,), (30, 2), (50_000,)]
    params, apart = leaves(shapes), leaves(shapes)
    together = AdamW(params, ema_decay=0.9)
    alone = [AdamW([p], ema_decay=0.9) for p in apart]
    for _ in range(4):
        grads = [
            sparse(*draw(rng, INDICES["unsorted and repeated"], "float32"), shapes[0]),
            torch.tensor(values(rng, (7,), "float32")),
            sparse(*draw(rng, lambda r: r.integers(0, 30, 4), "float32", (30, 2)), shapes[2]),
            torch.tensor(values(rng, (50_000,), "float32")),
        ]
        set_grads(params, grads)
        set_grads(apart, grads)
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert_everything_same_bits(everything(together), [everything(a)[0] for a in alone])


def test_one_parameter_now_sparse_now_dense(rng: np.random.Generator) -> None:
    # Sparse and dense steps follow their own rules, over the same moments and one count.
    p = table("float64")
    optimizer = Adam([p], lr=0.01)
    reference = oracle.OracleAdam([array(p)], lr=0.01, flush_denormals=False)
    for i in range(6):
        if i % 2:
            indices, rows = draw(rng, INDICES["unsorted and repeated"], "float64")
            p.grad = sparse(indices, rows, p.shape)
            reference.epsilon = 1e-8
            reference.apply_sparse(indices, rows)
        else:
            g = values(rng, (ROWS, WIDTH), "float64")
            p.grad = torch.tensor(g)
            reference.epsilon = 1e-8 * math.sqrt(1 - oracle.power(0.999, i + 1))
            reference.step([g])
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 6
    assert_all_same_bits([array(p)], reference.params)


def test_norm_over_sparse_and_dense(rng: np.random.Generator) -> None:
    p, q = leaves([(ROWS, WIDTH), (7,)], "float64")
    optimizer = Adam([p, q], betas=(0.0, 0.999), max_grad_norm=0.5)
    indices, rows = draw(rng, INDICES["unsorted and repeated"], "float64")
    p.grad, q.grad = sparse(indices, rows, p.shape), torch.tensor(values(rng, (7,), "float64"))
    whole = array(p.grad.coalesce()), array(q.grad)
    norm = math.sqrt(sum(float((g * g).sum()) for g in whole))
    assert norm > 0.5
    optimizer.step()
    # With beta_1 = 0, the first moment is the gradient that the step used.
    for x, g in zip((p, q), whole, strict=True):
        np.testing.assert_allclose(
            array(optimizer.state[x]["exp_avg"]), g * (0.5 / norm), rtol=1e-12
        )


# -- zero_grad_in_step ------------------------------------------------------------------------


def test_zero_grad_in_step_leaves_an_empty_sparse_gradient() -> None:
    torch.manual_seed(0)
    ours = Words()
    theirs = copy.deepcopy(ours)
    optimizer, plain = Adam(ours.parameters(), zero_grad_in_step=True), Adam(theirs.parameters())
    for i in range(5):
        words = torch.tensor([[i, 3, 3], [5, i + 1, 0]])
        ours(words).sum().backward()
        optimizer.step()
        plain.zero_grad()
        theirs(words).sum().backward()
        plain.step()
        for table in (ours.embedding.weight, ours.bag.weight):
            assert table.grad.is_sparse
            assert table.grad.shape == table.shape
            assert table.grad._nnz() == 0
        assert not ours.head.weight.grad.any()
    assert_everything_same_bits(everything(optimizer), everything(plain))
    # An empty gradient is a gradient: the step counts and moves nothing.
    before = arrays([ours.embedding.weight, ours.bag.weight])
    optimizer.step()
    assert [s["step"] for s in everything(optimizer)] == [6] * 4
    assert_all_same_bits(arrays([ours.embedding.weight, ours.bag.weight]), before)


def test_gradient_is_left_as_it_was(rng: np.random.Generator) -> None:
    p = table()
    indices, rows = draw(rng, INDICES["unsorted and repeated"], "float32")
    p.grad = given = sparse(indices, rows, p.shape)
    Adam([p], max_grad_norm=0.1).step()
    assert p.grad is given
    assert not given.is_coalesced()
    assert_same_bits(given._values().numpy(), rows)
    assert given._indices()[0].tolist() == indices.tolist()


# -- values in other layouts ------------------------------------------------------------------


@pytest.mark.parametrize(
    "spread",
    [
        lambda rows: torch.tensor(rows).t().contiguous().t(),
        lambda rows: torch.stack([torch.tensor(rows)] * 2, dim=-1)[..., 0],
        lambda rows: torch.tensor(rows[:1]).expand(len(rows), -1),
    ],
    ids=["transposed", "with gaps", "expanded"],
)
def test_values_of_any_layout(spread: Callable[[Array], Any], rng: np.random.Generator) -> None:
    p, q = table(), table()
    indices, rows = draw(rng, INDICES["unsorted and repeated"], "float32")
    given = spread(rows)
    index = torch.tensor(np.stack([indices, indices], axis=1)).t()[:1]
    p.grad = torch.sparse_coo_tensor(index, given, p.shape, check_invariants=True)
    q.grad = sparse(indices, given.contiguous().numpy(), q.shape)
    one, two = Adam([p]), Adam([q])
    one.step()
    two.step()
    assert_everything_same_bits(everything(one), everything(two))


# -- the scaler -------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, True], ids=["", "fused"])
def test_grad_scaler(fused: bool | None) -> None:
    torch.manual_seed(0)
    model = Words()
    twin = copy.deepcopy(model)
    optimizer, plain = Adam(model.parameters(), fused=fused), Adam(twin.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(4):
        words = torch.tensor([[i, 3, 3], [5, i + 1, 0]])
        optimizer.zero_grad()
        factor = math.inf if i == 2 else 1.0
        scaler.scale(model(words).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if i != 2:
            plain.zero_grad()
            twin(words).sum().backward()
            plain.step()
    assert_everything_same_bits(everything(optimizer), everything(plain))


# -- refused calls ----------------------------------------------------------------------------


def two_sparse_dimensions(p: Any) -> None:
    p.grad = torch.eye(ROWS, WIDTH).to_sparse()


def transposed_table(p: Any) -> None:
    p.data = p.data.t().contiguous().t()


def no_sparse_dimension(p: Any) -> None:
    p.grad = torch.sparse_coo_tensor(
        torch.zeros(0, 1, dtype=torch.long),
        torch.ones(1, ROWS, WIDTH),
        p.shape,
        check_invariants=True,
    )


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "two sparse dimensions": (two_sparse_dimensions, "sparse"),
    "no sparse dimension": (no_sparse_dimension, "sparse"),
    "a table that is transposed": (transposed_table, "contiguous"),
}


@pytest.mark.parametrize(("spoil", "rule"), REFUSED.values(), ids=REFUSED)
def test_gradient_is_refused(spoil: Callable[[Any], None], rule: str) -> None:
    other, p = leaves([(5,), (ROWS, WIDTH)])
    optimizer = AdamW([other, p], zero_grad_in_step=True)
    other.grad = torch.ones(5)
    p.grad = sparse(np.array([1, 1]), np.ones((2, WIDTH), "float32"), p.shape)
    spoil(p)
    before = arrays([other, p])
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)\[1\].*({rule}).*Received: .+"):
        optimizer.step()
    assert_all_same_bits(arrays([other, p]), before)
    assert (other.grad == 1).all()


def test_rows_that_the_table_lacks() -> None:
    # torch does not validate indices of an unchecked sparse tensor. Run in a separate process:
    # writes to such rows could crash this one.
    code = """
        import torch
        from fusedadam.torch import Adam

        for row in (50, -1, 2**40, -(2**62)):
            p, q = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(50, 6))
            optimizer = Adam([p, q])
            p.grad = torch.ones(5)
            q.grad = torch.sparse_coo_tensor(
                torch.tensor([[3, row]]), torch.ones(2, 6), (50, 6), check_invariants=False
            )
            try:
                optimizer.step()
                print(row, "was not noticed", flush=True)
            except (ValueError, IndexError, RuntimeError) as e:
                if not (p == 1).all() or not (q == 1).all():
                    print(row, "was written", flush=True)
    """
    assert output_of(code) == ""
