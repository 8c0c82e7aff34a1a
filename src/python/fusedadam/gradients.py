# SPDX-License-Identifier: MIT
"""Gradients of a loss: given, or computed by autograd (callable) or torch (tensor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import numpy as np

from fusedadam._core import AdamOptions, AdamProgress, clip_gradients
from fusedadam.arrays import Array, is_tensor
from fusedadam.own_settings import grouped
from fusedadam.structures import rebuilt

if TYPE_CHECKING:
    import torch

# Settings that clip gradients.
_CLIPS: Final = frozenset(("clipnorm", "clipnorm_per_tensor", "clipvalue"))


def are_given(loss: Any) -> TypeGuard[Sequence[Any]]:
    """Whether the argument `loss` holds the gradients themselves."""
    return isinstance(loss, Sequence) and not isinstance(loss, (str, bytes))


def scaled(loss: Any, scale: float) -> Any:
    """Return a loss multiplied by `scale`; for a function, a function."""
    if callable(loss) and not is_tensor(loss):
        return lambda *args, **kwargs: scale * loss(*args, **kwargs)
    return scale * loss


def clipped(
    params: Sequence[Array],
    grads: Sequence[Array],
    options: AdamOptions,
    progress: AdamProgress,
    *,
    overrides: Mapping[int, Mapping[str, Any]],
) -> list[Array]:
    """Return unscaled and clipped gradients; `overrides` has the settings of single parameters."""
    changed = clip_gradients(params, grads, options, progress)
    clips = {
        i: {name: value for name, value in own.items() if name in _CLIPS}
        for i, own in overrides.items()
    }
    for positions, settings in grouped(clips):
        if settings:
            # Pass all gradients, since the norm for `clipnorm` is that of all.
            by_own = clip_gradients(params, grads, options.changed(settings), progress)
            for i in set(positions).intersection(range(len(by_own))):
                changed[i] = by_own[i]
    return changed


def gradients(loss: Any, params: Sequence[Any]) -> Sequence[Any]:
    """Return the gradient of `loss` for each parameter; by torch, None for an unused one."""
    if is_tensor(loss):
        return _by_torch(loss, params)
    if callable(loss):
        return _by_autograd(loss, params)
    if are_given(loss):
        return loss
    raise TypeError(
        "loss must be a callable loss(params) written with autograd.numpy, a scalar torch.Tensor, "
        f"or a sequence of arrays (the gradients themselves). Received: {type(loss).__name__}"
    )


def value_and_gradients(
    loss: Any, tree: Any, params: Sequence[Any], scale: float
) -> tuple[float, Sequence[Any]]:
    """Return the value of a loss, and the gradients of `scale` times the loss.

    A callable loss is called with the nested parameters, `tree`; `params` is the same as a flat
    list.
    """
    if is_tensor(loss):
        grads = _by_torch(loss if scale == 1 else scaled(loss, scale), params)
        return float(loss.detach()), grads
    if not callable(loss):
        raise TypeError(
            "loss must be a callable loss(params) written with autograd.numpy, or a scalar "
            "torch.Tensor; if you have the gradients, call step(params, grads). "
            f"Received: {type(loss).__name__}"
        )
    from autograd.tracer import getval

    values = []

    def of_list(arrays: Sequence[Any]) -> Any:
        value = loss(rebuilt(tree, iter([arrays[i] for i in range(len(params))])))
        values.append(value)
        return value if scale == 1 else scale * value

    grads = _by_autograd(of_list, params)
    value = values[0]
    while value is not getval(value):  # autograd adds one box per nested trace
        value = getval(value)
    return float(value), grads


def _by_autograd(loss: Any, params: Sequence[Any]) -> Sequence[Any]:
    import autograd

    for i, param in enumerate(params):
        if not isinstance(param, np.ndarray):
            raise TypeError(
                f"params[{i}] must be a numpy.ndarray if the loss is a callable. "
                f"Received: {type(param).__name__}"
            )
    # autograd supports ndarray but not its subclasses.
    grads = autograd.grad(loss)([np.asarray(param) for param in params])
    # NumPy's type promotion within the loss may have changed the dtype.
    return [np.asarray(g, dtype=p.dtype) for g, p in zip(grads, params, strict=True)]


def _by_torch(loss: torch.Tensor, params: Sequence[Any]) -> Sequence[Any]:
    import torch

    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar tensor. Received: shape={tuple(loss.shape)}")
    for i, param in enumerate(params):
        if not is_tensor(param):
            raise TypeError(
                f"params[{i}] must be a torch.Tensor if the loss is one. "
                f"Received: {type(param).__name__}"
            )
        if not param.requires_grad:
            raise ValueError(f"params[{i}] must require a gradient. Received: requires_grad=False")
    grads: Sequence[torch.Tensor | None] = torch.autograd.grad(
        loss.reshape(()), list(params), allow_unused=True
    )
    return grads


def unzipped(pairs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split one or more pairs into a sequence of gradients and a sequence of parameters."""
    try:
        grads, params = zip(*pairs, strict=True)
    except (TypeError, ValueError):
        i, pair = next(
            (i, pair)
            for i, pair in enumerate(pairs)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2
        )
        raise TypeError(
            f"grads_and_vars[{i}] must be a pair (gradient, parameter). "
            f"Received: {type(pair).__name__}"
        ) from None
    return grads, params
