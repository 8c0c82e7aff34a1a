# SPDX-License-Identifier: MIT
"""The parameters of a step as lists, and what else comes in trees of the same structure."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fusedadam._core import AdamOptions, needed_state
from fusedadam.jax.state import FIELDS, AdamState, Tree
from fusedadam.xla import readable


class Leaves:
    """The leaves of the parameters, or of gradients that stand for them.

    Raises
    ------
    TypeError, ValueError
        One has a dtype that cannot be stepped with these options.
    """

    def __init__(self, name: str, params: Tree, options: AdamOptions) -> None:
        with_paths, tree = jax.tree_util.tree_flatten_with_path(params)
        self._tree: Any = tree
        self._paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
        self.params = [jnp.asarray(leaf) for _, leaf in with_paths]
        self._needed: list[dict[str, str]] = []
        for path, leaf in zip(self._paths, self.params, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{name}{path} must be float32, float64, float16 or bfloat16; of a complex "
                    f"array, step the real and the imaginary part. Received: dtype={leaf.dtype}"
                )
            self._needed.append(needed_state(options, str(leaf.dtype), name + path))

    def tree(self, leaves: list[Any]) -> Tree:
        """Return a tree of the structure of the parameters."""
        return self._tree.unflatten(leaves)

    def match(self, name: str, tree: Tree) -> list[Any]:
        """Return the leaves of a tree that must have the structure and shapes of the parameters.

        A leaf may be None.
        """
        try:
            leaves: list[Any] = self._tree.flatten_up_to(tree)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} must have the structure of the parameters, {self._tree}. "
                f"Received: {jax.tree.structure(tree)}"
            ) from error
        for path, leaf, param in zip(self._paths, leaves, self.params, strict=True):
            if leaf is not None and jnp.shape(leaf) != param.shape:
                raise ValueError(
                    f"{name}{path} must have the shape of its parameter, {param.shape}. "
                    f"Received: shape={jnp.shape(leaf)}"
                )
        return leaves

    def gradients(self, grads: Tree, *, in_dtype_of_params: bool) -> list[Any]:
        """Return the gradients in dtypes that the kernel reads."""
        leaves = self.match("grads", grads)
        for i, (grad, param) in enumerate(zip(leaves, self.params, strict=True)):
            received = getattr(grad, "dtype", None)
            if received is None or not jnp.issubdtype(received, jnp.floating):
                raise TypeError(
                    f"grads{self._paths[i]} must be an array of floating-point numbers. "
                    f"Received: {grad if received is None else f'dtype={received}'}"
                )
            array, dtype = jnp.asarray(grad), str(param.dtype)
            leaves[i] = array.astype(dtype) if in_dtype_of_params else readable(array, dtype)
        return leaves

    def fresh_state(self) -> list[dict[str, Any]]:
        """Return zeros, for each parameter by the kernel's kinds of state."""
        return [
            {kind: jnp.zeros_like(param, dtype=dtype) for kind, dtype in needed.items()}
            for param, needed in zip(self.params, self._needed, strict=True)
        ]

    def state(self, state: AdamState) -> list[dict[str, Any]]:
        """Return the arrays of a state, for each parameter by the kernel's kinds of state."""
        arrays: list[dict[str, Any]] = [{} for _ in self.params]
        for kind, field in FIELDS.items():
            if not any(kind in needed for needed in self._needed):
                continue
            leaves = self.match(f"state.{field}", getattr(state, field))
            for i, needed in enumerate(self._needed):
                if kind not in needed:
                    continue
                received = getattr(leaves[i], "dtype", None)
                if str(received) != needed[kind]:
                    raise ValueError(
                        f"state.{field}{self._paths[i]} must be {needed[kind]}, as init(params) "
                        f"makes it with these settings. Received: {received}"
                    )
                arrays[i][kind] = leaves[i]
        return arrays

    def new_state(self, count: Any, arrays: list[dict[str, Any]], memory: Tree) -> AdamState:
        """Return a state with these arrays."""
        fields = {
            field: self.tree([own.get(kind) for own in arrays])
            for kind, field in FIELDS.items()
            if any(kind in own for own in arrays)
        }
        return AdamState(count, **fields, memory=memory)
