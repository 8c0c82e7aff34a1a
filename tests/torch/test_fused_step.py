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
from helpers import assert_same_bits

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW, attach, local
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch_helpers import (
    KINDS,
    LARGE,
    SHAPES,
    STOCK,
    Training,
    array,
    arrays,
    assert_everything_same_bits,
    everything,
    leaves,
    params_of,
    train,
)

schedulers = torch.optim.lr_scheduler


# -- schedulers -------------------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "LambdaLR to zero": lambda o: schedulers.LambdaLR(o, lambda t: max(0.0, 1 - t / 5)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.1),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR, which moves beta_1 too": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=9),
    "CyclicLR, which moves beta_1 too": lambda o: schedulers.CyclicLR(o, 0.001, 0.1, 3),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 9), schedulers.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
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
        ours, theirs = (o.param_groups[0] for o in (training.optimizer, training.stock))
        assert float(ours["lr"]) == float(theirs["lr"])
        assert ours["betas"] == theirs["betas"]


# -- groups and parameters --------------------------------------------------------------------


def test_group_added_in_the_middle() -> None:
    training = Training(AdamW, [(4, 3), (5,)], "float64", beside_torch=True, weight_decay=0.1)
    training.run(2)
    for optimizer in (training.optimizer, training.stock):
        late = leaves([(6,), ()], "float64", seed=20)
        optimizer.add_param_group({"params": late, "lr": 0.05, "amsgrad": True})
    training.adopt()
    training.run(3)
    training.check_torch()
    assert training.steps == [5, 5, 3, 3]
    assert training.optimizer.param_groups[1]["weight_decay"] == 0.1


def test_parameters_without_gradients() -> None:
    # Each parameter has a count of its own, as if it were alone.
    training = Training(AdamW, SHAPES, "float64", beside_torch=True, zero_grad_in_step=True)
    assert training.optimizer.step() is None
    assert training.optimizer.state_dict()["state"] == {}
    training.check()
    training.run(12, missing=0.4)
    assert len(set(training.steps)) > 1
    training.check_torch()


def test_frozen_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    frozen = arrays(model[0].parameters())
    optimizer = AdamW(model.named_parameters(), weight_decay=0.5)
    for i in range(4):
        model[0].requires_grad_(i == 3)
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        if i < 3:
            assert_same_bits(array(model[0].weight), frozen[0])
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 1, 4, 4]
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


def test_state_stays_where_it_is() -> None:
    # ZeroRedundancyOptimizer and torch.distributed's checkpoints keep references to these tensors.
    training = Training(AdamW, amsgrad=True, ema_decay=0.9)
    training.step()
    held = [(p.data_ptr(), dict(s)) for p, s in zip(training.params, training.state, strict=True)]
    training.run(2)
    for p, own, (where, state) in zip(training.params, training.state, held, strict=True):
        assert all(own[name] is t for name, t in state.items())
        assert p.data_ptr() == where


def test_no_tensor_is_distributed_where_torch_has_no_such_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
    training = Training()
    assert not local.any_distributed(training.params)
    training.step()


# -- all or nothing ---------------------------------------------------------------------------


def state_of_last(training: Training) -> Any:
    return training.optimizer.state[training.params[-1]]


def replaced(name: str, make: Callable[[Any], Any]) -> Callable[[Training], None]:
    def spoil(training: Training) -> None:
        state = state_of_last(training)
        state[name] = make(state[name])

    return spoil


def from_first(name: str) -> Callable[[Training], None]:
    return lambda t: state_of_last(t).update({name: t.optimizer.state[t.params[0]][name]})


BAD_STATE: dict[str, tuple[Callable[[Training], Any], str]] = {
    "gradient sparse in two dimensions": (
        lambda t: setattr(t.params[-1], "grad", torch.eye(5).to_sparse()),
        r"grads\[3\] must .*sparse",
    ),
    "moment of another shape": (replaced("exp_avg", lambda t: t[:3]), r"exp_avg\[3\] .*shape"),
    "moment of another dtype": (replaced("exp_avg_sq", lambda t: t.double()), "dtype"),
    "moment elsewhere": (replaced("exp_avg_sq", lambda t: t.to("meta")), "CPU"),
    "moment that is the parameter": (
        lambda t: state_of_last(t).update(exp_avg=t.params[-1].data),
        "overlap",
    ),
    "moment of another parameter": (from_first("exp_avg"), "overlap"),
    "count below 0": (replaced("step", lambda _: torch.tensor(-1.0)), "step"),
    "count NaN": (replaced("step", lambda _: torch.tensor(math.nan)), "step"),
    "count of another parameter": (from_first("step"), "overlap"),
    "count in the memory of the parameter": (
        lambda t: state_of_last(t).update(step=t.params[-1].detach().view(-1)[0]),
        "overlap",
    ),
    "no second moment": (lambda t: state_of_last(t).pop("exp_avg_sq"), "exp_avg_sq"),
}


@pytest.mark.parametrize(("spoil", "rule"), BAD_STATE.values(), ids=BAD_STATE)
@pytest.mark.parametrize("size", [5, 41_003])
def test_error_leaves_everything_as_it_was(
    spoil: Callable[[Training], Any], rule: str, size: int
) -> None:
    shapes = [(5, 5), (size,)]
    training = Training(AdamW, shapes, groups=[{}, {}], ema_decay=0.9, zero_grad_in_step=True)
    training.optimizer.add_param_group({"params": leaves([(5, 5)])})
    training.optimizer.param_groups[1]["params"].pop(0)
    training.adopt()
    training.run(2)
    training.give(training.grads())
    errors = (ValueError, TypeError, KeyError, RuntimeError)
    with training.refused(rf"(?s){rule}", errors, spoilt=True):
        spoil(training)
        training.optimizer.step()
    training.step()


def test_error_in_the_first_step() -> None:
    training = Training(Adam, [(3,), (5, 5)])
    training.give([torch.ones(3), torch.eye(5).to_sparse()])
    with training.refused(r"\[1\].*Received: .+", (ValueError, RuntimeError)):
        training.optimizer.step()
    assert not training.optimizer.state
    training.run(2)


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
        training.optimizer.zero_grad()
        loss = (p.detach().requires_grad_() ** 2).sum()
        p.grad = 2 * p.detach()
        return loss

    for _ in range(2):
        expected = (p.detach() ** 2).sum().item()
        training.expect([2 * p.detach()])
        with getattr(torch, outside)():
            loss = training.optimizer.step(closure)
            assert torch.is_grad_enabled() == (outside == "enable_grad")
            training.check()
        assert loss.item() == expected
    assert seen == [True] * 2

    def fails() -> Any:
        raise KeyError("mine")

    with training.refused("mine", KeyError):
        training.optimizer.step(fails)
    assert torch.is_grad_enabled()
    assert training.optimizer.step(closure=lambda: 3.5) == 3.5


def test_step_turns_recording_off() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([p], amsgrad=True, ema_decay=0.5)
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    optimizer.step()
    assert p.is_leaf
    assert p.grad_fn is None
    assert not any(t.requires_grad for t in optimizer.state[p].values())


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        optimizer = AdamW([torch.ones(3, requires_grad=True)], lr=0.5)
        params_of(optimizer)[0].grad = torch.ones(3)
        optimizer.step()
        np.testing.assert_allclose(everything(optimizer)[0]["param"], 0.495, rtol=1e-6)


def test_profiler() -> None:
    optimizer = AdamW(leaves())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, 2)
        optimizer.zero_grad()
    names = {event.key: event.count for event in profile.key_averages()}
    assert names["Optimizer.step#AdamW.step"] == 2
    assert names["Optimizer.zero_grad#AdamW.zero_grad"] == 1


def test_step_hooks() -> None:
    training = Training(Adam, [(3,)])
    optimizer = training.optimizer
    seen: list[tuple[str, float]] = []

    def count(name: str) -> Callable[..., None]:
        def hook(of: Any, args: Any, kwargs: Any) -> None:
            assert of is optimizer
            assert len(args) + len(kwargs) >= 1
            seen.append((name, float(training.state[0].get("step", 0))))

        return hook

    hooks = [
        register_optimizer_step_pre_hook(count("global")),
        optimizer.register_step_pre_hook(count("before")),
        optimizer.register_step_post_hook(count("after")),
    ]
    try:
        training.run(2)
    finally:
        for hook in hooks:
            hook.remove()
    rounds = [
        ("global", 0),
        ("before", 0),
        ("after", 1),
        ("global", 1),
        ("before", 1),
        ("after", 2),
    ]
    training.step()
    assert seen == rounds

    def halve(of: Any, args: Any, kwargs: Any) -> Any:
        params_of(of)[0].grad.mul_(0.5)
        return args, kwargs | {"closure": lambda: seen.append(("closure", 0))}

    optimizer.register_step_pre_hook(halve)
    training.expect([torch.ones(3) / 2])
    training.give([torch.ones(3)])
    optimizer.step()
    training.check()
    assert seen[-1] == ("closure", 0)


def test_state_dict_hooks() -> None:
    optimizer, seen = AdamW(leaves([(3,)])), []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    train(optimizer, 1)
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    optimizer.load_state_dict(saved)
    train(optimizer, 1)
    assert seen == ["before saving", 1, "after loading"]


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool, how: dict[str, Any]) -> None:
    training = Training(Adam, **how)
    training.step()
    training.optimizer.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for p in training.params)
    # A gradient of zeros is a gradient.
    training.stepped([p.grad for p in training.params], training.optimizer.step)
    assert training.steps == [1 if to_none else 2] * len(SHAPES)


# -- the scaler -------------------------------------------------------------------------------

# Half of the largest number, finite until it is scaled.
HUGE = 2.0**1023
FACTORS = [1.0, 2.0, HUGE, 0.5, HUGE, HUGE, 1e-3, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9}], ids=str)
def test_grad_scaler(options: dict[str, Any], fused: bool | None, unscale: bool) -> None:
    # Scales are powers of two, so that unscaling is exact, wherever it is done.
    training = Training(AdamW, [(6, 4), (9,)], "float64", lr=0.05, fused=fused, **options)
    optimizer: Any = training.optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for factor in FACTORS:
        optimizer.zero_grad()
        scaler.scale(factor * sum(((p - 0.5) ** 2).sum() for p in training.params)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scale = 1.0 if unscale else scaler.get_scale()
        grads = [p.grad / scale for p in training.params]
        scales.append(scaler.get_scale())
        if factor != HUGE:
            training.expect(grads)
        scaler.step(optimizer)
        scaler.update()
        training.check(str(factor))
        if factor != HUGE:
            left = [p.grad for p in training.params]
            assert all(torch.equal(a, b) for a, b in zip(left, grads, strict=True))
    exponents = [10, 10, 10, 9, 9, 8, 7, 7, 7, 8]
    assert scales == [2.0**exponent for exponent in exponents]
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("moments", ["auto", "packed"])
def test_scaler_of_a_float16_model(moments: Any) -> None:
    training = Training(AdamW, [(37,), (9, 17)], "float16", fused=True, lr=0.01, moments=moments)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(8):
        training.optimizer.zero_grad()
        scaler.scale(sum((p * p.sin()).sum() for p in training.params)).backward()
        grads, scale = [p.grad.clone() for p in training.params], scaler.get_scale()
        if all(g.isfinite().all() for g in grads):
            training.expect(grads, scale)
        scaler.step(training.optimizer)
        scaler.update()
        training.check()
    assert 0 < training.steps[0] < 8  # some overflow
    for p, g in zip(training.params, grads, strict=True):
        assert torch.equal(p.grad, g / scale)


def test_scaler_of_two_optimizers_of_which_one_has_no_gradients() -> None:
    # found_inf of an optimizer without gradients is then an empty sum, the int 0.
    used, idle = (Training(Adam, [(5,)], fused=True) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((used.params[0] ** 2).sum()).backward()
    used.expect([2 * used.params[0].detach()])
    for of in (used, idle):
        scaler.step(of.optimizer)
        of.check()
    scaler.update()
    off = torch.amp.GradScaler("cpu", enabled=False)
    used.give(grads := used.grads())
    used.stepped(grads, lambda: off.step(used.optimizer))


NUMBERS: dict[str, Callable[[float], Any]] = {
    "numbers": float,
    "int": int,
    "float32": torch.tensor,
    "float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "float16": lambda x: torch.tensor(x, dtype=torch.float16),
    "one element": lambda x: torch.tensor([x]),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_scale_and_overflow_set_by_hand(number: Callable[[float], Any]) -> None:
    # The protocol that GradScaler and similar scalers use.
    training = Training(Adam, [(5,)])
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
    theirs: Any = torch.optim.Adam([training.params[0].detach().clone()], fused=True)
    for of in (training.optimizer, theirs):
        of.grad_scale, of.found_inf = torch.tensor(scale), torch.tensor(0.0)
    with np.errstate(all="ignore"):
        g = torch.linspace(-2, 2, 12).reshape(4, 3) * torch.tensor(scale)
    g = g.clamp(-3.4e38, 3.4e38)
    for _ in range(2):
        training.step([g, g.t().contiguous().t(), g.to_sparse(1)])
        (q,) = params_of(theirs)
        q.grad = g.clone()
        theirs.step()
        assert zeroes or torch.equal(training.params[0].grad.nan_to_num(), q.grad.nan_to_num())
    for name, expected in everything(theirs)[0].items():
        # Two steps with about ten roundings each. The reciprocal that torch multiplies by has
        # fewer digits than a division if the scale is subnormal.
        actual = everything(training.optimizer)[0][name]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-30, err_msg=name)


# -- averages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_ema_beside_averaged_model(decay: float) -> None:
    swa = torch.optim.swa_utils
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)).double()
    averaged = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(decay))
    optimizer = AdamW(model.parameters(), lr=0.05, ema_decay=decay)
    for _ in range(30):
        train(optimizer, 1)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
        averaged.update_parameters(model)
    for p, average in zip(model.parameters(), averaged.module.parameters(), strict=True):
        # Four roundings per step and side. The decay shrinks the earlier ones.
        np.testing.assert_allclose(array(optimizer.state[p]["ema"]), array(average), atol=1e-12)
        assert decay == 0 or not np.array_equal(array(p), array(average))


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
    with pytest.raises(ValueError, match=r"swap_ema needs averages.*Received: .*0 parameters"):
        Adam(leaves(), ema_decay=0.9).swap_ema()


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
@pytest.mark.parametrize("fused", [None, True])
def test_what_is_refused_while_averages_are_swapped_in(
    use: Callable[[Any], Any], fused: bool | None
) -> None:
    training = Training(Adam, lr=0.1, ema_decay=0.9, fused=fused)
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
    training.run(2)
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


def test_every_step_counts_as_a_change_that_views_and_arrays_see() -> None:
    memory = np.ones((3, 4), "float32")
    p, other = torch.nn.Parameter(torch.from_numpy(memory)), torch.nn.Parameter(torch.ones(4))
    view, shared = p.detach()[1:], p.detach().numpy()
    optimizer = Adam([p, other], lr=0.5)
    for count in (1, 2):
        versions = p._version, other._version
        p.grad = torch.ones(3, 4)
        optimizer.step()
        assert p._version > versions[0]
        assert other._version == versions[1]
        for x in (shared, view.numpy(), memory):
            np.testing.assert_allclose(x, 1 - 0.5 * count, rtol=1e-6, atol=1e-6)
