# SPDX-License-Identifier: MIT
"""Stepping during the backward pass: each parameter as soon as its gradient is complete."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from fusedadam.torch.fused_step import FusedStep, groups_of, name_tensors
from fusedadam.torch.scaled_losses import require_unscaled, unwatch, watch
from fusedadam.torch.state import Plan

if TYPE_CHECKING:
    from typing_extensions import Self


class Attachment:
    """The result of `attach`; `remove()` or the end of its `with` block detaches the optimizer."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()

    def remove(self) -> None:
        """Detach: `backward` keeps the gradients and takes no steps again."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def attach(model: torch.nn.Module, optimizer: FusedStep) -> Attachment:
    """Make `backward` step each parameter once its gradient is complete, and free the gradient.

    Only a few gradients are then in memory at a time. The results are those of `optimizer.step()`
    after `backward`; such a call finds no gradients and does nothing. Settings are read at each
    step, so schedulers work. Each `backward` takes a step: gradients do not accumulate. Step hooks
    of the optimizer are not called. This call allocates the state of all these parameters. A
    backward pass of a loss scaled by an enabled `torch.amp.GradScaler` raises before its first
    step.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters that require gradients and belong to the optimizer are stepped.
    optimizer : Adam or AdamW
        An optimizer of `fusedadam.torch`.

    Returns
    -------
    Attachment
        Call its `remove()` to detach.

    Raises
    ------
    TypeError
        The optimizer is not one of `fusedadam.torch`; or the model contains a
        DistributedDataParallel, which averages the gradients of the ranks only after these steps.
    ValueError
        A parameter cannot be stepped in place, or is already attached; the model and the optimizer
        share no parameter that requires a gradient; the averages are swapped in; or `max_grad_norm`
        is set, since the norm of all gradients is known only after the backward pass.
    """
    group_of = groups_of(model, optimizer)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            raise TypeError(
                "model must contain no DistributedDataParallel: each rank would step with its own "
                "gradients, before they are averaged. Received: one "
                + (f"as module {name!r}" if name else "as the model itself")
            )
    names: dict[torch.Tensor, str] = {
        p: name for name, p in model.named_parameters() if p.requires_grad and p in group_of
    }
    params = list(names)
    if not params:
        raise ValueError(
            "model must have parameters that require gradients and belong to the optimizer. "
            f"Received: a {type(model).__name__} with none"
        )
    for param, name in names.items():
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, _Hook) for hook in hooks.values()):
            raise ValueError(
                "a parameter can only be attached once, since the first step frees its gradient: "
                f"call remove() of the other attachment. Received: {name!r} again"
            )
    optimizer._require_not_swapped()
    for index in range(len(optimizer.param_groups)):
        _require_no_norm(optimizer, index)

    # Allocate all state at once: for each parameter separately, it would be rounded up to pages.
    with contextlib.ExitStack() as undo, torch.no_grad():
        groups = [group_of[param] for param in params]
        optimizer._begin(params, groups, optimizer._without_state(params), undo)
        undo.pop_all()
    register: Any = torch.Tensor.register_post_accumulate_grad_hook  # not annotated in torch
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
    """A hook that steps a parameter and frees its gradient."""

    def __init__(self, optimizer: FusedStep, group: int, name: str) -> None:
        self._optimizer = optimizer
        self._group = group
        self._name = name
        self._plan = Plan()

    def __call__(self, param: torch.Tensor) -> None:
        try:
            require_unscaled()
            _require_no_norm(self._optimizer, self._group)
            self._optimizer._step([param], [self._group], self._plan)
        except Exception as error:
            name_tensors(error, [self._name])
            raise  # nothing has been stepped, so keep the gradient
        except BaseException:
            # An interrupt may come after the step; the next backward must not add to this gradient.
            param.grad = None
            raise
        param.grad = None
        # Otherwise a learning rate scheduler warns that step() has not been called.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]


def _require_no_norm(optimizer: FusedStep, index: int) -> None:
    bound = optimizer.param_groups[index].get("max_grad_norm")
    if bound:
        raise ValueError(
            "max_grad_norm must be None if steps are taken before all gradients are known. "
            f"Received: max_grad_norm={bound!r}"
        )
