# SPDX-License-Identifier: MIT
"""The state of a parameter, with the names of `torch.optim.Adam`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from fusedadam import _core
from fusedadam.adapters import copy_like
from fusedadam.torch.local import any_distributed

if TYPE_CHECKING:
    from torch import Tensor

# torch's names of the kernel's kinds of state. torch has no "ema".
NAMES: Final = {
    "m": "exp_avg",
    "v": "exp_avg_sq",
    "vhat": "max_exp_avg_sq",
    "ema": "ema",
    "step": "step",
}

# Placeholder for the state of a parameter without a gradient, which is not stepped.
ABSENT: Final[dict[str, Any]] = {"step": None}


def new_plan() -> _core.TensorPlan:
    """Return a plan for steps with such state."""
    return _core.TensorPlan(copy_like, NAMES)


def new_states(
    params: Sequence[Tensor], positions: Sequence[int], options: _core.AdamOptions
) -> list[dict[str, Tensor]]:
    """Return the initial state of parameters of one group; errors name them by `positions`."""
    states: list[dict[str, Tensor]] = [{"step": _counter(0)} for _ in params]
    if any_distributed(params):
        for state, param in zip(states, params, strict=True):
            for kind in _core.needed_kinds(options):
                averaged = kind == "ema"
                state[NAMES[kind]] = (
                    new_average(param) if averaged else torch.zeros_like(param, requires_grad=False)
                )
        return states
    for kind, arrays in _core.allocate_state(list(params), list(positions), options).items():
        for state, param, array in zip(states, params, arrays, strict=True):
            # With the strides of the parameter, and not a view of another tensor.
            storage = torch.from_numpy(array).untyped_storage()
            state[NAMES[kind]] = torch.empty(0, dtype=param.dtype, device="cpu").set_(
                storage, 0, param.shape, param.stride()
            )
    return states


def new_average(param: Tensor) -> Tensor:
    """Return the initial moving average of a parameter."""
    return param.detach().clone()


def conform(state: dict[str, Any], param: Tensor) -> bool:
    """Give foreign state its parameter's strides and a CPU step count; return if it changed."""
    changed = False
    step = state.get("step")
    if step is not None and not (
        isinstance(step, torch.Tensor)
        and step.device.type == "cpu"
        and step.dtype in (torch.float32, torch.float64)
    ):
        state["step"] = _counter(float(step))
        changed = True
    for name in NAMES.values():
        value = state.get(name)
        if not isinstance(value, torch.Tensor) or any_distributed([value, param]):
            continue
        if value.shape == param.shape and value.stride() != param.stride():
            state[name] = copy_like(value, param)
            changed = True
    return changed


def separate_counter(state: dict[str, Any], seen: set[int]) -> None:
    """Copy the step count if its memory is in `seen`, and add its memory to `seen`.

    In some checkpoint formats, all parameters share one count.
    """
    step = state.get("step")
    if not isinstance(step, torch.Tensor):
        return
    if step.data_ptr() in seen:
        step = state["step"] = step.clone()
    seen.add(step.data_ptr())


def _counter(count: float) -> Tensor:
    double = torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if double else torch.float32
    return torch.tensor(float(count), dtype=dtype, device="cpu")
