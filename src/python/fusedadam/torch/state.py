# SPDX-License-Identifier: MIT
"""The state of a parameter, with the names of `torch.optim.Adam`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from fusedadam import _core
from fusedadam.adapters import copy_like
from fusedadam.torch.local import any_distributed, local_tensor, mapped

if TYPE_CHECKING:
    from torch import Tensor

# torch's names of the kernel's kinds of state. torch has no "ema", "packed" and "low_bits".
NAMES: Final = {
    "m": "exp_avg",
    "v": "exp_avg_sq",
    "vhat": "max_exp_avg_sq",
    "packed": "packed_moments",
    "low_bits": "low_bits",
    "ema": "ema",
    "step": "step",
}

# Formats of moments and averages that are converted into each other.
_INTERCHANGEABLE: Final = {torch.float32, torch.bfloat16, torch.float16}

# Placeholder for the state of a parameter without a gradient, which is not stepped.
ABSENT: Final[dict[str, Any]] = {"step": None}


class Plan:
    """A plan for steps with such state, and the formats of each group at the last of them."""

    def __init__(self) -> None:
        self.core = _core.TensorPlan(copy_like, NAMES)
        self.options: list[_core.AdamOptions] = []
        self.formats: list[tuple[str, str | None]] = []

    def knows(self, options: list[_core.AdamOptions]) -> bool:
        """Whether these options are the objects of the last step: reading them would take longer."""
        return _core.same_objects(self.options, options)

    def took(self, options: list[_core.AdamOptions]) -> None:
        """Remember the options of a step."""
        self.options, self.formats = options, formats_of(options)


def formats_of(options: Sequence[_core.AdamOptions]) -> list[tuple[str, str | None]]:
    """Return the formats that options ask for."""
    return [(option.moments, option.low_bits) for option in options]


def needed_state(
    param: Tensor, options: _core.AdamOptions, name: str = "params"
) -> dict[str, torch.dtype]:
    """Return the dtypes of the state of a parameter, by torch's names; raise if there is none."""
    dtype = str(param.dtype).removeprefix("torch.")
    needed = _core.needed_state(options, dtype, name)
    return {
        NAMES[kind]: param.dtype if param.is_complex() else getattr(torch, named)
        for kind, named in needed.items()
    }


def new_states(
    params: Sequence[Tensor], positions: Sequence[int], options: _core.AdamOptions
) -> list[dict[str, Tensor]]:
    """Return the initial state of parameters of one group; errors name them by `positions`."""
    states: list[dict[str, Tensor]] = [{"step": _counter(0)} for _ in params]
    if any_distributed(params):
        for state, param in zip(states, params, strict=True):
            for name, dtype in needed_state(param, options).items():
                state[name] = (
                    new_average(param)
                    if name == "ema"
                    else torch.zeros_like(param, dtype=dtype, requires_grad=False)
                )
        return states
    for kind, arrays in _core.allocate_state(list(params), list(positions), options).items():
        for state, param, array in zip(states, params, arrays, strict=True):
            if array is None:
                continue
            # With the strides of the parameter, and not a view of another tensor.
            dtype = needed_state(param, options)[NAMES[kind]]
            storage = torch.from_numpy(array).untyped_storage()
            state[NAMES[kind]] = torch.empty(0, dtype=dtype, device="cpu").set_(
                storage, 0, param.shape, param.stride()
            )
    return states


def new_average(param: Tensor, low_bits: Tensor | None = None) -> Tensor:
    """Return the initial moving average of a parameter: its value, in at least 32 bits."""
    if param.dtype.itemsize > 2:
        return param.detach().clone()
    return cast("Tensor", mapped(joined, param, low_bits))


def conform(state: dict[str, Any], param: Tensor, needed: dict[str, torch.dtype]) -> bool:
    """Give foreign state its parameter's strides, a CPU step count, and the formats of `needed`.

    Return whether it changed.
    """
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
    if step is not None:
        changed = _convert_moments(state, needed) or changed
        changed = _convert_low_bits(state, param, needed) or changed
    return changed


def _convert_moments(state: dict[str, Any], needed: dict[str, torch.dtype]) -> bool:
    """Convert m and v between separate and packed ones, and between dtypes, to nearest."""
    changed = False
    m, v, words = (NAMES[kind] for kind in ("m", "v", "packed"))
    if words in needed and m in state and v in state:
        state[words] = mapped(_packed, state.pop(m), state.pop(v))
        changed = True
    elif words not in needed and words in state:
        state[m], state[v] = mapped(_unpacked, state.pop(words))
        changed = True
    for name in (m, v, NAMES["vhat"], NAMES["ema"]):
        value, dtype = state.get(name), needed.get(name)
        if not isinstance(value, torch.Tensor) or dtype in (None, value.dtype):
            continue
        if {dtype, value.dtype} <= _INTERCHANGEABLE:
            state[name] = value.to(dtype)
            changed = True
    return changed


def _packed(m: Tensor, v: Tensor) -> Tensor:
    words = torch.empty_like(m, dtype=torch.int16)
    _core.pack_moments(m.float(), v.float(), words)
    return words


def _unpacked(words: Tensor) -> tuple[Tensor, Tensor]:
    m, v = map(torch.from_numpy, _core.unpack_moments(words))
    return m, v


@torch.no_grad()
def _convert_low_bits(state: dict[str, Any], param: Tensor, needed: dict[str, torch.dtype]) -> bool:
    """Convert low bits to another number of bits, or begin them with zeros."""
    dtype, old = needed.get("low_bits"), state.get("low_bits")
    if (None if old is None else old.dtype) == dtype:
        return False
    state.pop("low_bits", None)
    if dtype is None:
        return True
    low = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    if old is not None:
        split_into(joined(local_tensor(param), local_tensor(old)), param, low)
    state["low_bits"] = low
    return True


# ---- weights and their low bits


def joined(param: Tensor, low_bits: Tensor | None) -> Tensor:
    """Return a weight in float32, from a parameter and its low bits."""
    return torch.from_numpy(_core.join_weights(param.detach(), low_bits))


def split_into(values: Tensor, param: Tensor, low_bits: Tensor | None) -> None:
    """Set a parameter and its low bits to float32 values, rounded to nearest."""
    local = local_tensor(param).detach()
    _core.split_weights(values, local, None if low_bits is None else local_tensor(low_bits))
    torch.autograd.graph.increment_version(local)


# ---- state dicts


class _Kept:
    """A tensor of a state dict that torch must not cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_tensors(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with its tensors wrapped: torch casts those to the parameter's dtype."""
    known = set(NAMES.values()) - {"step"}
    state = {
        param: {
            name: _Kept(value) if name in known and isinstance(value, torch.Tensor) else value
            for name, value in own.items()
        }
        if isinstance(own, dict)
        else own
        for param, own in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def unwrap_tensors(own: Any, param: Any) -> None:
    """Replace kept tensors by what torch would make of them, without a cast to 16 bits."""
    for name, value in own.items() if isinstance(own, dict) else ():
        if not isinstance(value, _Kept):
            continue
        own[name] = tensor = value.tensor
        if isinstance(param, torch.Tensor):
            own[name] = tensor = tensor.to(param.device)
            if torch.float64 in (param.dtype, tensor.dtype) and tensor.is_floating_point():
                own[name] = tensor.to(param.dtype) if param.is_floating_point() else tensor


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
