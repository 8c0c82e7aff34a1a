# SPDX-License-Identifier: MIT
"""The fused step in programs that JAX compiles, for the adapters of JAX and of Keras on JAX.

The step is a call of XLA's foreign function interface. It writes into the memory of its arguments:
in place if XLA may reuse that memory, which a donated argument of `jax.jit` allows. Otherwise XLA
copies it before the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from fusedadam._core import AdamOptions, __version__, xla_handlers, xla_shared_words

Array: TypeAlias = Any  # an array of JAX, or a tracer
# Arrays of one parameter, by the names of the kernel's kinds of state.
State: TypeAlias = Mapping[str, Array]

if not hasattr(jax, "ffi"):
    raise ImportError(
        "steps in JAX need jax.ffi, which jax 0.5 and later have: upgrade jax. "
        f"Received: jax {jax.__version__}"
    )

# XLA's time to compile grows faster than the number of tensors in a call: with 1,000 in one call it
# takes minutes, with 32 in each 2 seconds.
TENSORS_IN_A_CALL: Final = 32

# The version is part of the names, since programs may be stored and used with another version.
NAMES: Final = {name: f"fusedadam.{name}.{__version__}" for name in xla_handlers()}
for _name, _handler in xla_handlers().items():
    jax.ffi.register_ffi_target(NAMES[_name], _handler, platform="cpu")

_DEFAULTS: Final = AdamOptions().as_dict()


def _attributes(options: AdamOptions) -> dict[str, Any]:
    """Return the settings that are not at their defaults, as attributes of a call."""
    types = {bool: np.bool_, int: np.int64, float: np.float64, str: str}
    return {
        name: types[type(value)](value)
        for name, value in options.as_dict().items()
        if value != _DEFAULTS[name] and value is not None and name != "lr"
    }


class _Buffers:
    """The buffers of a call."""

    def __init__(self) -> None:
        self._arguments: list[Array] = []
        self._changed: list[int] = []

    def read(self, array: Array) -> None:
        """Add an argument."""
        self._arguments.append(array)

    def change(self, array: Array) -> None:
        """Add an argument, and a result in its memory."""
        self._changed.append(len(self._arguments))
        self._arguments.append(array)

    def call(
        self, name: str, attributes: Mapping[str, Any], new: Sequence[jax.ShapeDtypeStruct] = ()
    ) -> Sequence[Array]:
        """Return the results: what was changed, and new arrays."""
        changed = [self._arguments[i] for i in self._changed]
        call = jax.ffi.ffi_call(
            NAMES[name],
            [*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in changed), *new],
            vmap_method="broadcast_all",
            input_output_aliases={argument: i for i, argument in enumerate(self._changed)},
        )
        return _not_differentiable(functools.partial(call, **attributes))(*self._arguments)


def _not_differentiable(call: Callable[..., Sequence[Array]]) -> Callable[..., Sequence[Array]]:
    function: Any = jax.custom_jvp(call)
    function.defjvp(_refuse_derivatives)
    return cast("Callable[..., Sequence[Array]]", function)


def _refuse_derivatives(*_: Any) -> Any:
    raise TypeError(
        "a step of fusedadam cannot be differentiated: apply jax.lax.stop_gradient to what goes "
        "into it, or differentiate through an optimizer of optax"
    )


def _bits_of(lr: float) -> Array:
    """Return a float64, which JAX may not have, as two uint32."""
    return np.frombuffer(np.float64(lr).tobytes(), np.uint32)


# -- what goes into a step ----------------------------------------------------------------------

# The kernel reads gradients in any of these for parameters in any of these.
_COMPUTED_IN_FLOAT32: Final = ("float32", "float16", "bfloat16")


def readable(grad: Array, dtype: str) -> Array:
    """Return a gradient in a dtype that the kernel reads for parameters of this dtype."""
    is_read = {str(grad.dtype), dtype} <= {*_COMPUTED_IN_FLOAT32}
    return grad if is_read else grad.astype(dtype)


def rate(learning_rate: float | Array) -> float | Array:
    """Return a learning rate as `step` takes it."""
    if isinstance(learning_rate, (float, int)):
        return learning_rate
    lr = jnp.asarray(learning_rate)
    if lr.shape != ():
        raise ValueError(f"learning_rate must have shape (). Received: shape={lr.shape}")
    return lr if lr.dtype == "float64" else lr.astype(jnp.float32)


def using(memory: Sequence[Array], count: Array) -> Array:
    """Return the count, in a way that uses memory: `jax.jit` drops an argument without use."""
    return count + sum(jnp.sum(jnp.reshape(m, -1)[:0]).astype(count.dtype) for m in memory)


# -- the step -----------------------------------------------------------------------------------


def step(
    params: Sequence[Array] | None,
    grads: Sequence[Array],
    state: Sequence[State],
    count: Array,
    lr: float | Array,
    options: AdamOptions,
    undecayed: Collection[int] = (),
    *,
    keras_norms: bool = False,
) -> tuple[list[Array], list[dict[str, Array]], Array]:
    """Return the parameters after a step, the state, and the count.

    Parameters
    ----------
    params : sequence of arrays, or None
        None: the step returns updates in place of the parameters, which have the dtypes of the
        gradients.
    grads : sequence of arrays
        Of the shapes of the parameters, and `readable`.
    state : sequence of dict
        For each parameter, what `needed_state` of its dtype names.
    count : int32 array, shape ()
        Number of calls so far.
    lr : float or array
        What `rate` returns. A float is exact.
    options : AdamOptions
    undecayed : collection of int
        Indices of the parameters without weight decay.
    keras_norms : bool
        Whether a norm for clipping that is not finite makes gradients NaN, as in Keras 3.
    """
    attributes = _attributes(options) | {
        "updates": np.bool_(params is None),
        "keras_norms": np.bool_(keras_norms),
    }
    lr = lr if isinstance(lr, jax.Array) else _bits_of(lr)
    counts = _Buffers()
    if len(grads) > TENSORS_IN_A_CALL:
        counts.change(count)
        for grad, own in zip(grads, state, strict=True):
            counts.read(grad)
            if "accumulator" in own:
                counts.read(own["accumulator"])
        shared = jax.ShapeDtypeStruct((xla_shared_words,), jnp.uint32)
        count, first = counts.call("begin_step", attributes, new=[shared])
    new_params: list[Array] = []
    new_state: list[dict[str, Array]] = []
    for begin in range(0, len(grads), TENSORS_IN_A_CALL):
        indices = range(begin, min(begin + TENSORS_IN_A_CALL, len(grads)))
        buffers = _Buffers()
        if len(grads) > TENSORS_IN_A_CALL:
            buffers.read(first)
        else:
            buffers.change(count)
        buffers.read(lr)
        for i in indices:
            if params is None:
                buffers.change(grads[i])
            else:
                buffers.change(params[i])
                buffers.read(grads[i])
            for array in state[i].values():
                buffers.change(array)
        own_undecayed = [i - begin for i in undecayed if i in indices]
        results = iter(
            buffers.call("step", attributes | {"undecayed": np.asarray(own_undecayed, np.int64)})
        )
        if len(grads) <= TENSORS_IN_A_CALL:
            count = next(results)
        for i in indices:
            new_params.append(next(results))
            new_state.append({kind: next(results) for kind in state[i]})
    return new_params, new_state, count
