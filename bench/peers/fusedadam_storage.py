# SPDX-License-Identifier: MIT
"""`fusedadam.torch.Adam` in each format, on each instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from formats import FLOAT32, FORMATS, parts_of

from peers import Array, Contender, Rounding, Work
from peers.storing import StoringStep, common
from peers.torch_adam import parameters

if TYPE_CHECKING:
    import fusedadam.torch
    import torch

# The largest error of an update by the format of the moments, in learning rates (measured in the
# check: 0.08 and 0.004), and the largest relative error of a weight by its low bits.
OF_MOMENTS = {"packed": 0.15, "bfloat16": 0.01, "float32": 0.0}
OF_WEIGHTS = {None: 2.0**-7, "int8": 2.0**-15, "int16": 0.0}


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    import fusedadam.torch
    import torch

    return {"fusedadam": fusedadam.__version__, "torch": torch.__version__}


def limit(name: str, work: Work) -> str:
    """Reject float64, and instruction sets that this CPU lacks."""
    import fusedadam

    _, isa = known(name)
    if isa not in fusedadam.supported_isas():
        return f"not supported here: {isa}"
    return "the formats are of float32 work" if work.dtype != "float32" else ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contenders. Those of a format share everything but the instruction set."""
    import fusedadam
    import torch

    torch.set_num_threads(threads)
    fusedadam.set_num_threads(threads)
    optimizers = {}
    for name in names:
        format_name, _ = known(name)
        if format_name not in optimizers:
            optimizers[format_name] = stored(format_name, work)
    return {name: FormatStep(name, *optimizers[known(name)[0]]) for name in names}


def known(name: str) -> tuple[str, str]:
    """Return the format and the instruction set of a contender of this module."""
    parts = parts_of(name)
    assert parts is not None
    return parts


def stored(format_name: str, work: Work) -> tuple[list[torch.nn.Parameter], fusedadam.torch.Adam]:
    """Return parameters with gradients in a format, and their optimizer."""
    import fusedadam.torch
    import torch

    settings = FORMATS[format_name].settings
    whole = format_name == FLOAT32 or "low_bits" in settings
    params = parameters(work, "float32" if whole else "bfloat16")
    optimizer = fusedadam.torch.Adam(params, **common(work.hyper), **settings)
    if "low_bits" in settings:
        grads = [param.grad for param in params]
        # This drops the gradients, and gives the parameters another dtype.
        fusedadam.torch.split_(torch.nn.ParameterList(params), optimizer)
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.bfloat16()
    return params, optimizer


class FormatStep(StoringStep):
    """`fusedadam.torch.Adam.step` in a format, on an instruction set."""

    def __init__(
        self, name: str, params: list[torch.nn.Parameter], optimizer: fusedadam.torch.Adam
    ) -> None:
        import fusedadam

        format_name, self._isa = known(name)
        settings = FORMATS[format_name].settings
        whole = format_name == FLOAT32
        of_weights = 0.0 if whole else OF_WEIGHTS[settings.get("low_bits")]
        of_moments = OF_MOMENTS[settings.get("moments", "float32")]
        # Gradients of 16 bits are rounded as well.
        of_gradients = 0.0 if whole else 2.0**-8
        super().__init__(params, optimizer, Rounding(of_weights, of_moments + of_gradients))
        self._optimizer: fusedadam.torch.Adam = optimizer
        self._set_isa = fusedadam.set_isa

    def step(self) -> object:
        """Take a step."""
        self._set_isa(self._isa)
        return self._step()

    def params(self) -> list[Array]:
        """Return the whole weights."""
        return [self._optimizer.master_weights(param).numpy() for param in self._params]
