# SPDX-License-Identifier: MIT
"""`fusedadam.torch.Adam` and `AdamW` beside torch's own, with every option and all state."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, running, values
from hypothesis import given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch")

import fusedadam.torch
from fusedadam.torch import Adam, AdamW, local
from torch_helpers import (
    DEFAULTS,
    KINDS,
    LARGE,
    SHAPES,
    STOCK,
    Twins,
    array,
    arrays,
    assert_everything_same_bits,
    everything,
    grads_like,
    leaves,
    set_grads,
    stepped,
    train,
)

STEPS = 300
ALL_AT_ONCE: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.8, 0.98),
    "eps": 1e-5,
    "weight_decay": 0.03,
    "amsgrad": True,
    "maximize": True,
}

Rows = dict[str, tuple[Any, dict[str, Any]]]
PARITY: Rows = {
    "Adam as it comes": (Adam, {}),
    "AdamW as it comes": (AdamW, {}),
    "lr 0, which still moves moments": (Adam, {"lr": 0.0}),
    "lr so small that most updates vanish": (Adam, {"lr": 1e-9}),
    "a large lr": (Adam, {"lr": 0.3}),
    "lr as a tensor": (Adam, {"lr": torch.tensor(0.01)}),
    "lr as a tensor of one element and of float64": (
        AdamW,
        {"lr": torch.tensor([0.01], dtype=torch.float64)},
    ),
    "no momentum": (Adam, {"betas": (0.0, 0.999)}),
    "no memory of squares": (Adam, {"betas": (0.9, 0.0)}),
    "neither": (AdamW, {"betas": (0.0, 0.0)}),
    "short memories": (Adam, {"betas": (0.5, 0.6)}),
    "long memories": (Adam, {"betas": (0.99, 0.99999)}),
    "momentum longer than the memory of squares": (Adam, {"betas": (0.95, 0.9)}),
    "eps 0": (Adam, {"eps": 0.0}),
    "eps among the gradients": (Adam, {"eps": 1e-3, "lr": 0.01}),
    "eps above all gradients": (Adam, {"eps": 1e3, "lr": 1.0}),
    "weight decay in the gradient": (Adam, {"weight_decay": 0.1}),
    "weight decay apart": (AdamW, {"weight_decay": 0.5, "lr": 0.01}),
    "weight decay apart, by the flag": (
        Adam,
        {"weight_decay": 0.5, "decoupled_weight_decay": True},
    ),
    "AdamW without decay": (AdamW, {"weight_decay": 0.0}),
    "a decay that reverses signs": (AdamW, {"weight_decay": 3.0, "lr": 0.5}),
    "amsgrad": (Adam, {"amsgrad": True, "betas": (0.9, 0.9)}),
    "amsgrad with decay apart": (AdamW, {"amsgrad": True, "betas": (0.9, 0.95)}),
    "amsgrad without eps": (Adam, {"amsgrad": True, "eps": 0.0, "betas": (0.8, 0.9)}),
    "ascent": (Adam, {"maximize": True}),
    "ascent with decay in the gradient": (Adam, {"maximize": True, "weight_decay": 0.1}),
    "ascent with decay apart": (AdamW, {"maximize": True, "weight_decay": 0.1}),
    "all at once": (Adam, ALL_AT_ONCE),
    "all at once, decay apart": (AdamW, ALL_AT_ONCE),
    "all at once, lr as a tensor": (AdamW, ALL_AT_ONCE | {"lr": torch.tensor(0.02)}),
}
SOME: Rows = {
    name: PARITY[name]
    for name in (
        "Adam as it comes",
        "AdamW as it comes",
        "eps among the gradients",
        "weight decay in the gradient",
        "amsgrad with decay apart",
        "all at once",
    )
}


@contextlib.contextmanager
def one_thread_for_torch() -> Iterator[None]:
    """Avoid waiting on a busy machine: torch's fused step spins on its threads at any size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- comparison with torch --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), PARITY.values(), ids=PARITY)
def test_300_steps(kind: Any, options: dict[str, Any], dtype: str) -> None:
    Twins(kind, dtype=dtype, **options).run(STEPS, every=25)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), SOME.values(), ids=SOME)
def test_300_steps_beside_fused(kind: Any, options: dict[str, Any], dtype: str) -> None:
    with one_thread_for_torch():
        Twins(kind, dtype=dtype, fused=True, **options).run(STEPS, every=25)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_parameters_large_enough_for_threads(fused: bool) -> None:
    Twins(AdamW, shapes=LARGE, fused=fused, amsgrad=True).run(40, every=10)


def wrong(name: str, value: Any) -> Callable[[Twins], None]:
    def change(both: Twins) -> None:
        group = both.optimizer.param_groups[0]
        group[name] = value(group[name]) if callable(value) else value

    return change


MISTAKES: dict[str, Callable[[Twins], Any]] = {
    "lr by a thousandth": wrong("lr", lambda lr: 1.001 * lr),
    "beta_1 by a thousandth of 1 - beta_1": wrong("betas", (0.9001, 0.999)),
    "beta_2 by a thousandth of 1 - beta_2": wrong("betas", (0.9, 0.999001)),
    "eps by a hundredth": wrong("eps", lambda eps: 1.01 * eps),
    "eps not corrected": lambda both: wrong(
        "eps", 1e-3 / math.sqrt(1 - 0.999 ** (1 + everything(both.optimizer)[0].get("step", 0)))
    )(both),
    "decay by a hundredth": wrong("weight_decay", lambda decay: 1.01 * decay),
    "decay in the other place": wrong("decoupled_weight_decay", lambda apart: not apart),
    "descent": wrong("maximize", True),
    "a step too many": lambda both: [s["step"].add_(1) for s in both.optimizer.state.values()],
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_seen(mistake: Callable[[Twins], Any], dtype: str) -> None:
    both = Twins(AdamW, dtype=dtype, eps=1e-3, weight_decay=0.3, lr=0.01)
    both.run(2)

    def go_on() -> None:
        for _ in range(20):
            mistake(both)
            both.run(1)

    with pytest.raises(AssertionError, match=r"times the bound|step"):
        go_on()


# Statistical margin of one sample of roundings: means over 3,000 elements, two orders of
# operations.
DRAW = 1.1


@pytest.mark.parametrize(("kind", "options"), SOME.values(), ids=SOME)
def test_error_of_float32_is_that_of_torch(kind: Any, options: dict[str, Any]) -> None:
    both = Twins(kind, shapes=[(3000,)], **options)
    exact = [torch.nn.Parameter(p.detach().double()) for p in both.ours]
    reference = STOCK[kind](exact, foreach=False, **options)
    for _ in range(STEPS):
        grads = both.grads()
        both.step(grads)
        set_grads(exact, [g.double() for g in grads])
        reference.step()

    bounds, (expected,) = both.drifts[0].bounds, everything(reference)
    ours, theirs = (
        {
            name: float(np.mean(np.abs(of[name] - expected[name]) / bounds[name]))
            for name in bounds.keys() & of
        }
        for (of,) in (everything(both.optimizer), everything(both.stock))
    )
    for name in ours.keys() - {"exp_avg", "param"}:
        assert ours[name] <= DRAW * theirs[name], name
    # beta_1 and 1 - beta_1 are rounded independently, which gives a constant m this relative error.
    # The bound of m is 2 ulp per side for each of the 1 / (1 - beta_1) steps that it remembers.
    beta_1 = options.get("betas", (0.9,))[0]
    off = sum(abs(float(np.float32(x)) - x) for x in (beta_1, 1 - beta_1)) / (1 - beta_1)
    assert ours["exp_avg"] <= DRAW * theirs["exp_avg"] + off * (1 - beta_1) / (4 * 2.0**-23)
    # Each update has that error as well, about 2e-7. It shows if updates are small beside p.
    assert ours["param"] <= 1.25 * theirs["param"]


@pytest.mark.parametrize("lr", [1e-3, 0.0])
def test_gradients_that_are_not_finite(lr: float) -> None:
    both = Twins(Adam, shapes=[(6,)], lr=lr)
    both.run(2)
    bad = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.0, -1.0])
    with np.errstate(all="ignore"):
        stepped(both.optimizer, [bad])
        stepped(both.stock, [bad])
    ours, theirs = everything(both.optimizer)[0], everything(both.stock)[0]
    for name, expected in theirs.items():
        assert np.array_equal(np.isfinite(ours[name]), np.isfinite(expected)), name
        assert np.array_equal(np.isnan(ours[name]), np.isnan(expected)), name


def test_zero_gradient_without_eps_is_nan_in_both() -> None:
    both = Twins(Adam, shapes=[(3,)], eps=0.0)
    both.step([torch.tensor([0.0, 1.0, 0.0])])
    both.check()
    assert np.isnan(array(both.ours[0])).tolist() == [True, False, True]


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradients_whose_squares_are_subnormal(eps: float) -> None:
    # (1 - beta_2) g * g is a subnormal float32 with at least 7 bits.
    both = Twins(Adam, shapes=[(50,)], eps=eps)
    for _ in range(20):
        g = (1 + torch.rand(50)) * 1e-19
        stepped(both.optimizer, [g])
        stepped(both.stock, [g])
    np.testing.assert_allclose(array(both.ours[0]), array(both.theirs[0]), rtol=1e-2, atol=1e-6)


def test_gradients_that_have_stopped() -> None:
    # The moments decay into the subnormal range and beyond.
    both = Twins(Adam, shapes=[(50,)])
    both.run(3)
    for _ in range(1_200):
        zero = [torch.zeros(50)]
        stepped(both.optimizer, zero)
        stepped(both.stock, zero)
        both.follow(zero)
    both.check()
    assert np.abs(array(both.optimizer.state[both.ours[0]]["exp_avg"])).max() < 1e-38


# -- bitwise equality with the oracle ---------------------------------------------------------


def oracle_of(kind: Any, params: list[Any], **options: Any) -> oracle.OracleAdam:
    o = DEFAULTS | ({"weight_decay": 1e-2} if kind is AdamW else {}) | options
    is_apart = kind is AdamW or o["decoupled_weight_decay"]
    return oracle.OracleAdam(
        arrays(params),
        lr=float(o["lr"]),
        beta_1=o["betas"][0],
        beta_2=o["betas"][1],
        amsgrad=o["amsgrad"],
        weight_decay=(o["weight_decay"] or None) if is_apart else None,
        l2=0.0 if is_apart else o["weight_decay"],
        maximize=o["maximize"],
        clipnorm=o.get("max_grad_norm"),
        use_ema=o.get("ema_decay") is not None,
        ema_momentum=o.get("ema_decay") or 0.0,
        zero_grad=o.get("zero_grad_in_step", False),
        flush_denormals=False,
    )


def oracle_step(reference: oracle.OracleAdam, grads: list[Any], eps: float) -> list[Array]:
    """Step the oracle with torch's epsilon and return the gradients as the step leaves them."""
    t = reference.iterations + 1
    reference.epsilon = eps * math.sqrt(1.0 - oracle.power(reference.beta_2, t))
    return reference.step(arrays(grads))


EXTRAS: dict[str, Any] = {"max_grad_norm": 0.5, "ema_decay": 0.9, "zero_grad_in_step": True}
TO_THE_BIT: Rows = {
    **PARITY,
    "extras": (Adam, EXTRAS),
    "extras and all at once": (AdamW, ALL_AT_ONCE | EXTRAS),
    "a norm that no gradient reaches": (Adam, {"max_grad_norm": 1e30}),
    "ema_decay 0": (Adam, {"ema_decay": 0.0}),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), TO_THE_BIT.values(), ids=TO_THE_BIT)
def test_bits_of_the_oracle(kind: Any, options: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(3)
    params = leaves(SHAPES, dtype)
    reference = oracle_of(kind, params, **options)
    optimizer = kind(params, **copy.deepcopy(options))
    for _ in range(12):
        grads = grads_like(rng, params, zeros=options.get("eps") != 0)
        left = oracle_step(reference, grads, options.get("eps", 1e-8))
        stepped(optimizer, grads)
        assert_all_same_bits([array(p.grad) for p in params], left)
    names = {"param": "params", "exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vhat"}
    for i, state in enumerate(everything(optimizer)):
        assert state.pop("step") == 12
        for name, a in state.items():
            expected = getattr(reference, names.get(name, name))[i]
            assert_same_bits(a, expected, f"{name} of parameter {i}")


@pytest.mark.parametrize("options", [{}, ALL_AT_ONCE | EXTRAS], ids=["plain", "extras"])
def test_bits_do_not_depend_on_threads(options: dict[str, Any]) -> None:
    results = []
    for count in (1, 2, 3):
        with running(threads=count):
            optimizer = AdamW(leaves(LARGE), **options)
            train(optimizer, 5)
            results.append(everything(optimizer))
    for other in results[1:]:
        assert_everything_same_bits(other, results[0])


def test_bits_do_not_depend_on_the_instruction_set(isa: str) -> None:
    optimizer, native = AdamW(leaves(LARGE), **EXTRAS), AdamW(leaves(LARGE), **EXTRAS)
    train(optimizer, 3)
    with running(isa="baseline"):
        train(native, 3)
    assert_everything_same_bits(everything(optimizer), everything(native), isa)


# -- arguments --------------------------------------------------------------------------------


POSITIONAL = ["params", "lr", "betas", "eps", "weight_decay", "amsgrad"]


def test_signatures() -> None:
    extras = ["max_grad_norm", "ema_decay", "zero_grad_in_step"]
    for kind, stock in STOCK.items():
        ours, theirs = (inspect.signature(k).parameters for k in (kind, stock))
        # Arguments added after torch 2.6 are passed on by keyword.
        is_open = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in ours.values())
        for name, parameter in theirs.items():
            if name not in ours and is_open and parameter.kind == inspect.Parameter.KEYWORD_ONLY:
                continue
            assert ours[name].default == parameter.default, name
            assert ours[name].kind == parameter.kind, name
        assert list(ours)[: len(POSITIONAL)] == list(theirs)[: len(POSITIONAL)] == POSITIONAL
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            kind(leaves(), learning_rate=0.1)
        assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in extras)
        assert issubclass(kind, stock)
        assert kind.__name__ == stock.__name__


ARGUMENTS: dict[str, dict[str, Any]] = {
    "lr below 0": {"lr": -0.1},
    "lr of two elements": {"lr": torch.tensor([0.1, 0.2])},
    "lr NaN": {"lr": math.nan},
    "lr an integer": {"lr": 1},
    "lr of NumPy": {"lr": np.float32(0.01)},
    "eps below 0": {"eps": -1e-8},
    "eps NaN": {"eps": math.nan},
    "eps of NumPy": {"eps": np.float64(1e-7)},
    "beta_1 of 1": {"betas": (1.0, 0.999)},
    "beta_1 below 0": {"betas": (-0.1, 0.999)},
    "beta_2 of 1": {"betas": (0.9, 1.0)},
    "beta_2 NaN": {"betas": (0.9, math.nan)},
    "betas as integers": {"betas": (0, 0)},
    "betas as a list": {"betas": [0.8, 0.9]},
    "betas as tensors": {"betas": (torch.tensor(0.75), torch.tensor(0.875))},
    "betas as tensors of one element": {"betas": (torch.tensor([0.75]), torch.tensor([0.875]))},
    "betas of two kinds": {"betas": (0.9, torch.tensor(0.999))},
    "betas as tensors of two elements": {"betas": (torch.ones(2) / 2, torch.ones(2) / 2)},
    "weight_decay below 0": {"weight_decay": -1.0},
    "weight_decay an integer": {"weight_decay": 1},
    "lr as a tensor, foreach": {"lr": torch.tensor(0.1), "foreach": True},
    "betas as tensors, foreach": {"betas": (torch.tensor(0.5),) * 2, "foreach": True},
    "lr as a tensor, fused": {"lr": torch.tensor(0.1), "fused": True},
    "fused and foreach": {"fused": True, "foreach": True},
    "flags as integers": {"amsgrad": 1, "maximize": 0},
}


def outcome(make: Callable[[], Any]) -> tuple[Any, str]:
    """The result of `make`, or the exception that it raises with its message."""
    try:
        return make(), ""
    except Exception as e:  # noqa: BLE001 - torch may raise anything
        return type(e), str(e)


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_judged_as_by_torch(kind: Any, arguments: dict[str, Any]) -> None:
    grads = [torch.ones(17, 5) / 3]
    ours, message = outcome(lambda: kind(leaves([(17, 5)]), **copy.deepcopy(arguments)))
    theirs, expected = outcome(lambda: STOCK[kind](leaves([(17, 5)]), **copy.deepcopy(arguments)))
    assert message == expected
    if expected:
        assert ours is theirs
        return
    keys = set(theirs.param_groups[0]) - {"params"}
    assert {k: ours.param_groups[0][k] for k in keys} == {
        k: theirs.param_groups[0][k] for k in keys
    }
    for _ in range(2):
        stepped(ours, grads)
        stepped(theirs, grads)
    ours, theirs = everything(ours)[0], everything(theirs)[0]
    for name, a in theirs.items():
        # Two steps with about ten roundings each.
        np.testing.assert_allclose(ours[name], a, rtol=1e-5, atol=1e-7, err_msg=name)


BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "no parameters": list,
    "a tensor": lambda: torch.ones(3),
    "arrays": lambda: [np.ones(3)],
    "no leaf": lambda: [torch.ones(3, requires_grad=True) * 2],
    "a group without params": lambda: [{"lr": 0.1}],
    "one parameter in two groups": lambda: [{"params": leaves([(3,)])}] * 2,
    "a set": lambda: [{"params": {torch.ones(3, requires_grad=True)}}],
}


@pytest.mark.parametrize("make", BAD_PARAMS.values(), ids=BAD_PARAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_judged_as_by_torch(kind: Any, make: Callable[[], Any]) -> None:
    error, expected = outcome(lambda: STOCK[kind](make()))
    assert expected
    ours, message = outcome(lambda: kind(make()))
    assert ours is error
    if "0x" not in expected:
        assert message == expected


@pytest.mark.parametrize("kind", KINDS)
def test_refused_by_name(kind: Any) -> None:
    name = "differentiable"
    pattern = rf"(?s){name}.*Received: .*True"
    with pytest.raises(ValueError, match=pattern):
        kind(leaves(), **{name: True})
    with pytest.raises(ValueError, match=pattern):
        kind([{"params": leaves(), name: True}])
    optimizer = kind(leaves())
    with pytest.raises(ValueError, match=pattern):
        optimizer.add_param_group({"params": leaves(seed=1), name: True})
    assert len(optimizer.param_groups) == 1
    twin = kind(leaves())
    train(optimizer, 3)
    train(twin, 3)
    assert_everything_same_bits(everything(optimizer), everything(twin))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"fused": False},
        {"capturable": True},
    ],
    ids=str,
)
def test_ways_of_torch_change_no_result(kind: Any, how: dict[str, Any]) -> None:
    plain, other = kind(leaves()), kind(leaves(), **how)
    train(plain, 3)
    train(other, 3)
    assert_everything_same_bits(everything(other), everything(plain))
    assert {k: other.param_groups[0][k] for k in how} == how


BAD_EXTRAS: list[tuple[str, Any, type[Exception]]] = [
    ("max_grad_norm", -1.0, ValueError),
    ("max_grad_norm", math.nan, ValueError),
    ("max_grad_norm", "1", TypeError),
    ("ema_decay", -0.1, ValueError),
    ("ema_decay", 1.5, ValueError),
    ("ema_decay", math.nan, ValueError),
    ("ema_decay", "0.9", TypeError),
    *((name, True, TypeError) for name in ("max_grad_norm", "ema_decay", "eps", "weight_decay")),
    ("max_grad_norm", np.bool_(True), TypeError),
    ("max_grad_norm", torch.tensor(True), TypeError),
    ("lr", True, TypeError),
    ("zero_grad_in_step", "no", ValueError),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value", "error"), BAD_EXTRAS)
def test_extras_are_judged(kind: Any, name: str, value: Any, error: type[Exception]) -> None:
    pattern = rf"(?s){name}.*Received: .+"
    with pytest.raises(error, match=pattern):
        kind(leaves(), **{name: value})
    optimizer = kind(leaves())
    with pytest.raises(error, match=pattern):
        optimizer.add_param_group({"params": leaves(seed=1), name: value})
    assert len(optimizer.param_groups) == 1


# -- groups -----------------------------------------------------------------------------------

settings_of_groups = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.0, 1e-3, 0.1, torch.tensor(0.05)]),
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.5), (0.9, 0.0)]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "ema_decay": st.sampled_from([None, 0.5, 0.99]),
        "zero_grad_in_step": st.booleans(),
    },
)


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.lists(settings_of_groups, min_size=1, max_size=4),
    st.sampled_from(FLOATS),
)
def test_groups_are_separate_optimizers(
    kind: Any, groups: list[dict[str, Any]], dtype: str
) -> None:
    sets = [leaves([(3, 4), (5,)], dtype, seed=i) for i in range(len(groups))]
    together = kind(
        [
            {"params": p, **copy.deepcopy(g)}
            for p, g in zip(copy.deepcopy(sets), groups, strict=True)
        ]
    )
    alone = [kind([{"params": p, **g}]) for p, g in zip(sets, groups, strict=True)]
    rng = np.random.default_rng(0)
    for _ in range(4):
        grads = grads_like(rng, [p for params in sets for p in params])
        stepped(together, grads)
        for i, optimizer in enumerate(alone):
            stepped(optimizer, grads[2 * i : 2 * i + 2])
    expected = [state for optimizer in alone for state in everything(optimizer)]
    assert_everything_same_bits(everything(together), expected)
    left = [p.grad for optimizer in alone for p in optimizer.param_groups[0]["params"]]
    params = [p for group in together.param_groups for p in group["params"]]
    assert_all_same_bits([array(p.grad) for p in params], arrays(left))


@settings(max_examples=20)
@given(st.lists(settings_of_groups, min_size=2, max_size=4))
def test_settings_changed_between_steps(changes: list[dict[str, Any]]) -> None:
    changes = [{k: v for k, v in c.items() if k in DEFAULTS and k != "amsgrad"} for c in changes]
    both = Twins(Adam)
    for change in changes:
        both.optimizer.param_groups[0].update(copy.deepcopy(change))
        both.stock.param_groups[0].update(copy.deepcopy(change))
        both.run(2)


def test_lr_that_is_a_tensor_and_changes_in_place() -> None:
    lr = torch.tensor(0.1)
    optimizer, twin = Adam(leaves(), lr=lr), Adam(leaves(), lr=0.1)
    for factor in (0.5, 0.25, 2.0):
        train(optimizer, 1)
        train(twin, 1)
        assert optimizer.param_groups[0]["lr"] is lr
        lr.mul_(factor)
        twin.param_groups[0]["lr"] = lr.item()
    first = AdamW(leaves(), lr=0.1)
    assert first.param_groups[0]["lr"] == 0.1
    train(optimizer, 2)
    train(twin, 2)
    # float32(0.1) is not 0.1. Only the first step may differ, by one rounding.
    for a, b in zip(everything(optimizer), everything(twin), strict=True):
        np.testing.assert_allclose(a["param"], b["param"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "value", [-0.05, 0, 7, np.float32(0.01), np.float64(0.01), np.array(0.01), torch.tensor([0.01])]
)
def test_lr_set_by_hand(value: Any) -> None:
    # torch checks lr only in the constructor, and some schedulers end slightly below zero.
    both = Twins(Adam)
    both.run(2)
    for optimizer in (both.optimizer, both.stock):
        optimizer.param_groups[0]["lr"] = copy.deepcopy(value)
    for _ in range(2):
        both.step()
        for ours, theirs in zip(both.ours, both.theirs, strict=True):
            # Four steps with about ten roundings each.
            np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-5, atol=1e-6)


def test_amsgrad_switched_on_later() -> None:
    optimizer = Adam(leaves())
    train(optimizer, 2)
    before = everything(optimizer)
    optimizer.param_groups[0]["amsgrad"] = True
    theirs = torch.optim.Adam(leaves())
    train(theirs, 2)
    theirs.param_groups[0]["amsgrad"] = True
    # torch has no maximum to continue from and raises KeyError in the middle of its step.
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        train(theirs, 1)
    _, message = outcome(lambda: train(optimizer, 1))
    if message:
        assert "max_exp_avg_sq" in message
        assert_everything_same_bits(everything(optimizer), before)
    else:
        assert all("max_exp_avg_sq" in state for state in everything(optimizer))


def test_group_added_in_the_middle() -> None:
    both = Twins(AdamW, shapes=[(4, 3), (5,)], weight_decay=0.1)
    both.run(3)
    late = Twins(AdamW, shapes=[(6,), ()], seed=20, lr=0.05, amsgrad=True)
    for optimizer, params in ((both.optimizer, late.ours), (both.stock, late.theirs)):
        optimizer.add_param_group({"params": params, "lr": 0.05, "amsgrad": True})
    both.ours += late.ours
    both.theirs += late.theirs
    both.start += late.start
    both.drifts += late.drifts
    both.run(5)
    assert [int(s["step"]) for s in everything(both.optimizer)] == [8, 8, 5, 5]
    assert both.optimizer.param_groups[1]["weight_decay"] == 0.1


def test_group_added_gets_the_extras() -> None:
    optimizer = Adam(leaves(), max_grad_norm=2.0, ema_decay=0.9, zero_grad_in_step=True)
    optimizer.add_param_group({"params": leaves(seed=1), "ema_decay": 0.5})
    group = optimizer.param_groups[1]
    assert (group["max_grad_norm"], group["ema_decay"], group["zero_grad_in_step"]) == (
        2.0,
        0.5,
        True,
    )
    assert {"max_grad_norm", "ema_decay", "zero_grad_in_step"} <= set(optimizer.defaults)


def test_named_parameters() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_mixed_dtypes_in_one_group() -> None:
    singles, doubles = leaves(SHAPES), leaves(SHAPES, "float64", seed=9)
    together, alone = (
        Adam([*singles, *doubles]),
        [Adam(leaves(SHAPES)), Adam(leaves(SHAPES, "float64", seed=9))],
    )
    rng = np.random.default_rng(1)
    for _ in range(3):
        grads = grads_like(rng, [*singles, *doubles])
        stepped(together, grads)
        stepped(alone[0], grads[: len(SHAPES)])
        stepped(alone[1], grads[len(SHAPES) :])
    assert_everything_same_bits(everything(together), everything(alone[0]) + everything(alone[1]))


# -- missing gradients ------------------------------------------------------------------------


def test_parameters_without_a_gradient_keep_their_own_count(rng: np.random.Generator) -> None:
    both = Twins(AdamW, shapes=[(3, 4), (7,), (), (50,)])
    for _ in range(30):
        grads = [g if rng.random() < 0.6 else None for g in both.grads()]
        both.step(grads)
        both.check()
    steps = [int(s["step"]) for s in everything(both.optimizer)]
    assert len(set(steps)) > 1
    assert all(0 < s < 30 for s in steps)


def test_bits_of_parameters_whose_counts_differ() -> None:
    # Each parameter has its own bias corrections, as if it were alone.
    params = leaves([(9,), (9,), (9,)])
    together = Adam(params)
    alone = [Adam([p]) for p in copy.deepcopy(params)]
    rng = np.random.default_rng(0)
    for i in range(9):
        grads = [
            g if (i >> k) & 1 or k == 2 else None for k, g in enumerate(grads_like(rng, params))
        ]
        stepped(together, grads)
        for optimizer, g in zip(alone, grads, strict=True):
            stepped(optimizer, [g])
    assert_everything_same_bits(everything(together), [everything(a)[0] for a in alone])


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_at_all(kind: Any) -> None:
    optimizer = kind(leaves())
    before = everything(optimizer)
    assert optimizer.step() is None
    assert_everything_same_bits(everything(optimizer), before)
    assert optimizer.state_dict()["state"] == {}


def test_frozen_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    frozen = arrays(model[0].parameters())
    optimizer = AdamW(model.parameters(), weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert_all_same_bits(arrays(model[0].parameters()), frozen)
    assert len(optimizer.state) == 2
    model[0].requires_grad_(True)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 1, 4, 4]


# -- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("default", "fused"), [("float32", None), ("float32", True), ("float64", None)]
)
def test_state_as_torch_makes_it(default: str, fused: bool | None) -> None:
    torch.set_default_dtype(getattr(torch, default))
    try:
        ours, theirs = (k(leaves(), amsgrad=True, fused=fused) for k in (Adam, torch.optim.Adam))
        train(ours, 1)
        train(theirs, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert list(a) == list(b)
        for name in b:
            assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
            assert a[name].stride() == b[name].stride(), name
            assert not a[name].requires_grad


def test_state_stays_where_it_is() -> None:
    # ZeroRedundancyOptimizer and torch.distributed's checkpoints keep references to these tensors.
    optimizer = AdamW(leaves(), amsgrad=True, ema_decay=0.9)
    train(optimizer, 1)
    held = {p: dict(s) for p, s in optimizer.state.items()}
    addresses = {p: p.data_ptr() for p in held}
    train(optimizer, 3)
    for p, state in held.items():
        assert all(optimizer.state[p][name] is t for name, t in state.items())
        assert p.data_ptr() == addresses[p]
        assert state["step"].item() == 4


@pytest.mark.parametrize("count", [10, 1_000_000, 2**24 - 1, 2**24])
def test_far_into_a_training(count: int) -> None:
    # A float32 counter stops at 2**24.
    both = Twins(Adam)
    both.run(1)
    for optimizer in (both.optimizer, both.stock):
        for state in optimizer.state.values():
            state["step"].fill_(count)
    both.run(3)
    assert everything(both.optimizer)[0]["step"] == min(count + 3, 2**24)


# -- closures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", ["enable_grad", "no_grad"])
def test_closure(kind: Any, outside: str) -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    twin = copy.deepcopy(p)
    optimizer, direct = kind([p], lr=0.1), kind([twin], lr=0.1)
    seen = []

    def closure() -> Any:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        expected = (twin**2).sum()
        direct.zero_grad()
        expected.backward()
        direct.step()
        with getattr(torch, outside)():
            loss = optimizer.step(closure)
            assert torch.is_grad_enabled() == (outside == "enable_grad")
        assert loss.item() == expected.item()
        assert loss.requires_grad
    assert seen == [True] * 3
    assert_same_bits(array(p), array(twin))
    assert optimizer.step(closure=lambda: 3.5) == 3.5


def test_closure_that_raises_changes_nothing() -> None:
    optimizer = Adam(leaves())
    train(optimizer, 2)
    before = everything(optimizer)

    def closure() -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert_everything_same_bits(everything(optimizer), before)


def test_step_turns_recording_off() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([p], amsgrad=True, ema_decay=0.5)
    (grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    p.grad = grad
    optimizer.step()
    assert p.is_leaf
    assert p.grad_fn is None
    assert not any(t.requires_grad for t in optimizer.state[p].values())


# -- all or nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twice",
    [lambda p: [p, p], lambda p: iter([("a", p), ("b", p)])],
    ids=["plain", "of an iterator, with names"],
)
def test_parameter_twice_in_a_group_is_refused_when_added(twice: Callable[[Any], Any]) -> None:
    (p,) = leaves([(3,)])
    with pytest.raises(ValueError, match=r"once.*Received: params\[0\] again as params\[1\]"):
        Adam(twice(p))
    optimizer = Adam(leaves([(2,)]))
    with pytest.raises(ValueError, match="once"):
        optimizer.add_param_group({"params": twice(p)})
    assert len(optimizer.param_groups) == 1
    train(optimizer, 1)


def test_group_with_a_misspelt_extra_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Did you mean 'ema_decay'\? Received: ema_deacy=0.9"):
        Adam([{"params": leaves(), "ema_deacy": 0.9}])
    # Entries that torch and others keep in groups are left alone.
    Adam([{"params": leaves(), "initial_lr": 1.0, "name": "body", "lr_scale": 0.5}])


@pytest.mark.parametrize("attached", [False, True])
def test_errors_have_the_names_of_parameters(attached: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizer = Adam(model.named_parameters())
    if attached:
        fusedadam.torch.attach(model, optimizer)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    optimizer.state[model[1].bias]["exp_avg"] = torch.ones(5)
    loss = model(torch.ones(3)).sum()
    if not attached:
        loss.backward()
    with pytest.raises(ValueError, match=r"^exp_avg\[[03]\] \('1\.bias'\) must .*Received: "):
        (loss.backward if attached else optimizer.step)()


def test_error_of_a_number_of_the_users_own_is_passed_on() -> None:
    class Number:
        is_new = True

        def __float__(self) -> float:
            if self.is_new:
                self.is_new = False
                raise ValueError("not now")
            return 0.5

    optimizer = Adam(leaves([(3,)]))
    train(optimizer, 1)
    optimizer.param_groups[0]["lr"] = Number()
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"^not now$"):
        optimizer.step()
    assert_everything_same_bits(everything(optimizer), before)


def test_error_of_a_setting_names_the_group() -> None:
    # A scheduler may leave such a value: torch does not check again.
    params = leaves([(3,), (4,)])
    optimizer = Adam([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[1]["betas"] = (0.9, 1.0)
    with pytest.raises(ValueError, match=r"betas\[1\] .*Received: .*1\.0 in param_groups\[1\]"):
        train(optimizer, 1)
    assert not optimizer.state


def bad_state(name: str, make: Callable[[Any], Any]) -> Callable[[Any, list[Any]], None]:
    def spoil(optimizer: Any, params: list[Any]) -> None:
        optimizer.state[params[-1]][name] = make(optimizer.state[params[-1]][name])

    return spoil


def two_sparse_dimensions(_: Any, params: list[Any]) -> None:
    params[-1].grad = torch.eye(5).to_sparse()


BAD_STEPS: dict[str, tuple[Callable[[Any, list[Any]], None], str]] = {
    "gradient sparse in two dimensions": (two_sparse_dimensions, "sparse"),
    "moment of another shape": (bad_state("exp_avg", lambda t: t[:3]), "shape"),
    "moment of another dtype": (bad_state("exp_avg_sq", lambda t: t.double()), "dtype"),
    "moment elsewhere": (bad_state("exp_avg_sq", lambda t: t.to("meta")), "CPU"),
    "moment that is the parameter": (
        lambda o, p: o.state[p[-1]].update(exp_avg=p[-1].data),
        "overlap",
    ),
    "moment of another parameter": (
        lambda o, p: o.state[p[-1]].update(exp_avg=o.state[p[0]]["exp_avg"]),
        "overlap",
    ),
    "count below 0": (bad_state("step", lambda _: torch.tensor(-1.0)), "step"),
    "count NaN": (bad_state("step", lambda _: torch.tensor(math.nan)), "step"),
    "count of another parameter": (
        lambda o, p: o.state[p[-1]].update(step=o.state[p[0]]["step"]),
        "overlap",
    ),
    "count in the memory of the parameter": (
        lambda o, p: o.state[p[-1]]["step"].set_(p[-1].detach().view(-1)[0]),
        "overlap",
    ),
    "no second moment": (lambda o, p: o.state[p[-1]].pop("exp_avg_sq"), "exp_avg_sq"),
    "beta_1 of 1": (lambda o, _: o.param_groups[-1].update(betas=(1.0, 0.9)), "beta"),
    "weight_decay NaN": (
        lambda o, _: o.param_groups[-1].update(weight_decay=math.nan),
        "weight_decay",
    ),
    "weight_decay in the gradient below 0": (
        lambda o, _: o.param_groups[-1].update(weight_decay=-1.0, decoupled_weight_decay=False),
        "weight_decay",
    ),
    "eps below 0": (lambda o, _: o.param_groups[-1].update(eps=-1.0), "eps"),
    "lr NaN": (lambda o, _: o.param_groups[-1].update(lr=math.nan), "lr"),
    "lr a string": (lambda o, _: o.param_groups[-1].update(lr="high"), "lr|string"),
    "max_grad_norm below 0": (
        lambda o, _: o.param_groups[-1].update(max_grad_norm=-1.0),
        "max_grad_norm",
    ),
}


@pytest.mark.parametrize(("spoil", "word"), BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize("size", [5, 41_003])
def test_error_leaves_everything_as_it_was(
    spoil: Callable[[Any, list[Any]], None], word: str, size: int
) -> None:
    params = leaves([(5, 5), (size,), (5, 5)])
    optimizer = AdamW(
        [{"params": params[:1]}, {"params": params[1:]}], ema_decay=0.9, zero_grad_in_step=True
    )
    train(optimizer, 2)
    set_grads(params, [torch.ones_like(p) for p in params])
    kept = copy.deepcopy(optimizer.state_dict())
    before = arrays(params)
    spoil(optimizer, params)
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError), match=rf"(?s){word}"):
        optimizer.step()
    assert_all_same_bits(arrays(params), before)
    assert all((p.grad == 1).all() for p in params[:2])
    counts = [optimizer.state[p]["step"].item() for p in params[:2]]
    assert counts == [2, 2]
    # After the group is restored, training continues as if nothing had happened.
    optimizer.load_state_dict(kept)
    optimizer.param_groups[-1].pop("max_grad_norm", None)  # if off, no checkpoint has it
    twin = AdamW(
        [{"params": (q := leaves([(5, 5), (size,), (5, 5)]))[:1]}, {"params": q[1:]}],
        ema_decay=0.9,
        zero_grad_in_step=True,
    )
    train(twin, 2)
    train(optimizer, 1, seed=8)
    train(twin, 1, seed=8)
    assert_everything_same_bits(everything(optimizer), everything(twin))


def test_error_in_the_first_step() -> None:
    params = leaves([(3,), (5, 5)])
    optimizer, twin = Adam(params), Adam(leaves([(3,), (5, 5)]))
    set_grads(params, [torch.ones(3), torch.eye(5).to_sparse()])
    before = arrays(params)
    with pytest.raises((ValueError, RuntimeError), match=r"\[1\].*Received: .+"):
        optimizer.step()
    assert_all_same_bits(arrays(params), before)
    train(optimizer, 2)
    train(twin, 2)
    assert_everything_same_bits(everything(optimizer), everything(twin))


# -- complex numbers --------------------------------------------------------------------------

COMPLEX_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad, decay, ascent": {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
}
COMPLEX_SHAPES: list[tuple[int, ...]] = [(5, 3), (), (0, 2), (41_003,)]


def complex_leaves(dtype: str) -> list[Any]:
    rng = np.random.default_rng(3)
    parts = [(values(rng, s, dtype), values(rng, s, dtype)) for s in COMPLEX_SHAPES]
    return [torch.nn.Parameter(torch.complex(*(torch.tensor(x) for x in pair))) for pair in parts]


def as_reals(t: Any) -> Any:
    return torch.view_as_real(t.detach().resolve_conj())


@pytest.mark.parametrize("options", COMPLEX_OPTIONS.values(), ids=COMPLEX_OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_complex_parameters_are_stepped_as_pairs_of_reals(
    kind: Any, dtype: str, options: dict[str, Any]
) -> None:
    extras: dict[str, Any] = {"ema_decay": 0.9, "max_grad_norm": 0.5, "zero_grad_in_step": True}
    params, theirs = complex_leaves(dtype), complex_leaves(dtype)
    reals = [torch.nn.Parameter(as_reals(p).clone()) for p in params]
    plain = kind([p.detach().clone().requires_grad_() for p in params], **options)
    optimizer, reference = kind(params, **options, **extras), kind(reals, **options, **extras)
    alone = kind([torch.nn.Parameter(as_reals(p).clone()) for p in params], **options)
    stock = STOCK[kind](theirs, **options)
    rng = np.random.default_rng(4)
    for i in range(5):
        of_reals = grads_like(rng, reals)
        grads = [torch.complex(g[..., 0], g[..., 1]) for g in of_reals]
        # Gradients as autograd leaves them: lazily conjugated and in other layouts.
        lazy = [g.conj().resolve_conj().conj() if i % 2 else g.clone() for g in grads]
        set_grads(reals, of_reals)
        for p, g in zip(params, lazy, strict=True):
            p.grad = g.detach()
        optimizer.step()
        reference.step()
        assert all(not array(p.grad).any() for p in params)
        for of in (plain, stock):
            set_grads(of.param_groups[0]["params"], grads)
            of.step()
        stepped(alone, of_reals)
    for of, expected in ((optimizer, reference), (plain, alone)):
        for (p, state), (q, other) in zip(of.state.items(), expected.state.items(), strict=True):
            assert_same_bits(array(as_reals(p)), array(q))
            assert list(state) == list(other)
            for name, t in state.items():
                if name != "step":
                    assert (t.dtype, t.shape, t.stride()) == (p.dtype, p.shape, p.stride())
                    assert_same_bits(array(as_reals(t)), array(other[name]), name)
    for a, b in zip(everything(plain), everything(stock), strict=True):
        assert list(a) == list(b)
        for name, expected in b.items():
            assert a[name].dtype == expected.dtype
            # Five steps with about ten roundings each.
            rtol = 100 * np.finfo(expected.dtype).eps
            np.testing.assert_allclose(a[name], expected, rtol=rtol, atol=rtol, err_msg=name)
    # Averages, and checkpoints in both directions.
    before = everything(optimizer)
    optimizer.swap_ema()
    assert_same_bits(everything(optimizer)[0]["param"], before[0]["ema"])
    optimizer.swap_ema()
    stock.load_state_dict(copy.deepcopy(plain.state_dict()))
    plain.load_state_dict(copy.deepcopy(stock.state_dict()))
    for of in (plain, stock):
        set_grads(of.param_groups[0]["params"], grads)
        of.step()


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda p, _: setattr(p, "data", p.data.conj()), r"params\[0\] must .*conjugated"),
        (lambda p, o: o.state[p].update(exp_avg=torch.ones(3, 2)), r"exp_avg\[0\] must .*dtype"),
        (lambda p, _: setattr(p, "grad", torch.ones(3, dtype=p.dtype).to_sparse()), "complex"),
    ],
    ids=["conjugated", "real moment", "sparse"],
)
def test_complex_parameter_is_refused(spoil: Callable[[Any, Any], Any], rule: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64) * (1 + 2j))
    optimizer = Adam([p])
    stepped(optimizer, [torch.ones(3, dtype=torch.complex64)])
    before = p.data.clone()
    p.grad = torch.ones(3, dtype=torch.complex64)
    spoil(p, optimizer)
    with pytest.raises(ValueError, match=rf"(?s){rule}.*Received: .+"):
        optimizer.step()
    assert torch.equal(p.data.conj().resolve_conj() if p.is_conj() else p.data, before)


def test_parameter_still_to_be_negated_is_refused() -> None:
    p = torch.nn.Parameter(torch.tensor([1 + 2j]).conj().imag)
    with pytest.raises(ValueError, match=r"params\[0\] must not be a negated view.*Received: .+"):
        stepped(Adam([p]), [torch.ones(1)])


# -- max_grad_norm ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), SOME.values(), ids=SOME)
def test_max_grad_norm_beside_clip_grad_norm(
    kind: Any, options: dict[str, Any], dtype: str
) -> None:
    both = Twins(kind, dtype=dtype, ours_only={"max_grad_norm": 0.7}, **options)
    for count in range(60):
        grads = both.grads()
        if count % 3 == 0:
            grads = [g * 1e-4 for g in grads]  # below the bound, so not clipped
        set_grads(both.ours, grads)
        set_grads(both.theirs, grads)
        norm = float(torch.nn.utils.clip_grad_norm_(both.theirs, 0.7))
        both.optimizer.step()
        both.stock.step()
        # torch divides by norm + 1e-6, in the gradients' precision.
        error = 1e-6 / norm + 8 * float(np.finfo(dtype).eps) if norm > 0.7 else 0.0
        both.follow([p.grad for p in both.theirs], grad_error=error)
        both.check(f"step {count},")
        # A gradient is only read.
        assert_all_same_bits(arrays(p.grad for p in both.ours), arrays(grads))


def test_max_grad_norm_is_of_all_groups() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in "pq")
    optimizer = Adam([{"params": [p]}, {"params": [q]}], max_grad_norm=1.0)
    stepped(optimizer, [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])])
    moments = [optimizer.state[x]["exp_avg"] for x in (p, q)]
    np.testing.assert_allclose(array(moments[0]), [0.06, 0.0], rtol=1e-6)
    np.testing.assert_allclose(array(moments[1]), [0.0, 0.08], rtol=1e-6)


def test_max_grad_norm_of_one_group_alone() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in "pq")
    optimizer = Adam([{"params": [p], "max_grad_norm": 1.0}, {"params": [q]}])
    stepped(optimizer, [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])])
    moments = [optimizer.state[x]["exp_avg"] for x in (p, q)]
    # The norm still covers all gradients of the step.
    np.testing.assert_allclose(array(moments[0]), [0.06, 0.0], rtol=1e-6)
    np.testing.assert_allclose(array(moments[1]), [0.0, 0.4], rtol=1e-6)


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_max_grad_norm_off(off: float | None) -> None:
    plain, other = Adam(leaves()), Adam(leaves(), max_grad_norm=off)
    train(plain, 2)
    train(other, 2)
    assert_everything_same_bits(everything(other), everything(plain))


def test_max_grad_norm_counts_only_gradients_that_are_there() -> None:
    params = leaves([(4,), (4,)])
    optimizer, alone = Adam(params, max_grad_norm=1e-3), Adam(leaves([(4,)]), max_grad_norm=1e-3)
    for _ in range(2):
        g = torch.arange(4.0)
        stepped(optimizer, [g, None])
        stepped(alone, [g])
    assert_everything_same_bits(everything(optimizer)[:1], everything(alone))


# -- averages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_ema_beside_averaged_model(decay: float, dtype: str) -> None:
    swa = torch.optim.swa_utils
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model.to(getattr(torch, dtype))
    averaged = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(decay))
    optimizer = AdamW(model.parameters(), lr=0.05, ema_decay=decay)
    for _ in range(60):
        train(optimizer, 1)
        averaged.update_parameters(model)
    eps = float(np.finfo(dtype).eps)
    for p, average in zip(model.parameters(), averaged.module.parameters(), strict=True):
        # Four roundings per step and side. The decay shrinks the earlier ones.
        np.testing.assert_allclose(
            array(optimizer.state[p]["ema"]), array(average), rtol=0, atol=8 * eps * 4 / (1 - decay)
        )
        assert decay == 0 or not np.array_equal(array(p), array(average))


def test_ema_changes_nothing_else() -> None:
    plain, other = Adam(leaves()), Adam(leaves(), ema_decay=0.9)
    train(plain, 3)
    train(other, 3)
    rest = [{k: v for k, v in s.items() if k != "ema"} for s in everything(other)]
    assert_everything_same_bits(rest, everything(plain))


def test_ema_of_a_parameter_that_comes_late() -> None:
    params = leaves([(3,), (3,)])
    optimizer = Adam(params, lr=0.1, ema_decay=0.9)
    for _ in range(3):
        stepped(optimizer, [torch.ones(3), None])
    stepped(optimizer, [torch.ones(3), torch.ones(3)])
    # At a parameter's own first step, the average is the parameter.
    assert_same_bits(array(optimizer.state[params[1]]["ema"]), array(params[1]))
    assert not np.array_equal(array(optimizer.state[params[0]]["ema"]), array(params[0]))


def test_swap_ema() -> None:
    optimizer, twin = (Adam(leaves(), lr=0.1, ema_decay=0.9) for _ in range(2))
    train(optimizer, 3)
    train(twin, 3)
    params = optimizer.param_groups[0]["params"]
    addresses = [p.data_ptr() for p in params]
    before = everything(optimizer)
    versions = [p._version for p in params]
    optimizer.swap_ema()
    for state, old in zip(everything(optimizer), before, strict=True):
        assert_same_bits(state["param"], old["ema"])
        assert_same_bits(state["ema"], old["param"])
        assert_same_bits(state["exp_avg"], old["exp_avg"])
    # As for any in-place change, a graph that saved the old values must not use the new ones.
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    optimizer.swap_ema()
    assert_everything_same_bits(everything(optimizer), before)
    assert [p.data_ptr() for p in params] == addresses
    train(optimizer, 2)
    train(twin, 2)
    assert_everything_same_bits(everything(optimizer), everything(twin))


def test_swap_ema_without_averages_is_refused() -> None:
    optimizer = Adam(leaves())
    with pytest.raises(ValueError, match=r"swap_ema needs averages: ema_decay.*Received: .+"):
        optimizer.swap_ema()
    train(optimizer, 1)
    with pytest.raises(ValueError, match="swap_ema needs averages"):
        optimizer.swap_ema()
    with pytest.raises(ValueError, match=r"swap_ema needs averages.*Received: .*0 parameters"):
        Adam(leaves(), ema_decay=0.9).swap_ema()


def steps_by_a_scaler(optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(p.sum() for p in optimizer.param_groups[0]["params"])).backward()
    scaler.step(optimizer)


WHILE_SWAPPED: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: train(o, 1),
    "step of a closure": lambda o: o.step(lambda: pytest.fail("evaluated")),
    "step by a scaler": steps_by_a_scaler,
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict({}),
    "pickle": pickle.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "attach": lambda o: fusedadam.torch.attach(
        torch.nn.ParameterList(o.param_groups[0]["params"]), o
    ),
}


@pytest.mark.parametrize("use", WHILE_SWAPPED.values(), ids=WHILE_SWAPPED)
@pytest.mark.parametrize("fused", [None, True])
def test_what_is_refused_while_averages_are_swapped_in(
    use: Callable[[Any], Any], fused: bool | None
) -> None:
    optimizer, twin = (Adam(leaves(), lr=0.1, ema_decay=0.9, fused=fused) for _ in range(2))
    train(optimizer, 2)
    train(twin, 2)
    optimizer.swap_ema()
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"averages must be swapped out first: call swap_ema"):
        use(optimizer)
    assert_everything_same_bits(everything(optimizer), before)
    # The new parameter has no average yet. The others are swapped back as before.
    optimizer.add_param_group({"params": leaves([(3,)], seed=1)})
    optimizer.swap_ema()
    assert_everything_same_bits(everything(optimizer)[:-1], everything(twin))
    train(optimizer, 1)


def test_step_refuses_averages_swapped_in_behind_attach() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = Adam(model.parameters(), ema_decay=0.9)
    fusedadam.torch.attach(model, optimizer)
    model(torch.ones(3)).sum().backward()
    optimizer.swap_ema()
    before = everything(optimizer)
    with pytest.raises(ValueError, match="swapped out first"):
        model(torch.ones(3)).sum().backward()
    assert_everything_same_bits(everything(optimizer), before)


@pytest.mark.parametrize("average", [torch.zeros(5), torch.zeros(4, dtype=torch.float64)], ids=str)
def test_swap_ema_of_an_average_that_does_not_fit_changes_nothing(average: Any) -> None:
    params = leaves([(2,), (3,), (4,)])
    averaged = {"params": [("weight", params[1]), ("bias", params[2])], "ema_decay": 0.5}
    optimizer = Adam([{"params": [("alone", params[0])]}, averaged])
    train(optimizer, 2)
    fitting, optimizer.state[params[2]]["ema"] = optimizer.state[params[2]]["ema"], average
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"^ema\[2\] \('bias'\) must .*Received: shape="):
        optimizer.swap_ema()
    assert_everything_same_bits(everything(optimizer), before)
    optimizer.state[params[2]]["ema"] = fitting
    train(optimizer, 1)


def test_swap_ema_of_groups_with_and_without() -> None:
    params = leaves([(3,), (4,), (5,)])
    optimizer = Adam([{"params": params[:1], "ema_decay": 0.5}, {"params": params[1:]}], lr=0.1)
    train(optimizer, 3)
    before = everything(optimizer)
    assert ["ema" in state for state in before] == [True, False, False]
    optimizer.swap_ema()
    after = everything(optimizer)
    assert_same_bits(after[0]["param"], before[0]["ema"])
    assert_everything_same_bits(after[1:], before[1:])


# -- zero_grad_in_step ------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_zero_grad_in_step(shapes: list[tuple[int, ...]]) -> None:
    params = leaves(shapes)
    optimizer, plain = Adam(params, zero_grad_in_step=True), Adam(leaves(shapes))
    train(plain, 3)
    rng = np.random.default_rng(3)
    for _ in range(3):
        grads = grads_like(rng, params)
        set_grads(params, grads)
        held = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, held, strict=True))
        assert all(not g.any() for g in held)
    assert_everything_same_bits(everything(optimizer), everything(plain))


def test_zero_grad_in_step_lets_gradients_accumulate_anew() -> None:
    model = torch.nn.Linear(3, 1)
    twin = copy.deepcopy(model)
    optimizer, other = AdamW(model.parameters(), zero_grad_in_step=True), AdamW(twin.parameters())
    x = values(np.random.default_rng(2), (8, 3), "float32")
    for row in x:
        model(torch.tensor(row)).sum().backward()
        optimizer.step()
        other.zero_grad()
        twin(torch.tensor(row)).sum().backward()
        other.step()
    assert_everything_same_bits(everything(optimizer), everything(other))


def test_zeroing_is_seen_by_graphs() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([p], zero_grad_in_step=True)
    p.grad = torch.ones(3)
    version = p.grad._version
    optimizer.step()
    assert p.grad._version > version


def test_group_that_is_no_dictionary_is_refused_as_by_torch() -> None:
    optimizer = Adam([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="dict"):
        optimizer.add_param_group([torch.nn.Parameter(torch.ones(3))])  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1


def test_parameters_without_gradients_beside_zeroed_ones() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Adam([p, q], zero_grad_in_step=True)
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.grad.tolist() == [0.0, 0.0, 0.0]
    assert q.grad is None
    assert q.tolist() == [1.0, 1.0, 1.0]


def test_no_tensor_is_distributed_where_torch_has_no_such_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
    p = torch.nn.Parameter(torch.ones(3))
    assert not local.any_distributed([p])
    p.grad = torch.ones(3)
    Adam([p], lr=0.25).step()
    assert p.tolist() == pytest.approx([0.75] * 3)
