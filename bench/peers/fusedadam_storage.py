# SPDX-License-Identifier: MIT
"""`fusedadam.torch.Adam` in each format, on each instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peers import Array, Contender, Rounding, Work
from peers.formats import FLOAT32, FORMATS, parts_of
from peers.torch_adam import contender, parameters, set_threads

if TYPE_CHECKING:
    import torch

# The largest error of an update by the format of the moments, in learning rates (measured in the
# check: 0.08 and 0.004), and the largest relative error of a weight by its low bits.
OF_MOMENTS = {"packed": 0.15, "bfloat16": 0.01, "float32": 0.0}
OF_WEIGHTS = {None: 2.0**-7, "int8": 2.0**-15, "int16": 0.0}


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contenders. Those of a format share everything but the instruction set."""
    set_threads(threads)
    formats = dict.fromkeys(parts_of(name)[0] for name in names)
    optimizers = {form: stored(form, work) for form in formats}
    return {name: on_isa(name, *optimizers[parts_of(name)[0]]) for name in names}


def stored(form: str, work: Work) -> tuple[list[torch.nn.Parameter], Any]:
    """Return parameters with gradients in a format, and their optimizer."""
    import fusedadam.torch
    import torch

    settings = FORMATS[form].settings
    whole = form == FLOAT32 or "low_bits" in settings
    params = parameters(work, "float32" if whole else "bfloat16")
    optimizer = fusedadam.torch.Adam(params, **work.hyper.as_torch, **settings)
    if "low_bits" in settings:
        grads = [param.grad for param in params]
        # This drops the gradients, and gives the parameters another dtype.
        fusedadam.torch.split_(torch.nn.ParameterList(params), optimizer)
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.bfloat16()
    return params, optimizer


def on_isa(name: str, params: list[torch.nn.Parameter], optimizer: Any) -> Contender:
    """Return the contender that steps on its instruction set, and shows the whole weights."""
    import fusedadam

    form, isa = parts_of(name)
    settings = FORMATS[form].settings
    # Gradients of 16 bits are rounded as well.
    of_update = 2.0**-8 + OF_MOMENTS[settings.get("moments", FLOAT32)]
    rounding = Rounding(OF_WEIGHTS[settings.get("low_bits")], of_update)

    def step() -> None:
        fusedadam.set_isa(isa)
        optimizer.step()

    def masters() -> list[Array]:
        return [optimizer.master_weights(param).numpy() for param in params]

    exact = Rounding() if form == FLOAT32 else rounding
    return contender(params, optimizer, step=step, params=masters, rounding=exact)
