# SPDX-License-Identifier: MIT
"""The base of optimizers: it owns the state and the order of events, and knows no formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fusedadam._core import max_iterations
from fusedadam.arrays import (
    Array,
    are_plain_arrays,
    as_array,
    gradient_arrays,
    is_tensor,
    listed,
    parameter_arrays,
)
from fusedadam.gradients import gradients
from fusedadam.locks import new_lock

if TYPE_CHECKING:
    from typing_extensions import Self


class State(Protocol):
    """What an optimizer keeps for its parameters."""

    @property
    def slots(self) -> list[list[Array]]:
        """Per kind of moment, one array per parameter, in the order of `Optimizer.weights`."""

    def step(
        self, params: Sequence[Array], grads: Sequence[Array], options: Any, step: int
    ) -> None:
        """Step all parameters in place, or raise before the first write."""


class Optimizer(ABC):
    """Base class of optimizers over arrays that are updated in place.

    It owns the number of steps taken and the state of each parameter; a subclass adds its
    hyper-parameters and its formula. The interface is that of `tf.keras.optimizers.Optimizer` in
    TensorFlow 1.4, with `build` and `apply_gradients` of later versions.

    The state belongs to a position in the list of parameters: every later call must bring
    parameters that match in number, shape and dtype those that the state was built for. Two models
    of the same shapes can thus share one optimizer, and its moments.

    An optimizer may be used from several threads: its steps then happen one after the other.
    Different optimizers step at the same time.
    """

    _state: State | None

    def __init__(self) -> None:
        self._lock = new_lock()
        self._state = None
        self._iterations = 0

    # ---- what a subclass adds

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Return the configuration as plain Python numbers, for `from_config`."""

    @abstractmethod
    def _new_state(self, params: Sequence[Array]) -> State:
        """Fresh state for these parameters; raises where one of them cannot be updated in place."""

    @abstractmethod
    def _clip(self, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        """The gradients as a step uses them: checked, and new arrays where they are clipped."""

    @property
    @abstractmethod
    def _settings(self) -> Any:
        """What a step hands to `State.step` as its options."""

    # ---- configuration

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make an optimizer from the result of `get_config`; its state starts empty."""
        return cls(**config)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({settings})"

    # ---- state

    @property
    def iterations(self) -> int:
        """Number of steps taken."""
        return self._iterations

    @property
    def weights(self) -> list[Array]:
        """The state: `[iterations]` and then the moments, kind by kind.

        `iterations` is a read-only 0-d int64 array, the count now; the moments are the live arrays.
        Empty before the state exists.
        """
        if self._state is None:
            return []
        return [self._iterations_array(), *self._moments(self._state)]

    def build(self, params: Iterable[Any]) -> None:
        """Start fresh moments, all zeros, for these parameters; `iterations` counts on.

        The first step does this by itself. Call it to change the parameters' number, shapes or
        dtypes, or to pay for the memory ahead of the first step.

        Parameters
        ----------
        params : iterable of numpy.ndarray or torch.Tensor
            float32 or float64; C-contiguous, aligned, writeable, no two sharing memory.

        Raises
        ------
        TypeError, ValueError
            A parameter that cannot be updated in place, named by its index. The state is unchanged.
        """
        state = self._new_state(parameter_arrays(listed(params, "params")))
        with self._lock:
            self._state = state

    def get_weights(self) -> list[Array]:
        """Return copies of `weights`."""
        with self._lock:
            return [weight.copy() for weight in self.weights]

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Take over a state, as `get_weights` returns it.

        The list of Keras 2.1.3 to 2.15, with one unused array of shape `(1,)` more for each
        parameter, is taken too.

        Parameters
        ----------
        weights : iterable of array_like
            `[iterations]` and then the moments; cast to the dtypes of the moments.

        Raises
        ------
        ValueError
            The number of arrays or a shape does not match, or `iterations` is no count. Nothing has
            changed.
        TypeError
            An array is not of real numbers. Nothing has changed.
        """
        with self._lock:
            current = self.weights
            given = [_real_array(w, i) for i, w in enumerate(listed(weights, "weights"))]
            given = self._without_placeholders(given)
            if len(given) != len(current):
                hint = "" if current else "; build(params) creates them"
                raise ValueError(
                    f"Length of the specified weight list ({len(given)}) does not match "
                    f"the number of weights of the optimizer ({len(current)}){hint}"
                )
            for weight, new in zip(current, given, strict=True):
                if weight.shape != new.shape:
                    raise ValueError(
                        f"Optimizer weight shape {weight.shape} not compatible with "
                        f"provided weight shape {new.shape}"
                    )
            if not current:
                return
            iterations = _step_count(given[0])
            # What does not own its memory may be another of these very moments.
            values = [new if new.flags.owndata else new.copy() for new in given[1:]]
            for weight, new in zip(current[1:], values, strict=True):
                weight[...] = new
            self._iterations = iterations

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = self.__dict__.copy()
            del state["_lock"]
            state["_state"] = None if self._state is None else self._state.slots
            # Copies, also where the caller copies shallowly: two optimizers never share moments.
            if state["_state"] is not None:
                state["_state"] = [[array.copy() for array in slot] for slot in state["_state"]]
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        slots = state.pop("_state")
        self.__dict__.update(state)
        self._lock = new_lock()
        self._state = None
        if slots is not None:
            self._state = self._new_state(slots[0])
            for arrays, saved in zip(self._state.slots, slots, strict=True):
                for array, value in zip(arrays, saved, strict=True):
                    array[...] = value

    # ---- steps

    def get_gradients(self, loss: Any, params: Iterable[Any]) -> list[Array]:
        """Return the gradients of a loss with respect to the parameters, clipped as in a step.

        Parameters
        ----------
        loss : callable, torch.Tensor or sequence of arrays
            A function `loss(params)` written with `autograd.numpy` that returns a scalar; a scalar
            tensor whose graph reaches `params`, which are then torch tensors; or the gradients
            themselves, one per parameter, such as those of `jax.grad`.
        params : iterable of numpy.ndarray or torch.Tensor
            The parameters.

        Returns
        -------
        list of numpy.ndarray
            One per parameter, of its shape and dtype. New arrays where they are clipped; the
            gradients given are never changed.

        Raises
        ------
        TypeError
            `loss` is none of the three, or a gradient has another dtype than its parameter.
        ValueError
            A gradient is None, or has another shape than its parameter.
        """
        params = listed(params, "params")
        return self._clip(parameter_arrays(params), gradient_arrays(gradients(loss, params)))

    def get_updates(self, loss: Any, params: Iterable[Any]) -> list[Any]:
        """Take one step: compute the gradients and update the parameters in place.

        Parameters
        ----------
        loss, params
            As for `get_gradients`.

        Returns
        -------
        list
            `iterations` (0-d int64), then for each parameter in turn its moments and the parameter,
            all after the step. The live arrays (or tensors), not copies.

        Raises
        ------
        TypeError, ValueError
            As for `get_gradients` and `build`. Nothing has changed.
        """
        params = listed(params, "params")
        grads = gradients(loss, params)
        with self._lock:
            self._step(params, grads)
            assert self._state is not None
            updates: list[Any] = [self._iterations_array()]
            for group in zip(*self._state.slots, params, strict=True):
                updates.extend(group)
            return updates

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> int:
        """Take one step with these gradients, updating the parameters in place.

        Parameters
        ----------
        grads_and_vars : iterable of (gradient, parameter)
            In the same order at every step.

        Returns
        -------
        int
            The number of steps taken.

        Raises
        ------
        TypeError, ValueError
            As for `get_gradients` and `build`. Nothing has changed.
        """
        grads, params = _unzipped(listed(grads_and_vars, "grads_and_vars"))
        with self._lock:
            self._step(params, grads)
            return self._iterations

    def _step(self, params: Sequence[Any], grads: Sequence[Any]) -> None:
        grads = gradient_arrays(grads)
        if are_plain_arrays(params):
            self._step_arrays(params, grads)
            return
        arrays = parameter_arrays(params)
        constraints = _constraints(params)
        self._step_arrays(arrays, grads)
        _mark_as_changed(params)
        for i, constraint in constraints:
            value = as_array(constraint(params[i]), f"params[{i}].constraint(...)")
            if value.shape != arrays[i].shape:
                raise ValueError(
                    f"params[{i}].constraint must return an array of the parameter's shape, "
                    f"{arrays[i].shape}; the step has been taken. Received: shape={value.shape}"
                )
            arrays[i][...] = value

    def _step_arrays(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        state = self._state if self._state is not None else self._new_state(params)
        state.step(params, grads, self._settings, self._iterations + 1)
        self._state = state
        self._iterations += 1

    def _iterations_array(self) -> Array:
        array = np.array(self._iterations, dtype=np.int64)
        array.flags.writeable = False
        return array

    @staticmethod
    def _moments(state: State) -> list[Array]:
        return [array for slot in state.slots for array in slot]

    def _without_placeholders(self, weights: list[Array]) -> list[Array]:
        """The weights without what Keras 2.1.3 to 2.15 wrote in place of an unused `vhat`."""
        if self._state is None:
            return weights
        count = len(self._state.slots[0])
        expected = 1 + len(self._moments(self._state))
        placeholders = weights[expected:]
        if len(placeholders) == count and all(w.shape == (1,) for w in placeholders):
            return weights[:expected]
        return weights


def _unzipped(pairs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
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


def _constraints(params: Sequence[Any]) -> list[tuple[int, Any]]:
    constraints = []
    for i, param in enumerate(params):
        constraint = getattr(param, "constraint", None)
        if constraint is None:
            continue
        if not callable(constraint):
            raise TypeError(
                f"params[{i}].constraint must be callable. Received: {type(constraint).__name__}"
            )
        constraints.append((i, constraint))
    return constraints


def _mark_as_changed(params: Sequence[Any]) -> None:
    """Tell torch of the writes, so that a graph that still needs the old values refuses to run."""
    tensors = [p for p in params if is_tensor(p)]
    if tensors:
        import torch

        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def _real_array(weight: Any, index: int) -> Array:
    array = as_array(weight, f"weights[{index}]")
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"weights[{index}] must be an array of real numbers. Received: dtype={array.dtype}"
        )
    return array


def _step_count(array: Array) -> int:
    value = array.item()
    if not 0 <= value <= max_iterations or value != int(value):
        raise ValueError(
            f"weights[0] must be a count of steps, an integer from 0 to 2**53. Received: {value!r}"
        )
    return int(value)
