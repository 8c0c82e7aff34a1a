# SPDX-License-Identifier: MIT
"""Steps inside of the backward pass, each parameter as soon as its gradient is complete."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from fusedadam import _core
from fusedadam.torch.fused_step import FusedStep, name_tensors
from fusedadam.torch.scaled_losses import require_unscaled, unwatch, watch
from fusedadam.torch.state import new_plan

if TYPE_CHECKING:
    from typing_extensions import Self


class Attachment:
    """What `attach` returns: `remove()` ends it, and so does leaving its `with` block."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()

    def remove(self) -> None:
        """Leave gradients and steps to the caller again."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def attach(model: torch.nn.Module, optimizer: FusedStep) -> Attachment:
    """Let `backward` step each parameter once its gradient is complete, and free the gradient.

    No more than a few gradients are then in memory at a time. The results are those of
    `optimizer.step()` after `backward`; that call, if it stays in the loop, finds no gradients and
    does nothing. Settings and learning rates are read at each step, so schedulers work. Each
    `backward` is a step: gradients do not accumulate. Step hooks of the optimizer are not called.
    The state of all these parameters begins with this call. Not for a loss that an enabled
    `torch.amp.GradScaler` has scaled: its backward pass is refused before the first step.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters that the optimizer has, and that require gradients, are stepped.
    optimizer : Adam or AdamW
        Of this module.

    Returns
    -------
    Attachment
        Its `remove()` ends it.

    Raises
    ------
    TypeError
        The optimizer is none of this module; or a module of the model is a DistributedDataParallel,
        which averages the gradients of all ranks only after these steps.
    ValueError
        A parameter cannot be stepped in place, or is attached already; no parameter of the model is
        one of the optimizer; the averages are swapped in; or `max_grad_norm` is on: the norm of all
        gradients is known after the backward pass only.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module. Received: {type(model).__name__}")
    if not isinstance(optimizer, FusedStep):
        raise TypeError(
            "optimizer must be a fusedadam.torch.Adam or AdamW. "
            f"Received: {type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            raise TypeError(
                "model must have no DistributedDataParallel in it: the ranks would step by gradients "
                "of their own, before these are averaged. Received: one "
                + (f"as module {name!r}" if name else "as the model itself")
            )
    group_of = {
        param: index
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    }
    names: dict[torch.Tensor, str] = {
        p: name for name, p in model.named_parameters() if p.requires_grad and p in group_of
    }
    params = list(names)
    if not params:
        raise ValueError(
            "model must have parameters that require gradients and are the optimizer's. "
            f"Received: a {type(model).__name__} with none"
        )
    for param, name in names.items():
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, _Hook) for hook in hooks.values()):
            raise ValueError(
                "a parameter must be attached once, since its gradient is gone after the first "
                f"step: call remove() of the attachment before. Received: {name!r} again"
            )
    optimizer._require_not_swapped()
    for index in range(len(optimizer.param_groups)):
        _require_no_norm(optimizer, index)

    # Now, in one piece: for each parameter by itself, pages would be rounded up.
    with contextlib.ExitStack() as undo, torch.no_grad():
        groups = [group_of[param] for param in params]
        without = [i for i, param in enumerate(params) if not optimizer.state.get(param)]
        optimizer._begin(params, groups, without, undo)
        undo.pop_all()
    register: Any = torch.Tensor.register_post_accumulate_grad_hook  # without annotations in torch
    attachment = Attachment()
    try:
        attachment._undo.callback(unwatch)
        watch()
        for param, name in names.items():
            handle = register(param, _Hook(optimizer, group_of[param], name))
            attachment._undo.callback(handle.remove)
    except BaseException:
        attachment.remove()
        raise
    return attachment


class _Hook:
    """Steps a parameter whose gradient is complete."""

    def __init__(self, optimizer: FusedStep, group: int, name: str) -> None:
        self._optimizer = optimizer
        self._group = group
        self._name = name
        self._plan: _core.TensorPlan = new_plan()

    def __call__(self, param: torch.Tensor) -> None:
        try:
            require_unscaled()
            _require_no_norm(self._optimizer, self._group)
            self._optimizer._step([param], [self._group], self._plan)
        except Exception as error:
            name_tensors(error, [self._name])
            raise  # and the gradient stays, as nothing has been stepped
        except BaseException:
            # An interrupt may come when the step is over: its gradient must not be added to.
            param.grad = None
            raise
        param.grad = None
        # Without it, a learning rate scheduler warns that nobody has called step().
        self._optimizer._opt_called = True  # type: ignore[attr-defined]


def _require_no_norm(optimizer: FusedStep, index: int) -> None:
    bound = optimizer.param_groups[index].get("max_grad_norm")
    if bound:
        raise ValueError(
            "max_grad_norm must be None where steps are taken before all gradients are known. "
            f"Received: max_grad_norm={bound!r}"
        )
