# SPDX-License-Identifier: MIT
"""`fusedadam.torch.Adam` and `AdamW` with every option: beside the oracle, and beside torch's own."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import running

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import (
    KINDS,
    LARGE,
    SHAPES,
    STOCK,
    Training,
    assert_close,
    leaves,
    train,
)

ALL_AT_ONCE: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.98), "eps": 1e-5}
ALL_AT_ONCE |= {"weight_decay": 0.03, "amsgrad": True, "maximize": True}
EXTRAS: dict[str, Any] = {"max_grad_norm": 0.5, "ema_decay": 0.9, "zero_grad_in_step": True}

Rows = dict[str, tuple[Any, dict[str, Any]]]
# Options of torch.
PARITY: Rows = {
    "Adam as it comes": (Adam, {}),
    "AdamW as it comes": (AdamW, {}),
    "lr of one element, in float64": (AdamW, {"lr": torch.tensor([0.01], dtype=torch.float64)}),
    "no memories": (AdamW, {"betas": (0.0, 0.0)}),
    "eps 0": (Adam, {"eps": 0.0}),
    "eps among the gradients": (Adam, {"eps": 1e-3, "lr": 0.01}),
    "weight decay in the gradient": (Adam, {"weight_decay": 0.1}),
    "weight decay apart": (AdamW, {"weight_decay": 0.5, "lr": 0.01}),
    "decay apart, by the flag": (Adam, {"weight_decay": 0.5, "decoupled_weight_decay": True}),
    "amsgrad": (Adam, {"amsgrad": True, "betas": (0.9, 0.9)}),
    "ascent with decay in the gradient": (Adam, {"maximize": True, "weight_decay": 0.1}),
    "ascent with decay apart": (AdamW, {"maximize": True, "weight_decay": 0.1}),
    "all at once": (Adam, ALL_AT_ONCE),
    "all at once, decay apart": (AdamW, ALL_AT_ONCE),
}
ALSO: Rows = {
    "all at once, lr as a tensor": (AdamW, ALL_AT_ONCE | {"lr": torch.tensor(0.02)}),
    "extras": (Adam, EXTRAS),
    "extras and all at once": (AdamW, ALL_AT_ONCE | EXTRAS),
    "a norm of 0, which is off": (Adam, {"max_grad_norm": 0}),
    "ema_decay 1": (AdamW, {"ema_decay": 1.0}),
    **{f"{how}": (Adam, how) for how in ({"foreach": True}, {"fused": True}, {"capturable": True})},
}


@pytest.mark.parametrize(("kind", "options"), (PARITY | ALSO).values(), ids=PARITY | ALSO)
def test_bits_of_the_oracle(kind: Any, options: dict[str, Any]) -> None:
    training = Training(kind, SHAPES, "float32 float64", **options)
    training.run(8)
    for name in options.keys() & {"foreach", "fused", "capturable"}:
        assert training.optimizer.param_groups[0][name] == options[name]


@pytest.mark.parametrize(("kind", "options"), PARITY.values(), ids=PARITY)
def test_same_as_torch(kind: Any, options: dict[str, Any]) -> None:
    # In float64: each step has about ten roundings of 1e-16, for values of at most 2**10.
    training = Training(kind, SHAPES, "float64", beside_torch=True, **options)
    training.run(20)
    training.check_torch()


@pytest.mark.parametrize("options", [{}, ALL_AT_ONCE | EXTRAS], ids=["plain", "extras"])
def test_bits_do_not_depend_on_threads_or_the_instruction_set(
    options: dict[str, Any], isa: str
) -> None:
    for threads in (1, 3):
        with running(threads=threads, isa=isa):
            Training(AdamW, LARGE, **options).run(2)


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_signature_and_defaults(kind: Any) -> None:
    stock = STOCK[kind]
    ours, theirs = (inspect.signature(k).parameters for k in (kind, stock))
    # Arguments added after torch 2.6 are passed on by keyword.
    is_open = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in ours.values())
    for name, parameter in theirs.items():
        if name in ours or not is_open or parameter.kind != inspect.Parameter.KEYWORD_ONLY:
            assert ours[name].default == parameter.default, name
            assert ours[name].kind == parameter.kind, name
    assert list(ours)[:6] == list(theirs)[:6]  # those by position
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in EXTRAS)
    assert issubclass(kind, stock)
    # Options that are off leave no entries.
    optimizer, other = (k([{"params": leaves(), "lr": 0.5}]) for k in (kind, stock))
    assert optimizer.param_groups[0].keys() == other.param_groups[0].keys()
    assert optimizer.defaults == other.defaults


def betas(first: Any, second: Any) -> dict[str, Any]:
    return {"betas": (first, second)}


ARGUMENTS: dict[str, dict[str, Any]] = {
    "lr below 0": {"lr": -0.1},
    "lr of two elements": {"lr": torch.tensor([0.1, 0.2])},
    "lr an integer": {"lr": 1},
    "lr of NumPy": {"lr": np.float32(0.01)},
    "eps below 0": {"eps": -1e-8},
    "beta_1 of 1": betas(1.0, 0.999),
    "beta_2 NaN": betas(0.9, math.nan),
    "betas as integers": betas(0, 0),
    "betas as a list": {"betas": [0.8, 0.9]},
    "betas as tensors": betas(torch.tensor(0.75), torch.tensor(0.875)),
    "betas as tensors of one element": betas(torch.tensor([0.75]), torch.tensor([0.875])),
    "betas of two kinds": betas(0.9, torch.tensor(0.999)),
    "betas as tensors of two elements": betas(torch.ones(2) / 2, torch.ones(2) / 2),
    "weight_decay below 0": {"weight_decay": -1.0},
    "lr as a tensor, foreach": {"lr": torch.tensor(0.1), "foreach": True},
    "betas as tensors, foreach": betas(torch.tensor(0.5), torch.tensor(0.5)) | {"foreach": True},
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
    ours, message = outcome(lambda: kind(leaves([(17, 5)]), **copy.deepcopy(arguments)))
    theirs, expected = outcome(lambda: STOCK[kind](leaves([(17, 5)]), **copy.deepcopy(arguments)))
    assert message == expected
    if expected:
        assert ours is theirs
        return
    keys = set(theirs.param_groups[0]) - {"params"}
    groups = [{k: o.param_groups[0][k] for k in keys} for o in (ours, theirs)]
    assert groups[0] == groups[1]
    train(ours, 2)
    train(theirs, 2)
    # Two steps with about ten roundings each, in float32.
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "no parameters": list,
    "a tensor": lambda: torch.ones(3),
    "arrays": lambda: [np.ones(3)],
    "a group without params": lambda: [{"lr": 0.1}],
    "one parameter in two groups": lambda: [{"params": leaves([(3,)])}] * 2,
    "a set": lambda: [{"params": {torch.ones(3, requires_grad=True)}}],
}


@pytest.mark.parametrize("make", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_parameters_are_judged_as_by_torch(make: Callable[[], Any]) -> None:
    error, expected = outcome(lambda: torch.optim.Adam(make()))
    ours, message = outcome(lambda: Adam(make()))
    assert expected
    assert ours is error
    assert message == expected or "0x" in expected


# -- complex numbers --------------------------------------------------------------------------

COMPLEX: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "plain": (Adam, "complex64", {}),
    "amsgrad, decay": (AdamW, "complex128", {"amsgrad": True, "weight_decay": 0.1}),
    "extras": (Adam, "complex64", EXTRAS),
}


@pytest.mark.parametrize(("kind", "dtype", "options"), COMPLEX.values(), ids=COMPLEX)
def test_complex_parameters_are_pairs_of_reals(
    kind: Any, dtype: str, options: dict[str, Any]
) -> None:
    # Every second gradient is lazily conjugated, as autograd may leave it.
    lazy = iter([True, False] * 99)
    training = Training(
        kind,
        [(5, 3), (), (0, 2), (20_503,)],
        dtype,
        place=lambda g, _: g.conj().resolve_conj().conj() if next(lazy) else g,
        beside_torch="ema_decay" not in options,
        **options,
    )
    training.run(3)
    for p, state in zip(training.params, training.state, strict=True):
        for name in state.keys() - {"step"}:
            t = state[name]
            assert (t.dtype, t.shape, t.stride()) == (p.dtype, p.shape, p.stride())
    if "ema_decay" in options:
        training.swap_ema()
    else:
        training.check_torch(rtol=1e-5 if dtype == "complex64" else 1e-11, atol=1e-5)
        pair = training.stock, training.optimizer
        for of, other in (pair, pair[::-1]):
            of.load_state_dict(copy.deepcopy(other.state_dict()))
    training.step()
