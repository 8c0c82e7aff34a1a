# SPDX-License-Identifier: MIT
"""Optimizers over torch's tensors, configured as documented, and torch's training tail.

https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html
https://deepspeed.readthedocs.io/en/latest/optimizers.html
https://huggingface.co/docs/bitsandbytes/main/en/optimizers
https://pypi.org/project/bitsandbytes-cpu-fork
https://docs.pytorch.org/ao/stable/api_reference/api_ref_optim.html
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peers import FORK, STORING, Array, Contender, Rounding, Work

if TYPE_CHECKING:
    import torch

# Weights and moments are rounded to nearest. In a step, a gradient and m are off by up to 2^-9, and
# the root of v by half of that; the check takes five steps.
OF_BF16 = Rounding(weight=2.0**-8, update=0.05)
# Moments in 8 bits of a block of 256 elements (measured in the check: 0.02, mostly by the weights).
OF_8_BITS = Rounding(weight=2.0**-8, update=0.1)


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make contenders. The variants of torch share all arrays except for the step counts."""
    set_threads(threads)
    params = parameters(work, "bfloat16" if names[0] in STORING else work.dtype)
    if work.tail is not None:
        return dict.fromkeys(names, torch_tail(work, params))
    optimizers = {name: optimizer(name, params, work) for name in names}
    first, *others = optimizers.values()
    if others:
        first.step()
    for other in others:
        for param in params:
            state = first.state[param]
            other.state[param] = state | {"step": state["step"].clone()}
    return {
        name: contender(params, adam, rounding=rounding_of(name))
        for name, adam in optimizers.items()
    }


def beginning(work: Work, threads: int) -> Callable[[], Callable[[], object]]:
    """Make parameters and gradients, and return what makes torch's fused Adam over them."""
    set_threads(threads)
    params = parameters(work, work.dtype)
    return lambda: optimizer("torch fused", params, work).step


def set_threads(threads: int) -> None:
    """Set the number of threads of torch and of fusedadam."""
    import fusedadam
    import torch

    torch.set_num_threads(threads)
    fusedadam.set_num_threads(threads)


def parameters(work: Work, dtype: str) -> list[torch.nn.Parameter]:
    """Return parameters with gradients, in torch's memory."""
    import torch

    kind: Any = getattr(torch, dtype)
    params = [torch.nn.Parameter(torch.from_numpy(a).to(kind, copy=True)) for a in work.params()]
    for param, grad in zip(params, work.grads(), strict=True):
        param.grad = torch.from_numpy(grad).to(kind, copy=True)
    return params


def optimizer(name: str, params: list[torch.nn.Parameter], work: Work) -> Any:
    """Return an optimizer."""
    import torch

    hyper = work.hyper.as_torch
    if name.startswith("deepspeed"):
        # It is compiled for this machine's CPU on first use.
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        # adamw_mode only selects the kind of weight decay, which is 0 here.
        choice = {"fp32_optimizer_states": False} if name in STORING else {"adamw_mode": False}
        return DeepSpeedCPUAdam(params, **hyper, **choice)
    if name == "fusedadam.torch":
        import fusedadam.torch

        return fusedadam.torch.Adam(params, **hyper)
    if name == "torchao 8 bit":  # it compiles a step for each size with torch.compile
        from torchao.optim import AdamW8bit

        return AdamW8bit(params, **hyper)
    if name.startswith("bitsandbytes"):
        if "fork" in name:
            sys.path.insert(0, str(FORK))
            # Its documentation: the library for AVX-512 in the wheels for older systems has no
            # threads.
            os.environ.setdefault("BNB_CPU_DISABLE_AVX512", "1")
        import bitsandbytes

        optimizers: Any = bitsandbytes.optim  # it declares no exports
        return optimizers.AdamW8bit(params, **hyper)
    variant = name.split()[1]
    choice = {} if variant == "default" else {variant: True}
    kind: Any = torch.optim.AdamW if name in STORING else torch.optim.Adam
    return kind(params, **hyper, **choice)


def rounding_of(name: str) -> Rounding:
    """Return the errors of a contender that stores less."""
    if name not in STORING:
        return Rounding()
    return OF_8_BITS if name.endswith("8 bit") else OF_BF16


def contender(tensors: list[torch.nn.Parameter], optimizer: Any, **more: Any) -> Contender:
    """Return the contender that steps parameters with an optimizer."""
    import torch

    def set_grads(grads: Iterable[Array]) -> None:
        for param, values in zip(tensors, grads, strict=True):
            gradient: Any = param.grad
            gradient.copy_(torch.from_numpy(values))

    def as_arrays() -> list[Array]:
        wide = [p.float() if p.dtype.itemsize == 2 else p for p in tensors]
        return [param.detach().numpy() for param in wide]

    functions: dict[str, Any] = {
        "form": "algorithm 1",
        "step": optimizer.step,
        "set_grads": set_grads,
        "params": as_arrays,
        "held_bytes": lambda: held_bytes(tensors, optimizer),
    }
    return Contender(**{**functions, **more})


def torch_tail(work: Work, params: list[torch.nn.Parameter]) -> Contender:
    """Return torch's training tail: clip, step, average, zero the gradients."""
    import torch
    from torch.optim import swa_utils

    assert work.tail is not None
    settings = work.tail
    hyper = work.hyper.as_torch | {"weight_decay": settings.weight_decay}
    adamw = torch.optim.AdamW(params, **hyper, fused=True)
    model = torch.nn.ParameterList(params)
    moving_average: Any = swa_utils.get_ema_multi_avg_fn
    grads = [param.grad for param in params]
    # AveragedModel copies the model with its gradients, so they are removed before.
    adamw.zero_grad(set_to_none=True)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=moving_average(settings.ema_momentum))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    gc.collect()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, settings.clipnorm)
        adamw.step()
        averaged.update_parameters(model)
        adamw.zero_grad(set_to_none=False)

    def averages() -> list[Array]:
        return [param.detach().numpy() for param in averaged.parameters()]

    return contender(params, adamw, step=step, averages=averages)


def held_bytes(params: Iterable[torch.nn.Parameter], optimizer: Any) -> int:
    """Return the bytes of parameters, their gradients and the optimizer's state."""
    tensors = [tensor for param in params for tensor in (param, param.grad)]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = (tensor.untyped_storage() for tensor in plain_tensors(tensors))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def plain_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among values, and the parts of those that consist of several."""
    import torch

    for value in values:
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from plain_tensors(getattr(value, name) for name in names)
        elif isinstance(value, torch.Tensor):
            yield value
