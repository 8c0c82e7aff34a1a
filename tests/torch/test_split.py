# SPDX-License-Identifier: MIT
"""`fusedadam.torch.split_` and `master_weights`: float32 weights as bfloat16 and low bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import storage_oracle as storage
from helpers import assert_same_bits

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW, attach, split_
from torch_helpers import (
    Training,
    array,
    arrays,
    assert_everything_same_bits,
    drawn,
    everything,
    params_of,
    train,
)

# Both signs of zero and infinity, a tie, subnormals, and what rounds to infinity in bfloat16.
EXTREMES = [0.0, -0.0, 1 + 2.0**-8, 1e-45, -1e-39, 3.4028235e38, -3.4e38, np.inf, -np.inf, np.nan]


def model_of(*, extremes: bool = False) -> Any:
    """A model in float32, with a buffer in float32 and one of integers."""
    rng = np.random.default_rng(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(9, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 3)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(drawn(rng, tuple(p.shape), "float32"))
            p.mul_(1 + 2.0**-12)  # no zeros at the end
        if extremes:
            model[0].bias[: len(EXTREMES)] = torch.tensor(EXTREMES)
        model[1].running_mean.fill_(1 / 3)
    return model


def go(optimizer: Any, grads: list[Any]) -> None:
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad = g.to(p.dtype)
    optimizer.step()


def grads_of(model: Any, seed: int) -> list[Any]:
    """Gradients that bfloat16 can represent."""
    rng = np.random.default_rng(seed)
    return [drawn(rng, tuple(p.shape), "bfloat16") for p in model.parameters()]


@pytest.mark.parametrize("low_bits", ["int8", "int16"])
def test_weights_are_split_and_joined(low_bits: Any) -> None:
    model = model_of(extremes=low_bits == "int16")
    weights, params = arrays(model.parameters()), list(model.parameters())
    optimizer = AdamW(params, low_bits=low_bits)
    for p in params:
        p.grad = torch.ones_like(p)
    versions = [p._version for p in params]
    split_(model, optimizer)
    # A graph that has saved the old values must not use the new ones.
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert [p.grad for p in params] == [None] * len(params)
    for p, weight in zip(params, weights, strict=True):
        high, low = storage.split(weight, low_bits)
        assert_same_bits(array(p), high)
        assert_same_bits(array(optimizer.state[p]["low_bits"]), low)
        master = array(optimizer.master_weights(p))
        assert_same_bits(master, storage.join(high, low))
        if low_bits == "int16":
            assert_same_bits(master, weight)
        else:
            # 16 significant bits, the last of them rounded.
            np.testing.assert_allclose(master, weight, rtol=2.0**-16, atol=0)
            assert not np.array_equal(master, weight)
    # As model.bfloat16() does.
    assert model[1].running_mean.dtype == torch.bfloat16
    assert model[1].num_batches_tracked.dtype == torch.int64
    model(torch.ones(2, 9).bfloat16()).sum().backward()
    optimizer.step()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"weight_decay": 0.1},
    "amsgrad, average": {"amsgrad": True, "ema_decay": 0.9},
    "norm": {"max_grad_norm": 0.5, "maximize": True},
}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_int16_trains_as_float32_does(settings: dict[str, Any], before: int) -> None:
    model, twin = model_of(), model_of()
    reference = AdamW(twin.parameters(), lr=0.01, **settings)
    optimizer = AdamW(model.parameters(), lr=0.01, moments="float32", low_bits="int16", **settings)
    for i in range(before + 3):
        if i == before:
            split_(model, optimizer)
        go(optimizer, grads_of(model, i))
        go(reference, grads_of(model, i))
        for p, expected in zip(model.parameters(), everything(reference), strict=True):
            assert p.dtype == (torch.float32 if i < before else torch.bfloat16)
            actual = {n: array(t) for n, t in optimizer.state[p].items() if n != "low_bits"}
            master = array(optimizer.master_weights(p))
            assert_everything_same_bits([{"param": master, **actual}], [expected])
            if i >= before:
                assert_same_bits(array(p), storage.split(master, "int16")[0])


def test_groups_without_low_bits_are_rounded() -> None:
    model = model_of()
    first, *others = model.parameters()
    frozen = others.pop()  # belongs to no optimizer
    groups = [{"params": [first], "low_bits": "int8"}, {"params": others}]
    training = Training.of(Adam(groups, lr=0.1))
    training.step()
    weights = arrays([*others, frozen])
    split_(model, training.optimizer)
    for p, weight in zip((*others, frozen), weights, strict=True):
        assert_same_bits(array(p), storage.to_bfloat16(weight))
        if p is not frozen:
            assert_same_bits(array(training.optimizer.master_weights(p)), array(p.float()))
    assert ["low_bits" in state for state in training.state] == [True] + [False] * 4
    # The state of before goes on in the formats of now.
    training.adopt()
    training.run(2)
    assert training.steps == [3] * 5
    for state in training.state:
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_split_while_attached() -> None:
    model = model_of()
    training = Training.of(AdamW(model.parameters(), moments="packed", low_bits="int8"))
    attach(model, training.optimizer)
    split_(model, training.optimizer)
    training.adopt()
    for _ in range(3):
        loss = model(torch.linspace(0, 1, 36).reshape(4, 9).bfloat16()).square().sum()
        training.expect(torch.autograd.grad(loss, training.params, retain_graph=True))
        loss.backward()
        training.check()
        assert [p.grad for p in training.params] == [None] * 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_master_weights_without_low_bits(dtype: str) -> None:
    p = torch.nn.Parameter(torch.tensor(EXTREMES).to(getattr(torch, dtype)))
    master = Adam([p]).master_weights(p)
    assert not master.requires_grad
    assert_same_bits(array(master), array(p.float()))
    master.zero_()
    assert p[5] > 1  # a copy


def test_master_weights_are_those_of_now() -> None:
    p = torch.nn.Parameter(torch.ones(5, 3).bfloat16())
    optimizer = Adam([p], low_bits="int8", lr=1e-4)
    for _ in range(5):
        go(optimizer, [torch.ones(5, 3)])
    assert torch.equal(p, torch.ones_like(p))
    np.testing.assert_allclose(array(optimizer.master_weights(p)), 1 - 5e-4, rtol=2.0**-15)
    optimizer.param_groups[0]["low_bits"] = None
    go(optimizer, [torch.zeros(5, 3)])
    assert torch.equal(optimizer.master_weights(p), p.float())


def with_averages(_: Any, optimizer: Any) -> None:
    train(optimizer, 1)
    optimizer.swap_ema()


def with_gaps(model: Any, _: Any) -> None:
    model[2].bias.data = torch.ones(3, 2)[:, 0]


# What is done to a model and an optimizer, and what is given instead of them, if not None.
ERRORS: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "no low bits": (
        lambda _, o: o.param_groups[0].update(low_bits=None),
        ValueError,
        "^model must have float32 parameters in a group with low_bits",
    ),
    "torch's optimizer": (
        lambda m, _: (m, torch.optim.Adam(m.parameters())),
        TypeError,
        "^optimizer must be",
    ),
    "no model": (lambda _, o: ([], o), TypeError, "^model must be"),
    "another model": (lambda _, o: (model_of(), o), ValueError, "^model must have float32"),
    "float64": (lambda m, o: (m.double(), o), ValueError, "^model must have float32"),
    "split once": (split_, ValueError, r"^model must have float32.*Received: none.*int8"),
    "swapped": (with_averages, ValueError, "swapped out first"),
    "gaps": (with_gaps, ValueError, "gaps or overlaps"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_of_split(spoil: Any, error: type[Exception], message: str) -> None:
    model = model_of()
    optimizer = Adam(model.parameters(), low_bits="int8", ema_decay=0.9)
    given = spoil(model, optimizer) or (model, optimizer)
    before = copy.deepcopy(model.state_dict()), everything(optimizer)
    with pytest.raises(error, match=message) as caught:
        split_(*given)
    assert "Received: " in str(caught.value)
    torch.testing.assert_close(dict(model.state_dict()), dict(before[0]), rtol=0, atol=0)
    assert_everything_same_bits(everything(optimizer), before[1])


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_errors_of_master_weights(dtype: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=getattr(torch, dtype)))
    with pytest.raises(TypeError, match=r"^param must be float32, .*Received: .+"):
        Adam([p]).master_weights(p)
