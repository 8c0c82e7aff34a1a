# SPDX-License-Identifier: MIT
"""Splitting the weights of a float32 model into bfloat16 parameters and low bits."""

from __future__ import annotations

import torch

from fusedadam.torch.fused_step import FusedStep, groups_of
from fusedadam.torch.local import any_distributed
from fusedadam.torch.state import split_into


@torch.no_grad()
def split_(model: torch.nn.Module, optimizer: FusedStep) -> None:
    """Turn a float32 model into a bfloat16 model, and keep the low bits in the optimizer.

    Like `model.bfloat16()`, but each parameter of a group with `low_bits` keeps 8 or 16 bits more:
    steps compute with a weight of 24 or 32 bits, and the model with its rounding to bfloat16. Call
    it after the optimizer has been made, and before or between steps. `optimizer.master_weights`
    returns the weights in float32.

    Parameters
    ----------
    model : torch.nn.Module
        Its float32 parameters and buffers become bfloat16, in place: they are the same objects
        afterwards. Their gradients are dropped.
    optimizer : Adam or AdamW
        An optimizer of `fusedadam.torch` with the parameters of the model.

    Raises
    ------
    TypeError
        The optimizer is not one of `fusedadam.torch`, or a parameter is a DTensor.
    ValueError
        No group with `low_bits` has a float32 parameter of the model, or one has gaps. Nothing has
        changed.

    Notes
    -----
    The float32 weights are freed one after the other, so that the peak of memory is low. An
    interrupt in the middle therefore leaves a model of which a part is rounded to bfloat16.

    Examples
    --------
    >>> import torch
    >>> import fusedadam.torch
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = fusedadam.torch.AdamW(model.parameters(), moments="packed", low_bits="int8")
    >>> fusedadam.torch.split_(model, optimizer)
    >>> model.weight.dtype, optimizer.master_weights(model.weight).dtype
    (torch.bfloat16, torch.float32)
    """
    groups = groups_of(model, optimizer)
    low_bits_of = [group.get("low_bits") for group in optimizer.param_groups]
    group_of = {param: i for param, i in groups.items() if low_bits_of[i] is not None}
    weights: list[torch.Tensor] = [
        param for param in model.parameters() if param in group_of and param.dtype == torch.float32
    ]
    if not weights:
        raise ValueError(
            "model must have float32 parameters in a group with low_bits. Received: none, "
            f"low_bits={low_bits_of!r}"
        )
    if any_distributed(weights):
        raise TypeError("model must be split before it is sharded. Received: a DTensor")
    for index, param in enumerate(weights):
        if torch.empty_like(param).stride() != param.stride():
            raise ValueError(
                "the parameters of the model must fill their memory without gaps or overlaps. "
                f"Received: stride={param.stride()} of float32 parameter {index}"
            )
    optimizer._require_not_swapped()
    # One after the other, and before the state is allocated: the memory of the float32 weights is
    # then free again, and no more is needed than afterwards.
    low_bits = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype != torch.float32:
            continue
        values, tensor.grad = tensor.data, None
        tensor.data = values.bfloat16()
        if tensor in group_of:
            dtype = getattr(torch, str(low_bits_of[group_of[tensor]]))
            low_bits[tensor] = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
            split_into(values, tensor, low_bits[tensor])
    optimizer._adopt(weights, [group_of[param] for param in weights])
    for param in weights:
        optimizer.state[param]["low_bits"].copy_(low_bits.pop(param))
