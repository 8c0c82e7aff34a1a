# SPDX-License-Identifier: MIT
"""Adam and AdamW as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fusedadam import xla
from fusedadam._core import AdamOptions
from fusedadam.adapters import flushes
from fusedadam.jax.leaves import Leaves
from fusedadam.jax.state import AdamState, Tree, is_needed

LearningRate: TypeAlias = float | Any | Callable[[Any], Any]

# Arguments, by the core's names for settings.
_ARGUMENTS: Final = {
    "beta_1": "b1",
    "beta_2": "b2",
    "epsilon": "eps",
    "clipnorm": "max_grad_norm",
}


class Optimizer(NamedTuple):
    """An optimizer: the functions of `optax.GradientTransformation`, and `step`.

    Attributes
    ----------
    init : callable
        ``init(params) -> state``
    update : callable
        ``update(grads, state, params=None) -> (updates, state)``: what is to be added to the
        parameters, which are needed for weight decay. Moves 40 bytes per float32 parameter.
    step : callable
        ``step(grads, state, params) -> (params, state)``. Moves 28 bytes per float32 parameter.
    """

    init: Callable[[Tree], AdamState]
    update: Callable[..., tuple[Tree, AdamState]]
    step: Callable[[Tree, AdamState, Tree], tuple[Tree, AdamState]]


def adam(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    moments: Literal["auto", "float32", "bfloat16", "packed"] = "auto",
    low_bits: Literal["int8", "int16"] | None = None,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
    keep_gradients: bool = True,
) -> Optimizer:
    """Adam, with the formula of `optax.adam`. The arguments are those of `adamw`."""
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay=0.0,
        max_grad_norm=max_grad_norm,
        skip_nonfinite=skip_nonfinite,
        moments=moments,
        low_bits=low_bits,
        rounding=rounding,
        seed=seed,
        keep_gradients=keep_gradients,
    )


def adamw(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    *,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    moments: Literal["auto", "float32", "bfloat16", "packed"] = "auto",
    low_bits: Literal["int8", "int16"] | None = None,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
    keep_gradients: bool = True,
) -> Optimizer:
    r"""AdamW, with the formula of `optax.adamw`.

    With :math:`t` the number of the step, from 1:

    .. math::
        m &= b_1 m + (1 - b_1) g \\
        v &= b_2 v + (1 - b_2) g^2 \\
        p &= p - lr \cdot \text{weight_decay} \cdot p - lr
            \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \text{eps}}

    Parameters are float32, float64, float16 or bfloat16, on the CPU; those of 16 bits are computed
    in float32.

    Parameters
    ----------
    learning_rate : float, array of shape (), or callable
        A callable is a schedule: ``learning_rate(count)`` with the number of steps taken so far.
        A float is used in double precision.
    b1, b2 : float
        Decay rates of the moments, >= 0 and < 1.
    eps : float
        Added to the root, >= 0.
    weight_decay : float
        >= 0.
    mask : pytree of bool, or callable
        The parameters with weight decay; as in optax, a prefix of their tree, or a function that
        makes it from them. None: all.
    max_grad_norm : float, optional
        Upper bound of the norm of all gradients, as `optax.clip_by_global_norm`.
    skip_nonfinite : bool
        Skip a step if a gradient is not finite.
    moments, low_bits, rounding, seed
        How state is stored and rounded; see `docs/storage.md`. "auto" is the dtype of the
        parameter, but bfloat16 for float16.
    keep_gradients : bool
        Keep memory for the gradients in the state, as large as the parameters. Without it, XLA
        allocates the same memory for each step, and jitted steps of large models become slower
        than those of optax.

    Returns
    -------
    Optimizer

    Raises
    ------
    TypeError, ValueError
        An argument is out of range, or is not known when the program is traced.
    """
    options = _options(
        beta_1=b1,
        beta_2=b2,
        epsilon=eps,
        weight_decay=weight_decay,
        clipnorm=max_grad_norm,
        skip_nonfinite=skip_nonfinite,
        moments=moments,
        low_bits=low_bits,
        rounding=rounding,
        seed=seed,
    )

    def init(params: Tree) -> AdamState:
        leaves = Leaves("params", params, options)
        state = leaves.new_state(jnp.zeros((), jnp.int32), leaves.fresh_state(), ())
        return state.with_memory(params) if keep_gradients else state

    def step(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        leaves = Leaves("params", params, options)
        gradients = leaves.gradients(grads, in_dtype_of_params=False)
        memory = _memory(leaves, state)
        stepped, arrays, count = xla.step(
            leaves.params,
            gradients,
            leaves.state(state),
            _count(state, memory),
            _rate(learning_rate, state.count),
            options,
            _undecayed(params, mask),
        )
        return leaves.tree(stepped), leaves.new_state(
            count, arrays, _kept(leaves, memory, gradients)
        )

    def update(
        grads: Tree, state: AdamState, params: Tree = None, **_: Any
    ) -> tuple[Tree, AdamState]:
        if low_bits is not None:
            raise ValueError(
                "update(...) cannot return low bits: call step(...), or leave low_bits=None. "
                f"Received: low_bits={low_bits!r}"
            )
        if params is None and weight_decay != 0:
            raise ValueError(
                "update(grads, state, params) needs params for weight decay. Received: params=None"
            )
        leaves = (
            Leaves("grads", grads, options) if params is None else Leaves("params", params, options)
        )
        memory = _memory(leaves, state)
        lr = _rate(learning_rate, state.count)
        updates, arrays, count = xla.step(
            None,
            leaves.gradients(grads, in_dtype_of_params=True),
            leaves.state(state),
            _count(state, memory),
            lr,
            options.changed({"weight_decay": None}),
        )
        new_state = leaves.new_state(count, arrays, _kept(leaves, memory, updates))
        if weight_decay != 0:
            undecayed = _undecayed(params, mask)
            decay = lr * weight_decay
            if skip_nonfinite:
                decay = jnp.where(count == state.count, 0, decay)
            for i, param in enumerate(leaves.params):
                if i not in undecayed:
                    updates[i] -= (decay * param).astype(param.dtype)
        return leaves.tree(updates), new_state

    return Optimizer(init, update, step)


def _options(**settings: Any) -> AdamOptions:
    given = {_ARGUMENTS.get(name, name): value for name, value in settings.items()}
    traced = {name: value for name, value in given.items() if isinstance(value, jax.core.Tracer)}
    if traced:
        raise TypeError(
            f"{', '.join(traced)} must be known when the program is traced; with "
            f"optax.inject_hyperparams, pass static_args={tuple(traced)}. "
            f"Received: {', '.join(map(str, traced.values()))}"
        )
    try:
        options = AdamOptions(settings | {"bias_corrected_epsilon": True})
    except (TypeError, ValueError) as error:
        message = str(error)
        for name, argument in _ARGUMENTS.items():
            message = message.replace(name, argument)
        raise type(error)(message) from None
    return options.changed(
        {
            "flush_denormals": flushes(settings["epsilon"]),
            "weight_decay": settings["weight_decay"] or None,
        }
    )


def _rate(learning_rate: LearningRate, count: Any) -> Any:
    return xla.rate(learning_rate(count) if callable(learning_rate) else learning_rate)


def _undecayed(params: Tree, mask: Any) -> frozenset[int]:
    if mask is None:
        return frozenset()
    decays = mask(params) if callable(mask) else mask
    of_each = jax.tree.map(lambda d, part: jax.tree.map(lambda _: bool(d), part), decays, params)
    return frozenset(i for i, d in enumerate(jax.tree.leaves(of_each)) if not d)


# -- memory for gradients -----------------------------------------------------------------------


def _memory(leaves: Leaves, state: AdamState) -> list[Any]:
    return leaves.match("state.memory", state.memory) if is_needed(state.memory) else []


def _count(state: AdamState, memory: list[Any]) -> Any:
    count = jnp.asarray(state.count)
    if count.dtype != "int32" or count.shape != ():
        raise ValueError(
            "state.count must be int32 of shape (), as init(params) makes it. "
            f"Received: {count.dtype} of shape {count.shape}"
        )
    return xla.using(memory, count)


def _kept(leaves: Leaves, memory: list[Any], gradients: list[Any]) -> Tree:
    """Return what XLA shall write into the memory: the gradients, if they have its dtype."""
    if not memory:
        return ()
    return leaves.tree(
        [g if g.dtype == m.dtype else m for m, g in zip(memory, gradients, strict=True)]
    )
