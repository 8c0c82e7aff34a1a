# SPDX-License-Identifier: MIT
"""`fusedadam.torch.attach`: steps during the backward pass that release each gradient."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fresh_python import output_of
from helpers import assert_same_bits

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW, attach
from torch_helpers import (
    KINDS,
    array,
    assert_everything_same_bits,
    everything,
)


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)
    )


def loss_of(model: Any, i: int) -> Any:
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(i))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def backward_and_step(model: Any, optimizer: Any, i: int) -> None:
    optimizer.zero_grad()
    loss_of(model, i).backward()
    optimizer.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad, averages and decay": {"amsgrad": True, "ema_decay": 0.9, "weight_decay": 0.1},
    "lr as a tensor": {"lr": torch.tensor(0.05)},
    "zero_grad_in_step": {"zero_grad_in_step": True},
    "max_grad_norm 0, which is off": {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_backward_and_step(kind: Any, options: dict[str, Any]) -> None:
    model, twin = model_of(), model_of()
    optimizer, reference = (kind(m.parameters(), **copy.deepcopy(options)) for m in (model, twin))
    attach(model, optimizer)
    for i in range(5):
        loss_of(model, i).backward()
        assert all(p.grad is None for p in model.parameters())
        backward_and_step(twin, reference, i)
        assert_everything_same_bits(everything(optimizer), everything(reference), f"step {i}")


def test_with_groups_and_a_scheduler() -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.1},
        ]

    model, twin = model_of(), model_of()
    optimizer, reference = (AdamW(groups(m), lr=0.01) for m in (model, twin))
    pair = [
        torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=9) for o in (optimizer, reference)
    ]
    attach(model, optimizer)
    for i in range(8):
        loss_of(model, i).backward()
        backward_and_step(twin, reference, i)
        # Warnings are errors here: the scheduler must notice that steps were taken.
        for scheduler in pair:
            scheduler.step()
        assert_everything_same_bits(everything(optimizer), everything(reference), f"step {i}")


def test_remove_restores() -> None:
    model, twin = model_of(), model_of()
    optimizer, reference = Adam(model.parameters()), Adam(twin.parameters())
    handle = attach(model, optimizer)
    loss_of(model, 0).backward()
    backward_and_step(twin, reference, 0)
    handle.remove()
    handle.remove()
    before = everything(optimizer)
    loss_of(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_everything_same_bits(everything(optimizer), before)
    optimizer.step()
    backward_and_step(twin, reference, 1)
    assert_everything_same_bits(everything(optimizer), everything(reference))
    optimizer.zero_grad()
    attach(model, optimizer)
    loss_of(model, 2).backward()
    backward_and_step(twin, reference, 2)
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_as_a_context() -> None:
    model = model_of()
    optimizer = Adam(model.parameters())
    with attach(model, optimizer) as handle:
        assert hasattr(handle, "remove")
        loss_of(model, 0).backward()
    assert [s["step"] for s in everything(optimizer)] == [1] * 6
    with pytest.raises(KeyError), attach(model, optimizer):
        raise KeyError
    loss_of(model, 1).backward()
    assert [s["step"] for s in everything(optimizer)] == [1] * 6
    assert all(p.grad is not None for p in model.parameters())


class Tied(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Any) -> Any:
        return self.head(torch.tanh(self.embedding(words)))


def test_tied_weights() -> None:
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    optimizer, reference = AdamW(model.parameters()), AdamW(twin.parameters())
    attach(model, optimizer)
    words = torch.tensor([1, 2, 2, 8])
    for _ in range(4):
        model(words).square().sum().backward()
        reference.zero_grad()
        twin(words).square().sum().backward()
        reference.step()
    assert [s["step"] for s in everything(optimizer)] == [4]
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = torch.nn.Embedding(9, 4, sparse=True)
    twin = copy.deepcopy(model)
    optimizer, reference = Adam(model.parameters()), Adam(twin.parameters())
    attach(model, optimizer)
    for i in range(3):
        words = torch.tensor([i, 2, 2, 8])
        model(words).square().sum().backward()
        assert model.weight.grad is None
        reference.zero_grad()
        twin(words).square().sum().backward()
        reference.step()
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_parameters_of_others_are_untouched() -> None:
    model, twin = model_of(), model_of()
    own = list(model[0].parameters())
    optimizer, reference = Adam(own), Adam(twin[0].parameters())
    kept = array(model[2].weight)
    attach(model, optimizer)
    loss_of(model, 0).backward()
    backward_and_step(twin, reference, 0)
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert all(p.grad is None for p in own)
    assert model[2].weight.grad is not None
    assert_same_bits(array(model[2].weight), kept)


def test_part_of_the_optimizer() -> None:
    # Parameters outside the model still wait for `step`.
    model, other = model_of(), torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([*model.parameters(), other], lr=0.5)
    attach(model, optimizer)
    other.grad = torch.ones(3)
    loss_of(model, 0).backward()
    assert other.tolist() == [1.0] * 3
    assert other.grad is not None
    assert other not in optimizer.state or not optimizer.state[other].get("step", 0)
    optimizer.step()
    np.testing.assert_allclose(array(other), 0.5, rtol=1e-6)
    assert [s["step"] for s in everything(optimizer)] == [1] * 7


def test_frozen_parameters() -> None:
    model, twin = model_of(), model_of()
    for m in (model, twin):
        m[0].requires_grad_(False)
    optimizer, reference = AdamW(model.parameters()), AdamW(twin.parameters())
    attach(model, optimizer)
    for i in range(2):
        loss_of(model, i).backward()
        backward_and_step(twin, reference, i)
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_parameter_used_by_a_part_of_the_steps() -> None:
    model, twin = model_of(), model_of()
    optimizer, reference = Adam(model.parameters()), Adam(twin.parameters())
    attach(model, optimizer)
    for i in range(4):
        for m in (model, twin):
            x = torch.ones(2, 4) * i
            y = m[0](x) if i % 2 else m[3](m[2](m[0](x)))
            y.square().sum().backward()
        reference.step()
        reference.zero_grad()
    assert_everything_same_bits(everything(optimizer), everything(reference))
    assert [s["step"] for s in everything(optimizer)] == [4, 4, 2, 2, 2, 2]


def test_settings_changed_while_attached() -> None:
    model, twin = model_of(), model_of()
    optimizer, reference = Adam(model.parameters()), Adam(twin.parameters())
    attach(model, optimizer)
    for i, lr in enumerate([0.1, 0.01, 0.5]):
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
        loss_of(model, i).backward()
        backward_and_step(twin, reference, i)
    assert_everything_same_bits(everything(optimizer), everything(reference))


def test_checkpoint_loaded_while_attached() -> None:
    model = model_of()
    optimizer = Adam(model.parameters())
    attach(model, optimizer)
    loss_of(model, 0).backward()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    loss_of(model, 1).backward()
    expected = everything(optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    loss_of(model, 1).backward()
    assert_everything_same_bits(everything(optimizer), expected)


@pytest.mark.parametrize("of", ["the same optimizer", "another"])
def test_parameter_attached_twice_is_refused(of: str) -> None:
    model = model_of()
    optimizer = Adam(model.parameters())
    attachment = attach(model, optimizer)
    # A second optimizer would find no gradients and silently do nothing.
    with pytest.raises(ValueError, match=r"attached once.*remove\(\).*Received: '0.weight' again"):
        attach(model, optimizer if of == "the same optimizer" else Adam(model.parameters()))
    loss_of(model, 0).backward()
    attachment.remove()
    attach(model, optimizer)
    assert [s["step"] for s in everything(optimizer)] == [1] * 6


def test_group_added_later_needs_attaching() -> None:
    model = model_of()
    optimizer = Adam(model[0].parameters())
    handle = attach(model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    handle.remove()
    attach(model, optimizer)
    loss_of(model, 0).backward()
    assert [s["step"] for s in everything(optimizer)] == [1] * 4


def test_stale_graph_is_noticed() -> None:
    # The first backward pass steps weights that the second graph has saved.
    model = model_of()
    attach(model, Adam(model.parameters()))
    stale = loss_of(model, 0)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# -- refused calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_norm_of_all_gradients_is_refused(kind: Any) -> None:
    model = model_of()
    optimizer = kind(model.parameters(), max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"(?s)max_grad_norm.*Received: .+"):
        attach(model, optimizer)
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_norm_switched_on_while_attached() -> None:
    model = model_of()
    optimizer = Adam(model.parameters())
    attach(model, optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    before = everything(optimizer)
    with pytest.raises(ValueError, match="max_grad_norm"):
        loss_of(model, 0).backward()
    assert_everything_same_bits(everything(optimizer), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: (list(m.parameters()), Adam(m.parameters())),
        lambda m: (m, torch.optim.Adam(m.parameters())),
        lambda m: (m, "adam"),
    ],
    ids=["no module", "torch's optimizer", "no optimizer"],
)
def test_arguments(make: Callable[[Any], tuple[Any, Any]]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"(?s)(model|optimizer).*Received: .+"):
        attach(*make(model_of()))


def test_error_of_a_step_ends_the_backward() -> None:
    model = model_of()
    optimizer = Adam(model.parameters())
    attach(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(3)
    before = array(model[0].weight)
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        loss_of(model, 1).backward()
    assert_same_bits(array(model[0].weight), before)


# -- scaled losses ------------------------------------------------------------------------------


class CallersScaler(torch.amp.GradScaler):  # type: ignore[misc] # torch is Any here
    """Overrides `scale`, as ShardedGradScaler does."""

    def scale(self, outputs: Any) -> Any:
        return super().scale(outputs)


def checkpointed(model: Any, *, use_reentrant: bool) -> Any:
    x = torch.ones(2, 4, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
    return out.square().mean()


SCALED_LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "a tensor": lambda scaler, m: scaler.scale(loss_of(m, 0)),
    "of a list": lambda scaler, m: scaler.scale([[loss_of(m, 0)]])[0][0],
    "of an iterator": lambda scaler, m: next(iter(scaler.scale(iter([loss_of(m, 0)])))),
    "divided again": lambda scaler, m: scaler.scale(loss_of(m, 0)) / 4,
    "checkpointed": lambda scaler, m: scaler.scale(checkpointed(m, use_reentrant=False)),
    "checkpointed by a pass in the pass": lambda scaler, m: scaler.scale(
        checkpointed(m, use_reentrant=True)
    ),
}


@pytest.mark.parametrize("loss", SCALED_LOSSES.values(), ids=SCALED_LOSSES)
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, CallersScaler])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_scaled_loss_is_refused_before_the_first_step(
    loss: Callable[[Any, Any], Any], kind: Any, scale: float
) -> None:
    model = model_of()
    optimizer = Adam(model.parameters())
    own = torch.amp.GradScaler.scale
    with attach(model, optimizer):
        before = everything(optimizer)
        scaler = kind("cpu", init_scale=scale)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"GradScaler.*Received: .* by {scale:g}$"):
                loss(scaler, model).backward()
            assert_everything_same_bits(everything(optimizer), before)
        for p in model.parameters():
            p.grad = None
        # The scale applies to one backward pass only.
        loss_of(model, 0).backward()
        assert [s["step"] for s in everything(optimizer)] == [1] * len(before)
    assert torch.amp.GradScaler.scale is own
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert [s["step"] for s in everything(optimizer)] == [2] * len(before)


def test_scaled_pass_in_another_thread_goes_on() -> None:
    model, other = model_of(), torch.ones(3, requires_grad=True)
    optimizer = Adam(model.parameters())
    begun, may_end = threading.Event(), threading.Event()

    def wait(_: Any) -> None:
        begun.set()
        assert may_end.wait(60)

    with attach(model, optimizer):
        scaler = torch.amp.GradScaler("cpu")
        assert scaler.scale(torch.ones(())) == scaler.get_scale()  # no graph
        other.register_hook(wait)
        thread = threading.Thread(target=lambda: scaler.scale(other.sum()).backward())
        thread.start()
        try:
            assert begun.wait(60)
            loss_of(model, 0).backward()
        finally:
            may_end.set()
            thread.join()
    assert [s["step"] for s in everything(optimizer)] == [1] * len(everything(optimizer))


def test_scaler_of_another_optimizer_goes_on() -> None:
    # As in a GAN: an attached generator beside a critic that is not attached.
    results = []
    for attached in (True, False):
        model = model_of()
        torch.manual_seed(1)
        critic = torch.nn.Linear(1, 1)
        optimizer, theirs = Adam(model.parameters()), torch.optim.Adam(critic.parameters())
        scaler, off = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)
        with attach(model, optimizer) if attached else contextlib.nullcontext():
            for i in range(3):
                made = loss_of(model, i).reshape(1)
                theirs.zero_grad()
                scaler.scale(critic(made.detach()).square().sum()).backward()
                scaler.step(theirs)
                scaler.update()
                optimizer.zero_grad()
                off.scale(critic(made).sum()).backward()
                off.step(optimizer)
        results.append(everything(optimizer))
    assert_everything_same_bits(results[0], results[1])


# -- memory -----------------------------------------------------------------------------------

LAYERS, SIZE = 24, 1024
GRADIENTS_MB = LAYERS * SIZE * SIZE * 4 / 2**20


def peak_mb(*, attached: bool) -> float:
    """The peak of resident memory of a training step, above the memory used before it.

    Measured in a separate process, with all state allocated. `ru_maxrss` would not do: a process
    inherits it from its parent. One step runs first to warm up the allocator.
    """
    code = f"""
        import re, torch
        from pathlib import Path
        from fusedadam.torch import AdamW, attach

        torch.set_num_threads(1)
        model = torch.nn.Sequential(
            *(torch.nn.Linear({SIZE}, {SIZE}, bias=False) for _ in range({LAYERS}))
        )
        optimizer = AdamW(model.parameters())
        for p in model.parameters():
            optimizer.state[p] = {{
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }}
            for t in optimizer.state[p].values():
                t.add_(0)  # touched, so that it is resident
        if {attached}:
            attach(model, optimizer)
        x = torch.ones(2, {SIZE})

        def train():
            model(x).sum().backward()
            if not {attached}:
                optimizer.step()
                optimizer.zero_grad()

        def status(name):
            return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

        train()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        train()
        print((status("VmHWM") - before) / 1024)
    """
    # Give each gradient its own mapping, whose memory is returned at once. How much of its heap
    # glibc returns, and when, depends on the placement of small objects.
    return float(output_of(code, environment={"MALLOC_MMAP_THRESHOLD_": str(2**20)}))


def test_gradients_need_no_memory() -> None:
    without, attached = peak_mb(attached=False), peak_mb(attached=True)
    # Only the gradients of one or two of the 24 layers exist at a time.
    assert without > 0.9 * GRADIENTS_MB
    assert attached < 0.25 * GRADIENTS_MB


def test_model_without_parameters_is_refused() -> None:
    optimizer = AdamW(model_of().parameters())
    with pytest.raises(ValueError, match=r"must have parameters .* Received: a Tanh with none"):
        attach(torch.nn.Tanh(), optimizer)


def test_interrupt_behind_a_step_drops_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    optimizer = AdamW(model.parameters())
    attach(model, optimizer)
    step = optimizer._step

    def interrupted(*arguments: Any) -> None:
        step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, 0).backward()
    stepped = [p for p in model.parameters() if optimizer.state[p]["step"]]
    assert len(stepped) == 1
    assert stepped[0].grad is None


def test_interrupted_attach_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    optimizer = AdamW(model.parameters())
    register = torch.Tensor.register_post_accumulate_grad_hook
    calls = iter([register, register])

    def interrupted(param: Any, hook: Any) -> Any:
        for call in calls:
            return call(param, hook)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attach(model, optimizer)
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(optimizer.state[p]["step"] for p in model.parameters())
