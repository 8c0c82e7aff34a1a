# SPDX-License-Identifier: MIT
"""The step of `fusedadam.torch` in training loops: groups, closures, scalers, hooks, averages."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW, attach, local
from torch_helpers import (
    LARGE,
    SHAPES,
    Training,
    array,
    assert_everything_same_bits,
    everything,
    leaves,
    params_of,
    train,
)

schedulers = torch.optim.lr_scheduler


# -- schedulers -------------------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR to zero": lambda o: schedulers.LambdaLR(o, lambda t: max(0.0, 1 - t / 5)),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "OneCycleLR, which moves beta_1 too": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=9),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
def test_schedulers_beside_torch(make: Callable[[Any], Any], lr: Any) -> None:
    training = Training(AdamW, [(7, 3), (5,)], "float64", beside_torch=True, lr=lr)
    pair = [make(training.optimizer), make(training.stock)]
    # A scheduler counts the calls of `step` by wrapping it, and warns if there were none.
    for _ in range(7):
        training.step()
        # torch computes with a tensor of lr in float32.
        training.check_torch(**({} if isinstance(lr, float) else {"rtol": 1e-5, "atol": 1e-6}))
        for scheduler in pair:
            metric = (1.0,) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else ()
            scheduler.step(*metric)


# -- parameters -------------------------------------------------------------------------------


def test_parameters_without_gradients() -> None:
    # Each parameter has a count of its own, as if it were alone.
    training = Training(AdamW, SHAPES, "float64", beside_torch=True, zero_grad_in_step=True)
    assert training.optimizer.step() is None
    training.check()
    training.run(12, missing=0.4)
    assert len(set(training.steps)) > 1
    training.check_torch()


def test_state_stays_where_it_is() -> None:
    # ZeroRedundancyOptimizer and torch.distributed's checkpoints keep references to these tensors.
    training = Training(AdamW, amsgrad=True, ema_decay=0.9)
    training.step()
    held = [(p.data_ptr(), dict(s)) for p, s in zip(training.params, training.state, strict=True)]
    training.run(2)
    for p, own, (where, state) in zip(training.params, training.state, held, strict=True):
        assert all(own[name] is t for name, t in state.items())
        assert p.data_ptr() == where


def test_state_may_be_replaced() -> None:
    training = Training(AdamW, [(5, 3)], amsgrad=True)
    training.run(2)
    (state,) = training.state
    before = dict(state)
    state.update({name: tensor.clone() for name, tensor in before.items()})
    training.run(2)
    assert float(before["step"]) == 2.0


def test_no_tensor_is_distributed_where_torch_has_no_such_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
    training = Training()
    assert not local.any_distributed(training.params)
    training.step()


@pytest.mark.parametrize("attached", [False, True])
def test_errors_have_the_names_of_parameters(attached: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizer = Adam(model.named_parameters())
    if attached:
        attach(model, optimizer)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    optimizer.state[model[1].bias]["exp_avg"] = torch.ones(5)
    loss = model(torch.ones(3)).sum()
    if not attached:
        loss.backward()
    with pytest.raises(ValueError, match=r"^exp_avg\[[03]\] \('1\.bias'\) must .*Received: "):
        (loss.backward if attached else optimizer.step)()


# -- closures, hooks and contexts -------------------------------------------------------------


@pytest.mark.parametrize("outside", ["enable_grad", "no_grad", "inference_mode"])
def test_closure(outside: str) -> None:
    training = Training(AdamW, [(2,)], lr=0.1)
    (p,) = training.params
    seen = []

    def closure() -> Any:
        seen.append(torch.is_grad_enabled())
        p.grad = 2 * p.detach()
        return 3.5

    training.expect([2 * p.detach()])
    with getattr(torch, outside)():
        assert training.optimizer.step(closure=closure) == 3.5
        assert torch.is_grad_enabled() == (outside == "enable_grad")
        training.check()
    assert seen == [True]


def test_step_turns_recording_off() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([p], amsgrad=True, ema_decay=0.5)
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    optimizer.step()
    assert p.is_leaf
    assert not any(t.requires_grad for t in optimizer.state[p].values())


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        training = Training(AdamW)
        training.run(2)


def test_hooks() -> None:
    training = Training(Adam, [(3,)])
    optimizer, seen = training.optimizer, []

    def halve(of: Any, args: Any, kwargs: Any) -> Any:
        params_of(of)[0].grad.mul_(0.5)
        return args, kwargs | {"closure": lambda: seen.append("closure")}

    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(lambda *_: seen.append("stepped"))
    training.expect([torch.ones(3) / 2])
    training.give([torch.ones(3)])
    optimizer.step()
    training.check()
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    saved["param_groups"].append({})
    with pytest.raises(ValueError, match="loaded state dict"):
        optimizer.load_state_dict(saved)
    assert seen == ["closure", "stepped", 1, "loaded", 1]
    # The one of `load_state_dict` itself is removed.
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


# -- the scaler -------------------------------------------------------------------------------

# Half of the largest number, finite until it is scaled.
HUGE = 2.0**1023
FACTORS = [1.0, HUGE, 0.5, HUGE, HUGE, 1e-3, 1.0]


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9}], ids=str)
def test_grad_scaler(options: dict[str, Any], fused: bool | None, unscale: bool) -> None:
    # Scales are powers of two, so that unscaling is exact, wherever it is done.
    training = Training(AdamW, [(6, 4), (9,)], "float64", lr=0.05, fused=fused, **options)
    optimizer: Any = training.optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for factor in FACTORS:
        optimizer.zero_grad()
        scaler.scale(factor * sum(((p - 0.5) ** 2).sum() for p in training.params)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scale = 1.0 if unscale else scaler.get_scale()
        grads = [p.grad / scale for p in training.params]
        if factor != HUGE:
            training.expect(grads)
        scaler.step(optimizer)
        scaler.update()
        training.check(str(factor))
        if factor != HUGE:
            left = [p.grad for p in training.params]
            assert all(torch.equal(a, b) for a, b in zip(left, grads, strict=True))
    assert scaler.get_scale() == 2.0**7
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("number", [float, int, lambda x: torch.tensor([x], dtype=torch.float64)])
def test_scale_and_overflow_set_by_hand(number: Callable[[float], Any]) -> None:
    # The protocol that GradScaler and similar scalers use. An overflow of no gradients is an int.
    training = Training(Adam, [(5,)], "float32 float16")
    optimizer: Any = training.optimizer
    optimizer.grad_scale, optimizer.found_inf = number(4.0), number(0.0)
    training.step()
    optimizer.found_inf = number(2.0)
    training.give(training.grads())
    optimizer.step()
    training.check("overflow")
    del optimizer.grad_scale, optimizer.found_inf
    training.step()


@pytest.mark.parametrize(
    "scale", [2.0**127, 3.4e38, 2.0**-127, 2.0**-140, -8.0, math.inf, math.nan, 3.0]
)
@pytest.mark.parametrize("zeroes", [False, True])
def test_scale_of_any_float32(scale: float, zeroes: bool) -> None:
    training = Training(Adam, [(4, 3)] * 3, zero_grad_in_step=zeroes)
    training.optimizer.grad_scale = torch.tensor(scale)
    with np.errstate(all="ignore"):
        g = torch.linspace(-2, 2, 12).reshape(4, 3) * torch.tensor(scale)
    g = g.clamp(-3.4e38, 3.4e38)
    for _ in range(2):
        training.step([g, g.t().contiguous().t(), g.to_sparse(1)])


# -- averages ---------------------------------------------------------------------------------


def test_swap_ema() -> None:
    groups = [{"ema_decay": 0.5}, {}, {"ema_decay": 0.9}]
    training = Training(Adam, SHAPES, "float32 float64", groups=groups, lr=0.1)
    training.run(3, missing=0.3)
    versions = [p._version for p in training.params]
    addresses = [p.data_ptr() for p in training.params]
    training.swap_ema()
    # As for any in-place change, a graph that saved the old values must not use the new ones.
    for p, state, version in zip(training.params, training.state, versions, strict=True):
        assert (p._version > version) == ("ema" in state)
    assert [p.data_ptr() for p in training.params] == addresses
    training.run(2)
    training.optimizer.param_groups[1]["ema_decay"] = 0.25  # averages that begin later
    training.optimizer.param_groups[2].pop("ema_decay")
    training.run(2)


def test_swap_ema_without_averages_is_refused() -> None:
    training = Training()
    for _ in range(2):
        with training.refused(r"swap_ema needs averages: ema_decay.*Received: .+", ValueError):
            training.optimizer.swap_ema()
        training.step()


def steps_by_a_scaler(optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(p.sum() for p in params_of(optimizer))).backward()
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
    "attach": lambda o: attach(torch.nn.ParameterList(params_of(o)), o),
    "master_weights": lambda o: o.master_weights(params_of(o)[0]),
}


@pytest.mark.parametrize("use", WHILE_SWAPPED.values(), ids=WHILE_SWAPPED)
def test_what_is_refused_while_averages_are_swapped_in(use: Callable[[Any], Any]) -> None:
    training = Training(Adam, lr=0.1, ema_decay=0.9)
    training.run(2)
    training.optimizer.swap_ema()
    before = everything(training.optimizer)
    with pytest.raises(ValueError, match=r"averages must be swapped out first: call swap_ema"):
        use(training.optimizer)
    assert_everything_same_bits(everything(training.optimizer), before)
    # The new parameter has no average yet. The others are swapped back as before.
    training.optimizer.add_param_group({"params": leaves([(3,)], seed=1)})
    training.optimizer.swap_ema()
    training.stored.append({"params": array(training.params[-1])})
    training.steps.append(0)
    training.check()
    training.step()


@pytest.mark.parametrize("average", [torch.zeros(5), torch.zeros(4, dtype=torch.float64)], ids=str)
def test_swap_ema_of_an_average_that_does_not_fit_changes_nothing(average: Any) -> None:
    params = leaves([(2,), (3,), (4,)])
    averaged = {"params": [("weight", params[1]), ("bias", params[2])], "ema_decay": 0.5}
    training = Training.of(Adam([{"params": [("alone", params[0])]}, averaged]))
    training.step([None, None, torch.ones(4)])  # its state is the first
    training.step()
    with training.refused(r"^ema\[2\] \('bias'\) must .*Received: shape=", ValueError, spoilt=True):
        training.optimizer.state[params[2]]["ema"] = average
        training.optimizer.swap_ema()
    training.step()


@pytest.mark.parametrize("count", [math.nan, -1.0])
def test_average_of_a_refused_step_is_dropped(count: float) -> None:
    training = Training(Adam, [(3,)])
    training.step()
    with training.refused(r"must be a whole number >= 0.*Received: .+", spoilt=True):
        training.optimizer.param_groups[0]["ema_decay"] = 0.5
        training.give(training.grads())
        state = training.state[0]
        state["step"] = torch.tensor(count)
        try:
            training.optimizer.step()
        finally:
            assert sorted(state) == ["exp_avg", "exp_avg_sq", "step"]


# -- gradients that the step zeroes -----------------------------------------------------------


def test_zero_grad_in_step() -> None:
    training = Training(Adam, [*SHAPES, *LARGE], zero_grad_in_step=True)
    training.run(2)
    versions = [p.grad._version for p in training.params]
    training.optimizer.step()  # a gradient of zeros is a gradient
    assert all(p.grad._version > v for p, v in zip(training.params, versions, strict=True))
    assert [int(s["step"]) for s in training.state] == [3] * 7


# -- version counters and arrays --------------------------------------------------------------


def test_every_step_counts_as_a_change_that_views_and_arrays_see() -> None:
    # A graph that has saved the old values must not use the new ones.
    memory = np.ones((3, 4), "float32")
    p, other = torch.nn.Parameter(torch.from_numpy(memory)), torch.nn.Parameter(torch.ones(4))
    optimizer = Adam([p, other], lr=0.5)
    for count in (1, 2):
        versions = p._version, other._version
        p.grad = torch.ones(3, 4)
        optimizer.step()
        assert p._version > versions[0]
        assert other._version == versions[1]
        np.testing.assert_allclose(memory, 1 - 0.5 * count, rtol=1e-6, atol=1e-6)
