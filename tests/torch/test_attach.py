# SPDX-License-Identifier: MIT
"""`fusedadam.torch.attach`: steps during the backward pass that release each gradient."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW, attach
from torch_helpers import Training, assert_everything_same_bits, everything


def model_of(*, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    ).to(dtype)


def loss_of(model: Any, i: int) -> Any:
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(i)).to(model[0].weight.dtype)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def steps_of(optimizer: Any) -> list[float]:
    return [float(s.get("step", 0)) for s in everything(optimizer)]


class Attached(Training):
    """An optimizer that is attached to a model, beside the oracle."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        super().__init__(shapes=[])
        self.optimizer = optimizer
        self.attachment = attach(model, optimizer)
        self.adopt()

    def backward(self, loss: Any) -> None:
        """A pass that steps and frees every gradient that it reaches."""
        wanted = [p for p in self.params if p.requires_grad]
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        grads = dict(zip(wanted, found, strict=True))
        self.expect([grads.get(p) for p in self.params])
        loss.backward()
        self.check()
        assert all(p.grad is None for p in self.params)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("float32", {}),
    "amsgrad, averages and decay": (
        "float32",
        {"amsgrad": True, "ema_decay": 0.9, "weight_decay": 0.1},
    ),
    "zero_grad_in_step": ("float32", {"zero_grad_in_step": True}),
    "max_grad_norm 0, which is off": ("float32", {"max_grad_norm": 0.0}),
    "packed + int8": ("bfloat16", {"moments": "packed", "low_bits": "int8"}),
}


@pytest.mark.parametrize(("dtype", "options"), OPTIONS.values(), ids=OPTIONS)
def test_bits_of_the_oracle(dtype: str, options: dict[str, Any]) -> None:
    model = model_of(dtype=getattr(torch, dtype))
    training = Attached(model, Adam(model.parameters(), **options))
    for i in range(3):
        training.backward(loss_of(model, i))


def test_groups_a_scheduler_and_settings_that_change() -> None:
    model = model_of()
    weights, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.1}]
    training = Attached(model, AdamW(groups, lr=0.01))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(training.optimizer, 0.2, total_steps=9)
    for i in range(4):
        training.backward(loss_of(model, i))
        # Warnings are errors here: the scheduler must notice that steps were taken.
        scheduler.step()
        training.optimizer.param_groups[1]["lr"] *= 2


def test_remove_restores() -> None:
    model = model_of()
    training = Attached(model, Adam(model.parameters()))
    training.backward(loss_of(model, 0))
    training.attachment.remove()
    training.attachment.remove()
    loss_of(model, 1).backward()
    training.stepped([p.grad for p in training.params], training.optimizer.step)
    training.optimizer.zero_grad()
    with attach(model, training.optimizer):
        training.backward(loss_of(model, 2))
    with pytest.raises(KeyError), attach(model, training.optimizer):
        raise KeyError
    loss_of(model, 1).backward()
    training.check()


class Tied(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(9, 4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Any) -> Any:
        return self.head(torch.tanh(self.embedding(words)))


@pytest.mark.parametrize(
    "make", [Tied, lambda: torch.nn.Embedding(9, 4, sparse=True)], ids=["tied", "sparse"]
)
def test_tied_weights_and_sparse_gradients(make: Callable[[], Any]) -> None:
    model = make()
    training = Attached(model, AdamW(model.parameters()))
    for i in range(3):
        training.backward(model(torch.tensor([i, 2, 2, 8])).square().sum())
    assert training.steps == [3]


def test_parts_of_a_model_and_of_an_optimizer() -> None:
    # Others are untouched: the model's parameters of no optimizer, frozen ones, and those of the
    # optimizer outside the model, which still wait for `step`.
    model, other = model_of(), torch.nn.Parameter(torch.ones(3))
    model[0].bias.requires_grad_(False)
    training = Attached(model, Adam([*model[0].parameters(), *model[2].parameters(), other]))
    other.grad = torch.ones(3)
    grads = torch.autograd.grad(loss_of(model, 0), [model[0].weight, *model[2].parameters()])
    training.expect([grads[0], None, *grads[1:], None])
    loss_of(model, 0).backward()
    training.check()
    assert model[3].weight.grad is not None
    assert other not in training.optimizer.state
    training.stepped([*[None] * 4, other.grad], training.optimizer.step)
    # A parameter may be used by a part of the passes.
    other.grad = None
    for i in range(3):
        x = model[0](torch.ones(2, 4) * i)
        training.backward((x if i % 2 else model[2](x)).square().sum())
    assert training.steps == [4, 0, 3, 3, 1]


def test_checkpoint_loaded_while_attached() -> None:
    model = model_of()
    training = Attached(model, Adam(model.parameters()))
    training.backward(loss_of(model, 0))
    saved = copy.deepcopy(training.optimizer.state_dict())
    training.backward(loss_of(model, 1))
    training.optimizer.load_state_dict(saved)
    training.adopt()
    training.backward(loss_of(model, 1))
    assert training.steps == [2] * 6


@pytest.mark.parametrize("of", ["the same optimizer", "another"])
def test_parameter_attached_twice_is_refused(of: str) -> None:
    model = model_of()
    training = Attached(model, Adam(model.parameters()))
    # A second optimizer would find no gradients and silently do nothing.
    other = training.optimizer if of == "the same optimizer" else Adam(model.parameters())
    with training.refused(r"attached once.*remove\(\).*Received: '0.weight' again", ValueError):
        attach(model, other)
    training.backward(loss_of(model, 0))
    training.attachment.remove()
    training = Attached(model, other)
    training.backward(loss_of(model, 0))


# -- refused calls ----------------------------------------------------------------------------

# Of a model, an optimizer and settings for it.
ARGUMENTS: list[tuple[Callable[[Any], Any], Any, dict[str, Any], Any, str]] = [
    (lambda m: list(m.parameters()), Adam, {}, TypeError, "^model must be a torch.nn.Module"),
    (lambda m: m, torch.optim.Adam, {}, TypeError, r"^optimizer .*: torch\.optim\.adam\.Adam$"),
    (lambda m: m, AdamW, {"max_grad_norm": 1.0}, ValueError, "^max_grad_norm must be None"),
    (lambda _: torch.nn.Tanh(), AdamW, {}, ValueError, "must have parameters .*: a Tanh with none"),
]


@pytest.mark.parametrize(("of", "kind", "settings", "error", "rule"), ARGUMENTS)
def test_arguments(of: Any, kind: Any, settings: dict[str, Any], error: Any, rule: str) -> None:
    model = model_of()
    with pytest.raises(error, match=rule) as caught:
        attach(of(model), kind(model.parameters(), **settings))
    assert "Received: " in str(caught.value)
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


def exchange_moment(model: Any, optimizer: Any) -> None:
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(3)


SPOILS: dict[str, tuple[Callable[[Any, Any], Any], str, int]] = {
    "a norm": (lambda _, o: o.param_groups[0].update(max_grad_norm=1.0), "max_grad_norm", 0),
    "averages swapped in": (lambda _, o: o.swap_ema(), "swapped out first", 0),
    "a moment that does not fit": (exchange_moment, r"exp_avg\[0\] \('0\.weight'\) .*shape", 5),
}


@pytest.mark.parametrize(("spoil", "rule", "stepped"), SPOILS.values(), ids=SPOILS)
def test_error_of_a_step_ends_the_backward(
    spoil: Callable[[Any, Any], Any], rule: str, stepped: int
) -> None:
    # The steps before it in the pass have been taken, and its gradient stays.
    model = model_of()
    training = Attached(model, Adam(model.parameters(), ema_decay=0.9))
    training.backward(loss_of(model, 0))
    spoil(model, training.optimizer)
    before = everything(training.optimizer)
    with pytest.raises(ValueError, match=rule):
        loss_of(model, 1).backward()
    after = everything(training.optimizer)
    same = [a["step"] == b["step"] for a, b in zip(after, before, strict=True)]
    assert same.count(False) == stepped
    if not stepped:
        assert_everything_same_bits(after, before)
    assert model[0].weight.grad is not None or not stepped


# -- interrupts -------------------------------------------------------------------------------


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
    (stepped,) = [p for p in model.parameters() if optimizer.state[p]["step"]]
    assert stepped.grad is None


def test_interrupted_attach_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    optimizer = AdamW(model.parameters())
    register = torch.Tensor.register_post_accumulate_grad_hook
    calls = iter([register, register])

    def interrupted(param: Any, hook: Any) -> Any:
        for call in calls:
            return call(param, hook)
        raise KeyboardInterrupt

    scale = torch.amp.GradScaler.scale
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attach(model, optimizer)
    assert torch.amp.GradScaler.scale is scale
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert steps_of(optimizer) == [0] * 6


def test_gradients_are_freed_one_after_the_other() -> None:
    model = model_of()
    seen: list[Any] = []

    def look(p: Any) -> None:
        assert [grad() for grad in seen] == [None] * len(seen)
        seen.append(weakref.ref(p.grad))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    with attach(model, AdamW(model.parameters())):
        for i in range(2):
            loss_of(model, i).backward()
    assert len(seen) == 12
