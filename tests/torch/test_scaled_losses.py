# SPDX-License-Identifier: MIT
"""An attached optimizer refuses backward passes of losses that a GradScaler has scaled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, attach
from torch_helpers import Training, everything


def model_of() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def loss_of(model: Any) -> Any:
    return model(torch.ones(2, 4)).square().mean()


class CallersScaler(torch.amp.GradScaler):  # type: ignore[misc] # torch is Any here
    """Replaces `scale`, as ShardedGradScaler does, with a scale of 1."""

    def scale(self, outputs: Any) -> Any:
        super().scale(torch.ones(()))  # which prepares `step`
        return outputs


def checkpointed(model: Any, *, use_reentrant: bool) -> Any:
    x = torch.ones(2, 4, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
    return out.square().mean()


SCALED_LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "a tensor": lambda scaler, m: scaler.scale(loss_of(m)),
    "of a list": lambda scaler, m: scaler.scale([[loss_of(m)]])[0][0],
    "of an iterator": lambda scaler, m: next(iter(scaler.scale(iter([loss_of(m)])))),
    "divided again": lambda scaler, m: scaler.scale(loss_of(m)) / 4,
    "checkpointed": lambda scaler, m: scaler.scale(checkpointed(m, use_reentrant=False)),
    "checkpointed by a pass in the pass": lambda scaler, m: scaler.scale(
        checkpointed(m, use_reentrant=True)
    ),
}


@pytest.mark.parametrize("loss", SCALED_LOSSES.values(), ids=SCALED_LOSSES)
@pytest.mark.parametrize(("kind", "scale"), [(torch.amp.GradScaler, 2.0**16), (CallersScaler, 1.0)])
def test_scaled_loss_is_refused_before_the_first_step(
    loss: Callable[[Any, Any], Any], kind: Any, scale: float
) -> None:
    model = model_of()
    training = Training.of(Adam(model.parameters()))
    own = torch.amp.GradScaler.scale
    scaler = kind("cpu", init_scale=scale)
    with attach(model, training.optimizer):
        training.adopt()
        for _ in range(2):
            with training.refused(rf"GradScaler.*Received: .* by {scale:g}$", ValueError):
                loss(scaler, model).backward()
            training.optimizer.zero_grad()
        # The scale applies to one backward pass only.
        torch.amp.GradScaler("cpu", enabled=False).scale(loss_of(model)).backward()
        training.adopt()
        assert training.steps == [1] * 4
    assert torch.amp.GradScaler.scale is own
    scaler.scale(loss_of(model)).backward()
    scaler.step(training.optimizer)
    training.adopt()
    assert training.steps == [2] * 4


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
            loss_of(model).backward()
        finally:
            may_end.set()
            thread.join()
    assert [s["step"] for s in everything(optimizer)] == [1] * 4


def test_one_attachment_ends_before_another() -> None:
    models = [model_of() for _ in range(2)]
    optimizers = [Adam(model.parameters()) for model in models]
    own = torch.amp.GradScaler.scale
    first, second = map(attach, models, optimizers)
    first.remove()
    with pytest.raises(ValueError, match="GradScaler"):
        torch.amp.GradScaler("cpu").scale(loss_of(models[1])).backward()
    second.remove()
    assert torch.amp.GradScaler.scale is own
