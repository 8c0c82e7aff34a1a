# SPDX-License-Identifier: MIT
"""`fusedadam.torch` in common training loops: schedulers, scaler, hooks, threads, contexts."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_all_same_bits

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch_helpers import (
    KINDS,
    LARGE,
    SHAPES,
    STOCK,
    Twins,
    array,
    arrays,
    assert_everything_same_bits,
    everything,
    leaves,
    set_grads,
    stepped,
    train,
)

schedulers = torch.optim.lr_scheduler


# -- a stock loop -----------------------------------------------------------------------------


class Tagger(torch.nn.Module):  # type: ignore[misc]
    """A small model with every kind of parameter that parameter groups usually distinguish."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(30, 8)
        self.LayerNorm = torch.nn.LayerNorm(8)
        self.hidden = torch.nn.Linear(8, 16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, tokens: Any) -> Any:
        x = self.LayerNorm(self.embedding(tokens))
        return self.head(torch.nn.functional.gelu(self.hidden(x)))


def usual_groups(model: Any) -> list[dict[str, Any]]:
    """The parameter groups of Hugging Face's examples: no decay for biases and norms."""
    no_decay = ("bias", "LayerNorm.weight")
    named = list(model.named_parameters())
    return [
        {
            "params": [p for n, p in named if not any(word in n for word in no_decay)],
            "weight_decay": 0.1,
        },
        {
            "params": [p for n, p in named if any(word in n for word in no_decay)],
            "weight_decay": 0.0,
        },
    ]


def stock_loop(
    kind: Any, dtype: str, *, clip: bool = True, **options: Any
) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    model = Tagger().to(getattr(torch, dtype))
    tokens = torch.randint(0, 30, (16, 6, 5))
    labels = tokens % 4
    optimizer = kind(usual_groups(model), lr=1e-3, **options)
    steps, accumulation = 30, 4
    scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    losses = []
    for i in range(steps * accumulation):
        batch = i % len(tokens)
        logits = model(tokens[batch])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[batch].flatten())
        (loss / accumulation).backward()
        losses.append(loss.item())
        if (i + 1) % accumulation == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_stock_loop(kind: Any) -> None:
    ours, optimizer = stock_loop(kind, "float64")
    theirs, stock = stock_loop(STOCK[kind], "float64")
    # 30 steps of a smooth loss amplify a rounding of 2**-53 some thousand times.
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    for a, b in zip(everything(optimizer), everything(stock), strict=True):
        for name, expected in b.items():
            np.testing.assert_allclose(a[name], expected, rtol=1e-7, atol=1e-10, err_msg=name)
    assert ours[-1] < ours[0]


def test_stock_loop_in_float32_with_the_extras() -> None:
    theirs, _ = stock_loop(torch.optim.AdamW, "float32")
    ours, optimizer = stock_loop(
        AdamW, "float32", clip=False, max_grad_norm=1.0, ema_decay=0.9, zero_grad_in_step=True
    )
    # The same training in float32. Its roundings are amplified, and torch adds 1e-6 to the norm.
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-3)
    assert ours[-1] < ours[0]
    assert all("ema" in state for state in everything(optimizer))


# -- schedulers -------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "LambdaLR to zero": lambda o: schedulers.LambdaLR(o, lambda t: max(0.0, 1 - t / 8)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.1),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR, which moves beta_1 too": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=12),
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
SCHEDULED_STEPS = 10


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
def test_schedulers_beside_torch(make: Callable[[Any], Any], lr: Any) -> None:
    both = Twins(AdamW, shapes=[(7, 3), (5,)], lr=lr)
    pair = [make(both.optimizer), make(both.stock)]
    for i in range(SCHEDULED_STEPS):
        both.step()
        both.check(f"step {i + 1},")
        for scheduler in pair:
            metric = () if not isinstance(scheduler, schedulers.ReduceLROnPlateau) else (1.0,)
            scheduler.step(*metric)
        ours, theirs = (o.param_groups[0] for o in (both.optimizer, both.stock))
        assert float(ours["lr"]) == float(theirs["lr"])
        assert ours["betas"] == theirs["betas"]


def test_scheduler_and_optimizer_resume_together() -> None:
    def make() -> tuple[Any, Any]:
        optimizer = AdamW(leaves(), lr=0.01)
        return optimizer, schedulers.OneCycleLR(optimizer, 0.1, total_steps=12)

    def go(optimizer: Any, scheduler: Any, steps: int, seed: int) -> None:
        for i in range(steps):
            train(optimizer, 1, seed=seed + i)
            scheduler.step()

    one, two = make(), make()
    go(*one, 5, 0)
    saved = copy.deepcopy([x.state_dict() for x in one])
    set_params(two[0], [s["param"] for s in everything(one[0])])
    for x, state in zip(two, saved, strict=True):
        x.load_state_dict(state)
    go(*one, 6, 50)
    go(*two, 6, 50)
    assert_everything_same_bits(everything(two[0]), everything(one[0]))
    assert one[1].get_last_lr() == two[1].get_last_lr()


def set_params(optimizer: Any, values: list[Any]) -> None:
    with torch.no_grad():
        for p, value in zip(optimizer.param_groups[0]["params"], values, strict=True):
            p.copy_(torch.as_tensor(value))


def test_scheduler_notices_a_missing_step() -> None:
    # A scheduler counts the calls of `step` by wrapping it.
    optimizer = AdamW(leaves())
    scheduler = schedulers.StepLR(optimizer, 2)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


# -- the scaler -------------------------------------------------------------------------------


class Scaled:
    """A quadratic loss whose scaled gradients overflow in some steps."""

    def __init__(self, kind: Any, **options: Any) -> None:
        self.params = leaves([(6, 4), (9,)], "float64")
        self.optimizer = kind(self.params, lr=0.05, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def step(self, factor: float, *, unscale: bool) -> None:
        self.optimizer.zero_grad()
        loss = factor * sum(((p - 0.5) ** 2).sum() for p in self.params)
        self.scaler.scale(loss).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()


# Half of the largest number, finite until it is scaled.
HUGE = 2.0**1023
FACTORS = [1.0, 2.0, HUGE, 0.5, 1.0, HUGE, HUGE, 1.0, 1e-3, 2.0, 1.0, HUGE, 1.0, 1.0]


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_scaler(kind: Any, fused: bool | None, unscale: bool) -> None:
    ours, theirs = Scaled(kind, fused=fused), Scaled(STOCK[kind], fused=fused)
    for i, factor in enumerate(FACTORS):
        before = everything(ours.optimizer)
        for side in (ours, theirs):
            side.step(factor, unscale=unscale)
        assert ours.scaler.get_scale() == theirs.scaler.get_scale(), i
        counts = [s.get("step", 0.0) for s in everything(ours.optimizer)]
        assert counts == [s.get("step", 0.0) for s in everything(theirs.optimizer)], i
        if factor == HUGE:
            # Skipped: at most, zero-initialized state was created.
            for state, old in zip(everything(ours.optimizer), before, strict=True):
                for name, kept in old.items():
                    assert np.array_equal(state[name], kept), name
        for p, q in zip(ours.params, theirs.params, strict=True):
            # Gradients are left unscaled, as torch leaves them. The roundings of 14 steps add up.
            np.testing.assert_allclose(array(p.grad), array(q.grad), rtol=1e-11, atol=1e-13)
            np.testing.assert_allclose(array(p), array(q), rtol=1e-12, atol=1e-13)
    for a, b in zip(everything(ours.optimizer), everything(theirs.optimizer), strict=True):
        for name, expected in b.items():
            np.testing.assert_allclose(a[name], expected, rtol=1e-11, atol=1e-13, err_msg=name)
    assert counts[0] == len([factor for factor in FACTORS if factor != HUGE])
    assert not hasattr(ours.optimizer, "grad_scale")


@pytest.mark.parametrize("fused", [None, True], ids=["", "fused"])
def test_scale_of_a_power_of_two_changes_no_bit(fused: bool | None) -> None:
    ours, plain = Scaled(AdamW, fused=fused), leaves([(6, 4), (9,)], "float64")
    reference = AdamW(plain, lr=0.05)
    for factor in (1.0, 2.0, 0.5, 1.0, 1.0, 0.25):
        ours.step(factor, unscale=False)
        reference.zero_grad()
        (factor * sum(((p - 0.5) ** 2).sum() for p in plain)).backward()
        reference.step()
    assert_everything_same_bits(everything(ours.optimizer), everything(reference))


@pytest.mark.parametrize("fused", [None, True], ids=["", "fused"])
def test_norm_is_that_of_unscaled_gradients(fused: bool | None) -> None:
    ours = Scaled(Adam, fused=fused, max_grad_norm=0.5)
    plain = leaves([(6, 4), (9,)], "float64")
    reference = Adam(plain, lr=0.05, max_grad_norm=0.5)
    for _ in range(4):
        ours.step(1.0, unscale=False)
        reference.zero_grad()
        sum(((p - 0.5) ** 2).sum() for p in plain).backward()
        reference.step()
    for a, b in zip(everything(ours.optimizer), everything(reference), strict=True):
        for name, expected in b.items():
            np.testing.assert_allclose(a[name], expected, rtol=1e-12, err_msg=name)


def test_scale_and_overflow_set_by_hand() -> None:
    # The protocol that GradScaler and similar scalers use.
    optimizer: Any = Adam(leaves([(5,)]))
    reference = Adam(leaves([(5,)]))
    g = torch.arange(5.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    stepped(optimizer, [4 * g])
    stepped(reference, [g])
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert torch.equal(optimizer.param_groups[0]["params"][0].grad, g)
    optimizer.found_inf = torch.tensor(1.0)
    stepped(optimizer, [torch.full((5,), math.inf)])
    assert_everything_same_bits(everything(optimizer), everything(reference))
    del optimizer.grad_scale, optimizer.found_inf
    stepped(optimizer, [g])
    stepped(reference, [g])
    assert_everything_same_bits(everything(optimizer), everything(reference))


NUMBERS: dict[str, Callable[[float], Any]] = {
    "numbers": float,
    "int": int,
    "float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "float16": lambda x: torch.tensor(x, dtype=torch.float16),
    "one element": lambda x: torch.tensor([x]),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_scale_and_overflow_of_any_type(number: Callable[[float], Any]) -> None:
    optimizer: Any = Adam(leaves([(5,)]))
    reference = Adam(leaves([(5,)]))
    g = torch.arange(5.0)
    optimizer.grad_scale, optimizer.found_inf = number(4.0), number(0.0)
    stepped(optimizer, [4 * g])
    stepped(reference, [g])
    optimizer.found_inf = number(2.0)
    stepped(optimizer, [g])
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_scaler_of_two_optimizers_of_which_one_has_no_gradients() -> None:
    # found_inf of an optimizer without gradients is then an empty sum, the int 0.
    sides = []
    for kind in (Adam, torch.optim.Adam):
        used, idle = (kind(leaves([(5,)]), fused=True) for _ in range(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale((used.param_groups[0]["params"][0] ** 2).sum()).backward()
        for optimizer in (used, idle):
            if kind is Adam or optimizer is used:
                scaler.step(optimizer)
        scaler.update()
        assert not idle.state
        sides.append(everything(used)[0])
    ours, theirs = sides
    # One step with about ten roundings.
    np.testing.assert_allclose(ours["param"], theirs["param"], rtol=1e-6)


@pytest.mark.parametrize(
    "scale", [2.0**127, 3.4e38, 2.0**-127, 2.0**-140, -8.0, math.inf, math.nan]
)
@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("layout", ["dense", "transposed", "sparse"])
def test_scale_of_any_float32(scale: float, zeroes: bool, layout: str) -> None:
    p, q = leaves([(4, 3)]) + leaves([(4, 3)])
    ours: Any = Adam([p], zero_grad_in_step=zeroes)
    theirs: Any = torch.optim.Adam([q], fused=True)
    with np.errstate(all="ignore"):
        g = torch.linspace(-2, 2, 12).reshape(4, 3) * torch.tensor(scale or 1.0)
    g = g.clamp(-3.4e38, 3.4e38)
    for of in (ours, theirs):
        of.grad_scale, of.found_inf = torch.tensor(scale), torch.tensor(0.0)
    for _ in range(3):
        q.grad = g.clone()
        p.grad = {
            "dense": g.clone,
            "transposed": lambda: g.t().contiguous().t(),
            "sparse": lambda: g.to_sparse(1),
        }[layout]()
        ours.step()
        theirs.step()
        if zeroes:
            assert not array(p.grad).any()
        else:
            np.testing.assert_array_equal(array(p.grad), array(q.grad))
    if layout == "sparse":
        return  # uses the epsilon of SparseAdam
    for name, expected in everything(theirs)[0].items():
        # Three steps with about ten roundings each. The reciprocal that torch multiplies by has
        # fewer digits than a division if the scale is subnormal.
        np.testing.assert_allclose(
            everything(ours)[0][name], expected, rtol=1e-5, atol=1e-30, err_msg=name
        )


def test_scaler_that_is_off() -> None:
    optimizer: Any = Adam(leaves([(5,)]))
    reference: Any = Adam(leaves([(5,)]))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for of, step in ((optimizer, lambda: scaler.step(optimizer)), (reference, reference.step)):
        set_grads(of.param_groups[0]["params"], [torch.arange(5.0)])
        step()
    assert_everything_same_bits(everything(optimizer), everything(reference))


# -- hooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_step_hooks(kind: Any) -> None:
    optimizer = kind(leaves([(3,)]))
    seen: list[tuple[str, float]] = []

    def count(name: str) -> Callable[..., None]:
        def hook(of: Any, args: Any, kwargs: Any) -> None:
            assert of is optimizer
            assert len(args) + len(kwargs) >= 1
            state = everything(optimizer)[0]
            seen.append((name, float(state.get("step", 0))))

        return hook

    first = optimizer.register_step_pre_hook(count("before"))
    second = optimizer.register_step_post_hook(count("after"))
    everywhere = register_optimizer_step_pre_hook(count("global"))
    try:
        train(optimizer, 2)
    finally:
        everywhere.remove()
    rounds = [
        ("global", 0),
        ("before", 0),
        ("after", 1),
        ("global", 1),
        ("before", 1),
        ("after", 2),
    ]
    assert seen == rounds
    first.remove()
    second.remove()
    train(optimizer, 1)
    assert seen == rounds


def test_pre_hook_changes_what_the_step_gets() -> None:
    optimizer, reference = Adam(leaves([(3,)])), Adam(leaves([(3,)]))
    calls = []

    def halve(of: Any, args: Any, kwargs: Any) -> Any:
        for p in of.param_groups[0]["params"]:
            p.grad.mul_(0.5)
        return args, kwargs | {"closure": lambda: calls.append(1)}

    optimizer.register_step_pre_hook(halve)
    stepped(optimizer, [torch.ones(3)])
    stepped(reference, [torch.ones(3) / 2])
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert calls == [1]


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


def test_hooks_of_tensors_and_gradients() -> None:
    model = torch.nn.Linear(3, 1)
    twin = copy.deepcopy(model)
    optimizer, reference = Adam(model.parameters()), Adam(twin.parameters())
    model.weight.register_hook(lambda g: 2 * g)

    def shift(p: Any) -> None:
        p.grad += 1

    model.bias.register_post_accumulate_grad_hook(shift)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    twin(torch.ones(2, 3)).sum().backward()
    twin.weight.grad.mul_(2)
    twin.bias.grad.add_(1)
    reference.step()
    assert_everything_same_bits(everything(optimizer), everything(reference))


# -- freed gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool, how: dict[str, Any]) -> None:
    optimizer = Adam(leaves(), **how)
    train(optimizer, 1)
    params = optimizer.param_groups[0]["params"]
    optimizer.zero_grad(set_to_none=to_none)
    if to_none:
        assert all(p.grad is None for p in params)
        optimizer.step()
        assert [s["step"] for s in everything(optimizer)] == [1] * len(SHAPES)
    else:
        assert all(not p.grad.any() for p in params)
        # A gradient of zeros is a gradient.
        optimizer.step()
        assert [s["step"] for s in everything(optimizer)] == [2] * len(SHAPES)


# -- contexts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_contexts(context: Any) -> None:
    optimizer, reference = Adam(leaves()), Adam(leaves())
    train(reference, 3)
    with context():
        before = torch.is_grad_enabled()
        train(optimizer, 3)
        assert torch.is_grad_enabled() == before
        assert_everything_same_bits(everything(optimizer), everything(reference))


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        optimizer = AdamW([torch.ones(3, requires_grad=True)], lr=0.5)
        stepped(optimizer, [torch.ones(3)])
        np.testing.assert_allclose(everything(optimizer)[0]["param"], 0.495, rtol=1e-6)


def test_profiler() -> None:
    optimizer = AdamW(leaves())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, 2)
        optimizer.zero_grad()
    names = {event.key: event.count for event in profile.key_averages()}
    assert names["Optimizer.step#AdamW.step"] == 2
    assert names["Optimizer.zero_grad#AdamW.zero_grad"] == 1


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode() -> None:
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    optimizer, reference = AdamW(model.parameters()), AdamW(twin.parameters())
    with torch.autograd.set_detect_anomaly(True):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    twin(torch.ones(3)).sum().backward()
    reference.step()
    assert_everything_same_bits(everything(optimizer), everything(reference))


@pytest.mark.parametrize("kind", KINDS)
def test_default_dtype_of_float64(kind: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        twin = copy.deepcopy(model)
        ours, theirs = kind(model.parameters()), STOCK[kind](twin.parameters())
        for _ in range(20):
            for net, optimizer in ((model, ours), (twin, theirs)):
                optimizer.zero_grad()
                net(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        assert a["step"].dtype == b["step"].dtype == np.float64
        for name, expected in b.items():
            # 20 steps with about ten roundings each, for values around 1.
            np.testing.assert_allclose(a[name], expected, rtol=1e-12, atol=1e-14, err_msg=name)


def test_flushing_and_rounding_of_the_caller_are_left_alone() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        optimizer = Adam(leaves())
        train(optimizer, 2)
        assert (torch.tensor([1e-40]) * 0.5).item() == 0.0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_two_optimizers_at_once_in_two_threads(shapes: list[tuple[int, ...]]) -> None:
    kinds = [Adam, AdamW]
    together, alone = ([k(leaves(shapes), ema_decay=0.9) for k in kinds] for _ in range(2))
    failures: list[BaseException] = []

    def run(optimizer: Any) -> None:
        try:
            train(optimizer, 10)
        except BaseException as e:  # noqa: BLE001 - reported to the test
            failures.append(e)

    threads = [threading.Thread(target=run, args=(optimizer,)) for optimizer in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for a, b in zip(together, alone, strict=True):
        train(b, 10)
        assert_everything_same_bits(everything(a), everything(b))


def test_step_in_another_thread_than_the_backward() -> None:
    model = torch.nn.Linear(300, 200)
    twin = copy.deepcopy(model)
    optimizer, reference = Adam(model.parameters()), Adam(twin.parameters())
    for _ in range(3):
        for net, of in ((model, optimizer), (twin, reference)):
            of.zero_grad()
            net(torch.ones(2, 300)).sum().backward()
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
        reference.step()
    assert_everything_same_bits(everything(optimizer), everything(reference))


# -- the class --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_is_an_optimizer_of_torch(kind: Any) -> None:
    optimizer = kind(leaves())
    assert isinstance(optimizer, STOCK[kind])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(AdamW(leaves()), torch.optim.Adam)
    assert {"lr", "betas", "eps", "weight_decay"} <= set(optimizer.defaults)


@pytest.mark.parametrize("kind", KINDS)
def test_repr(kind: Any) -> None:
    optimizer, stock = (k([{"params": leaves(), "lr": 0.5}]) for k in (kind, STOCK[kind]))
    assert repr(optimizer) == repr(stock)
    assert "\n    ema_decay: 0.9\n" in repr(kind(leaves(), ema_decay=0.9))


def test_subclass() -> None:
    class Logged(AdamW):
        """A typical user subclass: its own options, and an overridden step."""

        def __init__(self, params: Any, *args: Any, verbose: bool = False, **kwargs: Any) -> None:
            super().__init__(params, *args, **kwargs)
            self.verbose = verbose
            self.taken = 0

        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self.taken += 1
            return result

    optimizer, reference = Logged(leaves(), 0.1, verbose=True), AdamW(leaves(), 0.1)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    train(optimizer, 1)
    train(reference, 1)
    scheduler.step()
    reference.param_groups[0]["lr"] = 0.05
    train(optimizer, 1)
    train(reference, 1)
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert optimizer.taken == 2
    assert len(seen) >= 2
    assert repr(optimizer).startswith("Logged (")


def test_swa_and_utilities_of_torch() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )
    optimizer = Adam(model.parameters(), lr=0.01)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(8, 3)).sum().backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
        averaged.update_parameters(model)
    assert int(averaged.n_averaged) == 3
    assert all(torch.isfinite(p).all() for p in averaged.parameters())


def test_parameters_of_a_module_that_was_moved_about() -> None:
    # share_memory_ and to() replace the storage of the same Parameter.
    model, twin = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    twin.load_state_dict(model.state_dict())
    optimizer, reference = AdamW(model.parameters()), AdamW(twin.parameters())
    train(optimizer, 2)
    train(reference, 2)
    model.share_memory()
    train(optimizer, 2)
    train(reference, 2)
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert_all_same_bits(arrays(model.parameters()), arrays(twin.parameters()))
