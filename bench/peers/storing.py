# SPDX-License-Identifier: MIT
"""The common part of contenders that store tensors in fewer bits, over torch's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from peers import Array, Contender, Hyper, Rounding, Work
from peers.torch_adam import TorchTensors, parameters

if TYPE_CHECKING:
    import torch

MakeOptimizer: TypeAlias = (
    "Callable[[list[torch.nn.Parameter], dict[str, Any]], torch.optim.Optimizer]"
)


def common(hyper: Hyper) -> dict[str, Any]:
    """Return the arguments that all optimizers name as torch does. There is no weight decay."""
    betas = (hyper.beta_1, hyper.beta_2)
    return {"lr": hyper.lr, "betas": betas, "eps": hyper.epsilon, "weight_decay": 0.0}


def make(
    names: Sequence[str],
    work: Work,
    threads: int,
    rounding: Rounding,
    optimizer: MakeOptimizer,
) -> dict[str, Contender]:
    """Make contenders with one optimizer each, over parameters in bfloat16."""
    import torch

    torch.set_num_threads(threads)
    steps: dict[str, Contender] = {}
    for name in names:
        params = parameters(work, "bfloat16")
        steps[name] = StoringStep(params, optimizer(params, common(work.hyper)), rounding)
    return steps


class StoringStep(TorchTensors):
    """`step` of an optimizer that stores less than it computes with."""

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        rounding: Rounding,
    ) -> None:
        super().__init__(params)
        self.rounding = rounding
        self._optimizer = optimizer
        self._step = optimizer.step

    def step(self) -> object:
        """Take a step."""
        return self._step()

    def params(self) -> list[Array]:
        """Return the parameters as float32 arrays."""
        return [param.detach().float().numpy() for param in self._params]

    def held_bytes(self) -> int:
        """Return the bytes of parameters, gradients and state."""
        return held_bytes(self._params, self._optimizer)


def held_bytes(params: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of parameters, their gradients and the optimizer's state."""
    tensors = [tensor for param in params for tensor in (param, param.grad)]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in plain_tensors(tensors)
        for storage in (tensor.untyped_storage(),)
    }
    return sum(storages.values())


def plain_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among values, and the parts of those that consist of several."""
    import torch

    for value in values:
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from plain_tensors(getattr(value, name) for name in names)
        elif isinstance(value, torch.Tensor):
            yield value
