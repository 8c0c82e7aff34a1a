# SPDX-License-Identifier: MIT
"""State of `fusedadam.torch` that moves: to torch and back, to files, to copies, by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FLOATS, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import (
    KINDS,
    SHAPES,
    STOCK,
    Drift,
    array,
    assert_everything_same_bits,
    everything,
    grads_like,
    leaves,
    set_grads,
    stepped,
    train,
)

EXTRAS: dict[str, Any] = {"max_grad_norm": 0.5, "ema_decay": 0.9, "zero_grad_in_step": True}


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def through_a_file(state: Any, path: Path) -> Any:
    torch.save(state, path / "optimizer.pt")
    return torch.load(path / "optimizer.pt", weights_only=True)


# -- exchange with torch ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["to ours", "to torch", "to torch and back"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "weight_decay": 0.1}, {"lr": torch.tensor(0.01), "maximize": True}],
    ids=["plain", "amsgrad", "lr as a tensor"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_in_the_other(
    kind: Any, options: dict[str, Any], dtype: str, way: str, tmp_path: Path
) -> None:
    stock = STOCK[kind]
    steps, order = {
        "to ours": (50, [stock, kind]),
        "to torch": (50, [kind, stock]),
        "to torch and back": (30, [kind, stock, kind]),
    }[way]
    alone = stock(leaves(SHAPES, dtype), foreach=False, **copy.deepcopy(options))
    drifts = [
        Drift(p, **{k: alone.param_groups[0][k] for k in alone.defaults}) for p in params_of(alone)
    ]
    params, state = leaves(SHAPES, dtype), None
    rng = np.random.default_rng(1)
    for of in order:
        # The values differ from the checkpoint's, to check that loading replaces them.
        current = of(params, lr=0.5)
        if state is not None:
            current.load_state_dict(through_a_file(state, tmp_path))
        else:
            current = of(params, **copy.deepcopy(options))
        for _ in range(steps):
            grads = grads_like(rng, params)
            stepped(current, grads)
            stepped(alone, grads)
            for drift, after, g in zip(drifts, everything(alone), grads, strict=True):
                drift.follow(after, g)
        state = current.state_dict()
    both = zip(everything(current), everything(alone), strict=True)
    for i, (ours, theirs) in enumerate(both):
        drifts[i].check(ours, theirs, f"parameter {i}")


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_has_what_torch_puts_there(kind: Any) -> None:
    ours, theirs = (k(leaves(), amsgrad=True) for k in (kind, STOCK[kind]))
    for optimizer in (ours, theirs):
        train(optimizer, 2)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert list(a["state"]) == list(b["state"])
    for i in b["state"]:
        assert list(a["state"][i]) == list(b["state"][i])
    (group,), (expected,) = a["param_groups"], b["param_groups"]
    # Options that are off leave no entries.
    assert group == expected
    assert set(ours.defaults) == set(theirs.defaults)


def test_checkpoint_with_averages_goes_to_torch() -> None:
    ours = Adam(leaves(), **EXTRAS)
    train(ours, 3)
    theirs = torch.optim.Adam(leaves())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(theirs, 2)
    assert [int(s["step"]) for s in everything(theirs)] == [5] * len(SHAPES)
    # And back, with the averages of before.
    again = Adam(leaves(), **EXTRAS)
    again.load_state_dict(theirs.state_dict())
    assert_same_bits(everything(again)[0]["ema"], everything(ours)[0]["ema"])
    train(again, 1)


def test_extras_stay_on_when_a_checkpoint_of_torch_is_loaded() -> None:
    theirs = torch.optim.AdamW([{"params": leaves([(3,)])}, {"params": leaves([(4,)])}], lr=0.25)
    train(theirs, 2)
    groups = [{"params": leaves([(3,)])}, {"params": leaves([(4,)]), "max_grad_norm": 7.0}]
    ours = AdamW(groups, **EXTRAS)
    ours.load_state_dict(theirs.state_dict())
    assert [g["lr"] for g in ours.param_groups] == [0.25, 0.25]
    for name, value in EXTRAS.items():
        assert ours.param_groups[0][name] == value, name
    assert ours.param_groups[1]["max_grad_norm"] == 7.0
    train(ours, 2)
    assert not any(p.grad.any() for p in params_of(ours))


@pytest.mark.parametrize("count", [math.nan, -1.0])
def test_average_of_a_refused_step_is_dropped(count: float) -> None:
    (param,) = leaves([(3,)])
    optimizer = Adam([param])
    train(optimizer, 1)
    optimizer.param_groups[0]["ema_decay"] = 0.5
    state = optimizer.state[param]
    state["step"].fill_(count)
    names = sorted(state)
    with pytest.raises(ValueError, match=r"must be a whole number >= 0.*Received: .+"):
        optimizer.step()
    assert sorted(state) == names


def test_averages_begin_where_a_checkpoint_has_none() -> None:
    theirs = torch.optim.Adam(leaves(), lr=0.1)
    train(theirs, 5)
    ours = Adam([p.detach().clone().requires_grad_() for p in params_of(theirs)], ema_decay=0.75)
    ours.load_state_dict(theirs.state_dict())
    before = everything(ours)
    train(ours, 1, seed=9)
    after = everything(ours)
    for old, new in zip(before, after, strict=True):
        assert new["step"] == 6
        # The average starts at the parameter, either before or after the step.
        begun = 0.75 * old["param"] + 0.25 * new["param"]
        is_near = [np.allclose(new["ema"], x, rtol=1e-6, atol=0) for x in (begun, new["param"])]
        assert any(is_near)
    train(ours, 1, seed=10)
    for old, new in zip(after, everything(ours), strict=True):
        expected = 0.75 * old["ema"] + 0.25 * new["param"]
        np.testing.assert_allclose(new["ema"], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_checkpoint_of_the_other_dtype(dtype: str) -> None:
    other = {"float32": "float64", "float64": "float32"}[dtype]
    saved = torch.optim.Adam(leaves(SHAPES, other), amsgrad=True)
    train(saved, 3)
    ours, theirs = (k(leaves(SHAPES, dtype), amsgrad=True) for k in (Adam, torch.optim.Adam))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved.state_dict())
    assert_everything_same_bits(everything(ours), everything(theirs))
    train(ours, 1)


STEP_FORMATS: dict[str, Callable[[Any], Any]] = {
    "int": lambda step: int(step.item()),
    "float": lambda step: step.item(),
    "float64": lambda step: step.double(),
    "int64": lambda step: step.long(),
    "one element": lambda step: step.reshape(1),
}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("change", STEP_FORMATS.values(), ids=STEP_FORMATS)
def test_formats_of_the_step_count(change: Callable[[Any], Any], fused: bool | None) -> None:
    ours, theirs = (k(leaves(), fused=fused) for k in (Adam, torch.optim.Adam))
    reference = Adam(leaves())
    for optimizer in (ours, theirs, reference):
        train(optimizer, 3)
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = change(state["step"])
    kept = everything(ours)
    ours.load_state_dict(copy.deepcopy(saved))
    theirs.load_state_dict(copy.deepcopy(saved))
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert isinstance(a["step"], torch.Tensor)
        assert a["step"].is_floating_point()
        if b["step"].is_floating_point():
            assert a["step"].dtype == b["step"].dtype
    # With torch's moments replaced by our own, everything continues bit for bit.
    for p, state in zip(params_of(ours), kept, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            ours.state[p][name].copy_(torch.tensor(state[name]))
    train(ours, 2, seed=8)
    train(reference, 2, seed=8)
    for a, b in zip(everything(ours), everything(reference), strict=True):
        assert float(a["step"].item()) == 5.0
        for name in ("param", "exp_avg", "exp_avg_sq"):
            assert_same_bits(a[name], b[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_an_older_torch(kind: Any) -> None:
    saved = STOCK[kind](leaves(), weight_decay=0.3)
    train(saved, 2)
    state = copy.deepcopy(saved.state_dict())
    for name in (
        "amsgrad",
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "fused",
        "decoupled_weight_decay",
    ):
        del state["param_groups"][0][name]
    ours, theirs = kind(leaves()), STOCK[kind](leaves())
    ours.load_state_dict(copy.deepcopy(state))
    theirs.load_state_dict(copy.deepcopy(state))
    for name, value in theirs.param_groups[0].items():
        if name != "params":
            assert ours.param_groups[0][name] == value, name
    reference = kind(leaves(), weight_decay=0.3)
    reference.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(ours, 2)
    train(reference, 2)
    assert_everything_same_bits(everything(ours), everything(reference))


def test_extras_that_are_off_leave_no_trace() -> None:
    groups = [{"params": leaves([(3,)]), "ema_decay": None}, {"params": leaves([(4,)])}]
    ours = Adam(groups, **EXTRAS)
    assert "ema_decay" not in ours.param_groups[0]
    train(ours, 1)
    assert ["ema" in state for state in everything(ours)] == [False, True]
    # As a user or a checkpoint of an earlier version may leave the entries.
    ours.param_groups[1].update(max_grad_norm=None, ema_decay=None, zero_grad_in_step=False)
    state = ours.state_dict()
    assert not set(EXTRAS) & set(state["param_groups"][1])
    off = {"max_grad_norm": None, "ema_decay": None, "zero_grad_in_step": False}
    state["param_groups"][0].update(off)
    ours.load_state_dict(state)
    assert not set(EXTRAS) & set(ours.param_groups[0])
    assert set(EXTRAS) <= set(ours.defaults)
    plain = Adam(leaves())
    plain.__setstate__({"defaults": plain.defaults | off, "param_groups": plain.param_groups})
    assert not set(EXTRAS) & set(plain.defaults)


def test_capturable_of_a_checkpoint_from_a_gpu_changes_nothing() -> None:
    saved = torch.optim.Adam(leaves())
    train(saved, 2)
    state = saved.state_dict()
    plain, ours = Adam(leaves()), Adam(leaves())
    plain.load_state_dict(copy.deepcopy(state))
    state["param_groups"][0]["capturable"] = True
    ours.load_state_dict(copy.deepcopy(state))
    train(plain, 2)
    train(ours, 2)
    assert_everything_same_bits(everything(ours), everything(plain))


def test_one_count_for_all_parameters_becomes_one_for_each() -> None:
    # As other programs' formats store it.
    ours, plain = Adam(leaves()), Adam(leaves())
    train(ours, 2)
    train(plain, 2)
    saved = ours.state_dict()
    for state in saved["state"].values():
        state["step"] = saved["state"][0]["step"]
    ours.load_state_dict(saved)
    train(ours, 2)
    train(plain, 2)
    assert_everything_same_bits(everything(ours), everything(plain))


def test_checkpoint_made_with_what_is_refused() -> None:
    name = "differentiable"
    saved = torch.optim.Adam(leaves())
    train(saved, 2)
    state = saved.state_dict()
    state["param_groups"][0][name] = True
    ours = Adam(leaves())
    train(ours, 1)
    # A step must not silently differ from what the group says.
    ours.load_state_dict(state)
    with pytest.raises(ValueError, match=rf"{name}.*Received: .*True"):
        train(ours, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_matched_by_position(kind: Any) -> None:
    def two(first: int) -> list[dict[str, Any]]:
        lrs = [0.1, 0.001]
        sets = [leaves([(3,)], seed=1), leaves([(3,)], seed=2)]
        return [{"params": sets[i], "lr": lrs[i]} for i in (first, 1 - first)]

    saved = STOCK[kind](two(0))
    train(saved, 3)
    ours, theirs = kind(two(1)), STOCK[kind](two(1))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved.state_dict())
    assert [g["lr"] for g in ours.param_groups] == [0.1, 0.001]
    assert_everything_same_bits(everything(ours), everything(theirs))


@pytest.mark.parametrize(
    "params",
    [lambda: [{"params": leaves([(3,)])}] * 1, lambda: leaves([(3,), (4,), (5,)])],
    ids=["another number of groups", "another number of parameters"],
)
def test_checkpoint_that_does_not_fit(params: Callable[[], Any]) -> None:
    saved = Adam([{"params": leaves([(3,)])}, {"params": leaves([(4,)])}])
    train(saved, 1)
    ours = Adam(params())
    train(ours, 2)
    before = everything(ours)
    with pytest.raises(ValueError, match="loaded state dict"):
        ours.load_state_dict(saved.state_dict())
    assert_everything_same_bits(everything(ours), before)


def test_state_of_what_is_no_parameter_is_kept() -> None:
    # As torch stores it, for other programs' formats.
    saved = torch.optim.Adam(leaves())
    train(saved, 1)
    state = copy.deepcopy(saved.state_dict())
    state["state"]["note"] = {"step": 1, "exp_avg": torch.ones(2)}
    ours: Any = Adam(leaves())
    ours.load_state_dict(state)
    assert ours.state["note"]["exp_avg"].tolist() == [1.0, 1.0]
    train(ours, 1)
    assert "note" in ours.state_dict()["state"]


def test_torch_distributed_reads_and_writes_it() -> None:
    # This function creates state by a step with zero gradients and lr 0, then loads into it.
    tools: Any = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    twin = copy.deepcopy(model)
    optimizer, other = AdamW(model.parameters(), lr=0.1), AdamW(twin.parameters(), lr=0.7)
    train(optimizer, 3)
    saved = tools.get_optimizer_state_dict(model, optimizer)
    assert saved["state"]["0.weight"]["step"] == 3
    twin.load_state_dict(model.state_dict())
    tools.set_optimizer_state_dict(twin, other, copy.deepcopy(saved))
    assert other.param_groups[0]["lr"] == 0.1
    train(optimizer, 2)
    train(other, 2)
    assert_everything_same_bits(everything(other), everything(optimizer))


# torch cannot load a state dict that is both full and flat into its own optimizers either.
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("chosen", [None, "full_state_dict", "flatten_optimizer_state_dict"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kinds", [(AdamW, "stock"), ("stock", AdamW), (AdamW, AdamW)])
def test_distributed_state_dicts_go_both_ways(
    kinds: tuple[Any, Any], frozen: bool, chosen: str | None, offload: bool
) -> None:
    tools: Any = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = tools.StateDictOptions(
        **({chosen: True} if chosen else {}), cpu_offload=offload, ignore_frozen_params=frozen
    )
    sides = []
    for kind, lr in zip(kinds, (0.1, 0.7), strict=True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        model[1].bias.requires_grad_(not frozen)
        weights, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
        groups = [{"params": weights, "lr": lr}, {"params": biases, "weight_decay": 0.0}]
        sides.append((model, (torch.optim.AdamW if kind == "stock" else kind)(groups)))
    (model, optimizer), (twin, other) = sides
    for i in range(3):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(i))).square().sum().backward()
        optimizer.step()
    saved = tools.get_optimizer_state_dict(model, optimizer, options=options)
    tools.set_optimizer_state_dict(twin, other, copy.deepcopy(saved), options=options)
    twin.load_state_dict(model.state_dict())
    assert [g["lr"] for g in other.param_groups] == [0.1, 1e-3]
    trained = [s for s in everything(optimizer) if len(s) > 1]
    assert_everything_same_bits([s for s in everything(other) if len(s) > 1], trained)
    for of, optimizer_of in sides:
        optimizer_of.zero_grad()
        of(torch.full((2, 4), 0.5)).square().sum().backward()
        optimizer_of.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # One step with about ten roundings.
        np.testing.assert_allclose(array(q), array(p), rtol=1e-6, atol=1e-8)


# -- saving and loading -----------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad and decay": {"amsgrad": True, "weight_decay": 0.1},
    "lr as a tensor": {"lr": torch.tensor(0.02)},
    "extras": EXTRAS,
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_resume(kind: Any, options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    one = kind(leaves(SHAPES, dtype), **copy.deepcopy(options))
    train(one, 5)
    params = [p.detach().clone().requires_grad_() for p in params_of(one)]
    two = kind(params)
    two.load_state_dict(through_a_file(one.state_dict(), tmp_path))
    train(one, 5, seed=11)
    train(two, 5, seed=11)
    assert_everything_same_bits(everything(two), everything(one))


def test_loading_over_a_training(tmp_path: Path) -> None:
    # Anything prepared for the old state must be discarded.
    optimizer = Adam(leaves(), **EXTRAS)
    train(optimizer, 3)
    saved = through_a_file(
        {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params_of(optimizer)]},
        tmp_path,
    )
    train(optimizer, 4, seed=5)
    expected = everything(optimizer)
    with torch.no_grad():
        for p, old in zip(params_of(optimizer), saved["params"], strict=True):
            p.copy_(old)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, 4, seed=5)
    assert_everything_same_bits(everything(optimizer), expected)


def test_state_dict_shows_the_present_and_a_copy_does_not() -> None:
    optimizer = Adam(leaves())
    train(optimizer, 1)
    live = optimizer.state_dict()
    copied = copy.deepcopy(live)
    train(optimizer, 1)
    assert live["state"][0]["step"] == 2
    assert copied["state"][0]["step"] == 1
    assert_same_bits(array(live["state"][0]["exp_avg"]), everything(optimizer)[0]["exp_avg"])


def by_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def by_torch(x: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_an_optimizer(
    kind: Any, options: dict[str, Any], how: Callable[[Any], Any], steps: int
) -> None:
    optimizer = kind(leaves(), **copy.deepcopy(options))
    train(optimizer, steps)
    twin = how(optimizer)
    assert type(twin) is kind
    assert_everything_same_bits(everything(twin), everything(optimizer))
    assert twin.defaults == optimizer.defaults
    before = everything(optimizer)
    train(twin, 2, seed=6)
    assert_everything_same_bits(everything(optimizer), before)
    train(optimizer, 2, seed=6)
    assert_everything_same_bits(everything(twin), everything(optimizer))
    twin.add_param_group({"params": leaves([(2,)], seed=1)})
    train(twin, 1)


def test_copy_together_with_its_model() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters())
    train(optimizer, 2)
    twin, copied = copy.deepcopy((model, optimizer))
    assert all(p is q for p, q in zip(twin.parameters(), params_of(copied), strict=True))
    train(copied, 1)
    assert not torch.equal(twin.weight, model.weight)


def test_hooks_and_scaler_after_unpickling() -> None:
    twin = by_pickle(AdamW(leaves()))
    seen: list[str] = []
    twin.register_step_post_hook(lambda *_: seen.append("after"))
    twin.grad_scale, twin.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    before = everything(twin)
    train(twin, 1)
    assert seen == ["after"]
    assert [s["param"].tolist() for s in everything(twin)] == [s["param"].tolist() for s in before]


# -- state edited by others -------------------------------------------------------------------


def each_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    def edit(optimizer: Any) -> None:
        for p in params_of(optimizer):
            change(optimizer.state[p])

    return edit


def replace(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({name: make(state[name])})


def first_state(change: Callable[[Any, Any], Any]) -> Callable[[Any], None]:
    return lambda optimizer: change(optimizer.state, params_of(optimizer)[0])


def resize(t: Any) -> None:
    kept = t.clone()
    t.set_(torch.empty(kept.numel() + 3)[3:].view(kept.shape))
    t.copy_(kept * 3)


def transpose(state: dict[str, Any]) -> None:
    t = state["exp_avg"]
    if t.dim() == 2:
        kept = t.clone()
        t.set_(t.t().contiguous().t())
        t.copy_(kept * 2)


EDITS: dict[str, Callable[[Any], Any]] = {
    "a moment scaled in place": each_state(lambda s: s["exp_avg"].mul_(0.5)),
    "a moment set to zero in place": each_state(lambda s: s["exp_avg_sq"].zero_()),
    "a moment replaced": each_state(replace("exp_avg", lambda t: t * 2)),
    "both moments exchanged in name": each_state(
        lambda s: s.update(exp_avg=s["exp_avg_sq"], exp_avg_sq=s["exp_avg"].abs())
    ),
    "a moment given other memory": each_state(lambda s: resize(s["exp_avg"])),
    "a moment's data replaced": each_state(
        lambda s: setattr(s["exp_avg_sq"], "data", s["exp_avg_sq"] * 2)
    ),
    "the maximum replaced": each_state(replace("max_exp_avg_sq", lambda t: t * 4)),
    "an average replaced": each_state(replace("ema", lambda t: t + 1)),
    "a count replaced": each_state(replace("step", lambda _: torch.tensor(40.0))),
    "a count set in place": each_state(lambda s: s["step"].fill_(1)),
    "a moment transposed in place": each_state(transpose),
    "all state cleared": lambda optimizer: optimizer.state.clear(),
    "the state of one parameter deleted": first_state(lambda state, p: state.pop(p)),
    "the state of one parameter emptied": first_state(lambda state, p: state[p].clear()),
    "the state of one parameter replaced": first_state(
        lambda state, p: state.update({p: {k: t * 2 for k, t in state[p].items()}})
    ),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_edited_state_is_what_the_next_step_uses(kind: Any, change: Callable[[Any], Any]) -> None:
    optimizer = kind(leaves(), amsgrad=True, ema_decay=0.9)
    train(optimizer, 3)
    change(optimizer)
    # An optimizer that has never stepped, so it has cached nothing.
    fresh = kind(
        [p.detach().clone().requires_grad_() for p in params_of(optimizer)],
        amsgrad=True,
        ema_decay=0.9,
    )
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    unedited = everything(optimizer)
    for seed in (5, 6):
        train(optimizer, 1, seed=seed)
        train(fresh, 1, seed=seed)
        assert_everything_same_bits(everything(optimizer), everything(fresh))
    assert not np.array_equal(everything(optimizer)[0]["param"], unedited[0]["param"])


def no_edit(_: Any) -> None:
    pass


def other_memory(optimizer: Any) -> None:
    for p in params_of(optimizer):
        p.data = p.data.clone()


def other_layout(optimizer: Any) -> None:
    for p in params_of(optimizer):
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def other_parameter(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    optimizer.state.pop(params[0], None)
    params[0] = params[0].detach().clone().requires_grad_()


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


MORE_EDITS: dict[str, Callable[[Any], Any]] = {
    "nothing": no_edit,
    "parameters in other memory": other_memory,
    "parameters in another layout": other_layout,
    "another first parameter": other_parameter,
    "a checkpoint loaded": loaded,
    "averages exchanged and back": lambda optimizer: (optimizer.swap_ema(), optimizer.swap_ema()),
    "another lr": lambda optimizer: optimizer.param_groups[0].update(lr=0.5),
    "averages off": lambda optimizer: optimizer.param_groups[0].update(ema_decay=None),
    "averages on": lambda optimizer: optimizer.param_groups[0].update(ema_decay=0.25),
    "another group": lambda optimizer: optimizer.add_param_group(
        {"params": leaves([(2, 2)], seed=3)}
    ),
}


@settings(max_examples=40)
@given(st.data())
def test_any_sequence_of_edits(data: st.DataObject) -> None:
    shapes = [(4, 3), (), (3, 3)]
    optimizer = Adam(leaves(shapes), amsgrad=True, ema_decay=0.9)
    train(optimizer, 1)
    edits = EDITS | MORE_EDITS
    names = st.lists(st.sampled_from(list(edits)), min_size=1, max_size=6)
    for seed, name in enumerate(data.draw(names)):
        # The state that an edit refers to may be missing, including averages.
        with contextlib.suppress(KeyError, ValueError):
            edits[name](optimizer)
        missing = st.sets(st.sampled_from(range(len(shapes))), max_size=1)
        absent = data.draw(missing)
        fresh = Adam(
            [
                {"params": [p.detach().clone().requires_grad_() for p in group["params"]]}
                for group in optimizer.param_groups
            ]
        )
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for of in (optimizer, fresh):
            params = params_of(of)
            grads = grads_like(np.random.default_rng(seed), params)
            set_grads(params, [None if i in absent else g for i, g in enumerate(grads)])
            of.step()
        assert_everything_same_bits(
            everything(optimizer), everything(fresh), f"edit {seed}, {name}"
        )


def test_edited_state_beside_torch() -> None:
    ours, theirs = (k(leaves([(40,)])) for k in (Adam, torch.optim.Adam))
    for optimizer in (ours, theirs):
        train(optimizer, 3)
        each_state(lambda s: s["exp_avg"].mul_(-7))(optimizer)
        train(optimizer, 1)
        first_state(lambda state, p: state[p]["step"].fill_(0))(optimizer)
        train(optimizer, 1)
        optimizer.state.clear()
        train(optimizer, 2)
    a, b = everything(ours)[0], everything(theirs)[0]
    assert a["step"] == b["step"] == 2
    # Seven steps with about ten roundings each, for values up to 2**8.
    np.testing.assert_allclose(a["param"], b["param"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "lay_out",
    [lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], dim=-1)[..., 0]],
    ids=["transposed", "with gaps"],
)
def test_moment_of_another_layout_put_in_by_hand(lay_out: Callable[[Any], Any]) -> None:
    p, q = leaves([(4, 6)]) + leaves([(4, 6)])
    optimizer, reference = Adam([p]), Adam([q])
    for of in (optimizer, reference):
        train(of, 2)
    optimizer.state[p]["exp_avg"] = lay_out(optimizer.state[p]["exp_avg"])
    for of in (optimizer, reference):
        train(of, 2)
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_parameter_replaced_in_its_group() -> None:
    optimizer = Adam(leaves([(3,), (4,)]))
    train(optimizer, 2)
    late = leaves([(6,)], seed=4)[0]
    alone = Adam(leaves([(6,)], seed=4))
    optimizer.param_groups[0]["params"][1] = late
    for _ in range(2):
        set_grads(params_of(optimizer), [torch.ones(3), torch.ones(6)])
        optimizer.step()
        stepped(alone, [torch.ones(6)])
    assert_everything_same_bits(everything(optimizer)[1:], everything(alone))


@pytest.mark.parametrize("where", [0, 1])
def test_parameter_taken_out_of_its_group(where: int) -> None:
    optimizer, alone = Adam(leaves([(3,), (3,)])), Adam([leaves([(3,), (3,)])[1 - where]])
    g = torch.arange(3.0)
    for i in range(4):
        if i == 2:
            optimizer.param_groups[0]["params"].pop(where)
        stepped(optimizer, [g] * len(params_of(optimizer)))
        stepped(alone, [g])
    assert_everything_same_bits(everything(optimizer), everything(alone))
