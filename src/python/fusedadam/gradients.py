# SPDX-License-Identifier: MIT
"""Gradients of a loss: as given, by autograd from a callable, or by torch from a tensor."""

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

# Settings that change what a step makes of the gradients.
_CLIPS: Final = frozenset(("clipnorm", "clipnorm_per_tensor", "clipvalue"))


def are_given(loss: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a loss is the gradients themselves, and not something to take them of."""
    return isinstance(loss, Sequence) and not isinstance(loss, (str, bytes))


def scaled(loss: Any, scale: float) -> Any:
    """A loss multiplied by `scale`: a function for a function, a product for what is a value."""
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
    """Gradients as a step uses them: new arrays where they are clipped.

    `overrides` are the settings that parameters have of their own, by position.
    """
    changed = clip_gradients(params, grads, options, progress)
    clips = {
        i: {name: value for name, value in own.items() if name in _CLIPS}
        for i, own in overrides.items()
    }
    for positions, settings in grouped(clips):
        if settings:
            # The norm is that of all gradients.
            by_own = clip_gradients(params, grads, options.changed(settings), progress)
            for i in set(positions).intersection(range(len(by_own))):
                changed[i] = by_own[i]
    return changed


def gradients(loss: Any, params: Sequence[Any]) -> Sequence[Any]:
    """Gradients of `loss` by each of `params`; None for a torch parameter out of its reach.

    Raises
    ------
    TypeError
        `loss` is none of the three kinds.
    ValueError
        A torch loss is no scalar, or a torch parameter requires no gradient.
    """
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
    """The value of a loss, and the gradients of `scale` times the loss.

    Parameters
    ----------
    loss : callable or torch.Tensor
        A callable gets `tree` with its arrays as autograd traces them.
    tree
        The parameters as they are nested, and `params` the same in one list.

    Raises
    ------
    TypeError
        `loss` is none of the two kinds.
    ValueError
        A torch loss is no scalar, or a torch parameter requires no gradient.
    """
    if is_tensor(loss):
        grads = _by_torch(loss if scale == 1 else scaled(loss, scale), params)
        return float(loss.detach()), grads
    if not callable(loss):
        raise TypeError(
            "loss must be a callable loss(params) written with autograd.numpy, or a scalar "
            "torch.Tensor; with gradients at hand, call step(params, grads). "
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
    while value is not getval(value):  # one box for each trace of autograd
        value = getval(value)
    return float(value), grads


def _by_autograd(loss: Any, params: Sequence[Any]) -> Sequence[Any]:
    import autograd

    for i, param in enumerate(params):
        if not isinstance(param, np.ndarray):
            raise TypeError(
                f"params[{i}] must be a numpy.ndarray where the loss is a callable. "
                f"Received: {type(param).__name__}"
            )
    # autograd knows ndarray itself and none of its subclasses.
    grads = autograd.grad(loss)([np.asarray(param) for param in params])
    # NumPy's promotion inside the loss decides the dtype of these, not the user, who means the
    # parameter's.
    return [np.asarray(g, dtype=p.dtype) for g, p in zip(grads, params, strict=True)]


def _by_torch(loss: torch.Tensor, params: Sequence[Any]) -> Sequence[Any]:
    import torch

    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar tensor. Received: shape={tuple(loss.shape)}")
    for i, param in enumerate(params):
        if not is_tensor(param):
            raise TypeError(
                f"params[{i}] must be a torch.Tensor where the loss is one. "
                f"Received: {type(param).__name__}"
            )
        if not param.requires_grad:
            raise ValueError(f"params[{i}] must require a gradient. Received: requires_grad=False")
    grads: Sequence[torch.Tensor | None] = torch.autograd.grad(
        loss.reshape(()), list(params), allow_unused=True
    )
    return grads


def unzipped(pairs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Gradients and parameters, each in a sequence of its own."""
    if not pairs:
        return (), ()
    try:
        grads, params = zip(*pairs, strict=True)
    except (TypeError, ValueError):
        for i, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    f"grads_and_vars[{i}] must be a pair (gradient, parameter). "
                    f"Received: {type(pair).__name__}"
                ) from None
        raise
    return grads, params
