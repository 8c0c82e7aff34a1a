# SPDX-License-Identifier: MIT
"""Subclasses of `torch.optim.Adam` and `AdamW` that step with the fused kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from fusedadam.torch.fused_step import FusedStep


class Adam(FusedStep, torch.optim.Adam):
    r"""`torch.optim.Adam` for CPU tensors, stepped in one pass over their memory.

    A subclass of `torch.optim.Adam` with the same settings, state and checkpoints. It implements
    Algorithm 1 of [1]_, where step :math:`t` of a parameter is

    .. math::

        g &= \pm g + weight\_decay \cdot p \\
        m &= \beta_1 m + (1 - \beta_1) g \\
        v &= \beta_2 v + (1 - \beta_2) g^2 \\
        p &= p - lr \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + eps}

    Parameters
    ----------
    params : iterable
        CPU tensors in float32, float64, bfloat16 or float16, or complex ones, which are treated as
        pairs of real ones; named tensors; or groups with their own settings. Any strides without
        gaps or overlaps are valid. 16-bit parameters are computed in float32.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As for `torch.optim.Adam`.
    foreach, fused, capturable : bool, optional
        Accepted, but ignored.
    differentiable : bool, default False
        Must be False.
    max_grad_norm : float, optional
        Upper bound of the norm of all gradients that this process steps: if the norm is at least
        `max_grad_norm`, the step uses the gradients times `max_grad_norm / norm`. The gradients
        themselves are not modified. 0 disables clipping.
    ema_decay : float, optional
        Keep a moving average of each parameter, `ema` in its state: after a step,
        :math:`ema = ema\_decay \cdot ema + (1 - ema\_decay) \, p`; the first step sets it to p.
        See `swap_ema`.
    zero_grad_in_step : bool, default False
        Set the gradients to zero during the step.
    moments : {"auto", "float32", "bfloat16", "packed"}, default "auto"
        How the moments are stored: "auto" is "bfloat16" for 16-bit parameters (as in torch, but
        rounded stochastically), and the precision of the parameter for others; "packed" is one
        16-bit word for both, and excludes `amsgrad`. `docs/storage.md` has the formats.
    low_bits : {None, "int8", "int16"}, default None
        Keep this many more bits of each bfloat16 parameter in the state; with "int16" they make up
        a float32 weight exactly. See `split_` and `master_weights`.
    rounding : {"stochastic", "nearest"}, default "stochastic"
        Of 16-bit parameters without low bits, and of moments in bfloat16. "nearest" is what torch
        does: weights then ignore updates that are small compared with them.
    seed : int, default 0
        Of stochastic rounding, >= 0.

    Raises
    ------
    TypeError, ValueError
        A setting is not a number or out of range, `differentiable` is set, or a group has the same
        parameter twice.

    Notes
    -----
    With a sparse gradient, such as from `torch.nn.Embedding(sparse=True)`, only the rows in it are
    stepped, as in `torch.optim.SparseAdam` (which has no bias correction for `eps`).

    Results are bitwise identical for every instruction set and thread count. Subnormal moments are
    flushed to zero, unless `eps` is below 1e-12.

    References
    ----------
    .. [1] D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization",
       https://arxiv.org/abs/1412.6980
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        zero_grad_in_step: bool = False,
        moments: Literal["auto", "float32", "bfloat16", "packed"] = "auto",
        low_bits: Literal["int8", "int16"] | None = None,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        **later: Any,
    ) -> None:
        self._use_extras(
            max_grad_norm=max_grad_norm,
            ema_decay=ema_decay,
            zero_grad_in_step=zero_grad_in_step,
            moments=moments,
            low_bits=low_bits,
            rounding=rounding,
            seed=seed,
        )
        # `later` has arguments newer than torch 2.6, such as decoupled_weight_decay.
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **later,
        )
        self.defaults.update(self._extras)


class AdamW(FusedStep, torch.optim.AdamW):
    r"""`torch.optim.AdamW` for CPU tensors, stepped in one pass over their memory.

    As `Adam`, but with decoupled weight decay [1]_: before the update,
    :math:`p = p - lr \cdot weight\_decay \cdot p`.

    Parameters
    ----------
    params : iterable
        As for `Adam`.
    lr, betas, eps, weight_decay, amsgrad, maximize
        As for `torch.optim.AdamW`.
    foreach, fused, capturable, differentiable, max_grad_norm, ema_decay, zero_grad_in_step
        As for `Adam`.
    moments, low_bits, rounding, seed
        As for `Adam`.

    Raises
    ------
    TypeError, ValueError
        As for `Adam`.

    References
    ----------
    .. [1] I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization",
       https://arxiv.org/abs/1711.05101
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        zero_grad_in_step: bool = False,
        moments: Literal["auto", "float32", "bfloat16", "packed"] = "auto",
        low_bits: Literal["int8", "int16"] | None = None,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
    ) -> None:
        self._use_extras(
            max_grad_norm=max_grad_norm,
            ema_decay=ema_decay,
            zero_grad_in_step=zero_grad_in_step,
            moments=moments,
            low_bits=low_bits,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(self._extras)
