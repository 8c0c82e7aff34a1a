# SPDX-License-Identifier: MIT
"""The state of an optimizer as a pytree, and its conversion from and to that of optax."""

from __future__ import annotations

import contextlib
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Tree: TypeAlias = Any  # a pytree of arrays


class AdamState(NamedTuple):
    """The state of an optimizer, a pytree. A field that is not needed is `()`.

    Attributes
    ----------
    count : int32 array, shape ()
        Number of steps taken.
    mu, nu : pytree
        First and second moments, shaped like the parameters.
    packed : pytree
        Both moments of each element in an int16, with `moments="packed"`.
    low_bits : pytree
        Low bits of the bfloat16 parameters, with `low_bits`; None for others.
    memory : pytree
        Memory for the gradients of the next step. Its values mean nothing.
    """

    count: Any
    mu: Tree = ()
    nu: Tree = ()
    packed: Tree = ()
    low_bits: Tree = ()
    memory: Tree = ()

    def without_memory(self) -> AdamState:
        """Return the state without memory for gradients: as it should be saved."""
        return self._replace(memory=())

    def with_memory(self, params: Tree) -> AdamState:
        """Return the state with memory for the gradients of these parameters."""
        return self._replace(memory=jax.tree.map(jnp.zeros_like, params))


with contextlib.suppress(ImportError):  # up to 0.6, it needs a package that JAX does not require
    from jax import export

    export.register_namedtuple_serialization(AdamState, serialized_name="fusedadam.jax.AdamState")


def is_needed(field: Tree) -> bool:
    """Whether a field of a state has arrays. NumPy's cannot be compared with ()."""
    return not (isinstance(field, tuple) and field == ())


# Fields, for the kernel's kinds of state.
FIELDS: Final = {"m": "mu", "v": "nu", "packed": "packed", "low_bits": "low_bits"}


def to_optax(state: AdamState) -> Any:
    """Return the state of `optax.scale_by_adam`.

    Raises
    ------
    ValueError
        The moments are packed, or the state has low bits of the parameters.
    """
    import optax

    if is_needed(state.packed):
        raise ValueError(
            "state must have moments of their own: optax has no packed ones. "
            "Received: a state with moments='packed'"
        )
    if is_needed(state.low_bits):
        raise ValueError(
            "state must have no low bits, for which optax has no place: drop them by "
            "state._replace(low_bits=()). Received: a state with low_bits"
        )
    return optax.ScaleByAdamState(count=state.count, mu=state.mu, nu=state.nu)


def from_optax(state: Any, params: Tree) -> AdamState:
    """Return the state of an optimizer that goes on where one of optax stopped.

    Parameters
    ----------
    state : pytree
        The state of `optax.adam`, `optax.adamw` or another transformation with one
        `optax.ScaleByAdamState` in it.
    params : pytree

    Raises
    ------
    ValueError
        There is no `optax.ScaleByAdamState`, or there are several.
    """
    import optax

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise ValueError(
            "state must contain one optax.ScaleByAdamState. "
            f"Received: {len(found)} in a {type(state).__name__}"
        )
    return AdamState(found[0].count, found[0].mu, found[0].nu).with_memory(params)
