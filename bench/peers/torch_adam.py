# SPDX-License-Identifier: MIT
"""PyTorch's own Adam in its three implementations, and a training tail as in its documentation.

https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from peers import Array, Beginning, Contender, Work

if TYPE_CHECKING:
    import torch

VARIANTS: dict[str, dict[str, bool]] = {
    "torch default": {},
    "torch foreach": {"foreach": True},
    "torch fused": {"fused": True},
}


def versions() -> dict[str, str]:
    """Import torch and return its version."""
    import torch

    return {"torch": torch.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Accept all work."""
    return ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the variants. They share all arrays except for the step counts."""
    import torch

    torch.set_num_threads(threads)
    params = parameters(work)
    if work.tail is not None:
        return {name: TorchTail(work, params) for name in names}
    steps = {name: TorchStep(work, params, VARIANTS[name]) for name in names}
    first, *others = steps.values()
    for other in others:
        other.share_moments(first)
    return dict(steps)


def beginning(work: Work, threads: int) -> Beginning:
    """Make parameters and gradients, and return what makes the fused variant over them."""
    import torch

    torch.set_num_threads(threads)
    params = parameters(work)
    return lambda: TorchStep(work, params, VARIANTS["torch fused"]).step


def parameters(work: Work, dtype: str = "") -> list[torch.nn.Parameter]:
    """Return parameters with gradients, in torch's memory. The default dtype is that of the work."""
    import torch

    kind: Any = getattr(torch, dtype or work.dtype)
    params = [torch.nn.Parameter(torch.from_numpy(a).to(kind, copy=True)) for a in work.params()]
    for param, grad in zip(params, work.grads(), strict=True):
        param.grad = torch.from_numpy(grad).to(kind, copy=True)
    return params


class TorchTensors(Contender):
    """The common part of contenders over torch tensors."""

    form = "algorithm 1"

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self._params = params

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy arrays into the gradients."""
        import torch

        for param, values in zip(self._params, grads, strict=True):
            gradient: Any = param.grad
            gradient.copy_(torch.from_numpy(values))

    def params(self) -> list[Array]:
        """Return views of them as NumPy arrays."""
        return [param.detach().numpy() for param in self._params]


class TorchStep(TorchTensors):
    """`torch.optim.Adam.step`."""

    def __init__(
        self, work: Work, params: list[torch.nn.Parameter], variant: dict[str, bool]
    ) -> None:
        import torch

        super().__init__(params)
        hyper = work.hyper
        betas = (hyper.beta_1, hyper.beta_2)
        self._optimizer = torch.optim.Adam(params, hyper.lr, betas, hyper.epsilon, **variant)
        self._step = self._optimizer.step

    def step(self) -> object:
        """Take a step."""
        return self._step()

    def share_moments(self, other: TorchStep) -> None:
        """Use the moments of another contender, which takes a step if it has none yet."""
        if not other._optimizer.state:
            other.step()
        for param in self._params:
            state = other._optimizer.state[param]
            self._optimizer.state[param] = state | {"step": state["step"].clone()}


class TorchTail(TorchTensors):
    """A training tail: clip, step, average, zero the gradients."""

    def __init__(self, work: Work, params: list[torch.nn.Parameter]) -> None:
        import torch
        from torch.optim import swa_utils

        super().__init__(params)
        assert work.tail is not None
        hyper = work.hyper
        self._clipnorm = work.tail.clipnorm
        self._clip = torch.nn.utils.clip_grad_norm_
        self._optimizer = torch.optim.AdamW(
            params,
            hyper.lr,
            (hyper.beta_1, hyper.beta_2),
            hyper.epsilon,
            weight_decay=work.tail.weight_decay,
            fused=True,
        )
        self._model = torch.nn.ParameterList(params)
        moving_average: Any = swa_utils.get_ema_multi_avg_fn
        average = moving_average(work.tail.ema_momentum)
        grads = [param.grad for param in params]
        # AveragedModel copies the model with its gradients, so they are removed before.
        self._optimizer.zero_grad(set_to_none=True)
        self._averaged = swa_utils.AveragedModel(self._model, multi_avg_fn=average)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        gc.collect()

    def step(self) -> object:
        """Do everything between the backward pass and the next batch."""
        self._clip(self._params, self._clipnorm)
        self._optimizer.step()
        self._averaged.update_parameters(self._model)
        return self._optimizer.zero_grad(set_to_none=False)

    def averages(self) -> list[Array]:
        """Return views of them as NumPy arrays."""
        return [param.detach().numpy() for param in self._averaged.parameters()]
