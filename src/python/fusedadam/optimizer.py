# SPDX-License-Identifier: MIT
"""The base class of optimizers: state and interface, but no formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fusedadam._core import (
    AdamOptions,
    AdamState,
    public,
    require_gradients,
)
from fusedadam.arrays import (
    Array,
    are_plain_arrays,
    as_array,
    gradient_arrays,
    index_array,
    is_tensor,
    listed,
    mark_as_changed,
    parameter_arrays,
)
from fusedadam.constraints import constrain, constraints_of
from fusedadam.gradients import (
    are_given,
    clipped,
    gradients,
    scaled,
    unzipped,
    value_and_gradients,
)
from fusedadam.locks import new_lock
from fusedadam.methods import class_or_instance_method
from fusedadam.own_settings import checked_override
from fusedadam.schedules import either_name, require_not_negative
from fusedadam.signals import assignments, without_interruption
from fusedadam.snapshots import pickled, unpickled
from fusedadam.structures import (
    Naming,
    Structure,
    flatten,
    flatten_like,
    leaves_of,
    require_same,
)
from fusedadam.weights import (
    copied_weights,
    count_array,
    joined,
    moments_of,
    split_values,
    taken_weights,
    weights_of,
    with_low_bits,
)

if TYPE_CHECKING:
    import os

    from typing_extensions import Self


class Optimizer(ABC):
    """Base class of optimizers that update arrays in place.

    It owns the number of steps taken and the state of each parameter; a subclass adds its
    hyper-parameters and its formula. The interface is that of `tf.keras.optimizers.Optimizer` in
    TensorFlow 1.4, with `build` and `apply_gradients` of later versions.

    The state is kept by position in the list of parameters. The parameters of every later call must
    match those that the state was built for in number, shape and dtype. Two models of the same
    shapes can therefore share one optimizer and its moments.

    An optimizer is thread-safe: steps from several threads are serialized. Different optimizers
    step concurrently.
    """

    _lock: Any
    _state: AdamState  # counts, moments, and settings of single parameters
    _options: AdamOptions  # the hyper-parameters without a schedule

    def __init__(self) -> None:
        self._lock = new_lock()
        self._state = AdamState(as_array)

    # ---- subclasses

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Return the configuration as plain Python values, for `from_config`."""

    @abstractmethod
    def _step_options(self, *, own_gradients: bool = False) -> AdamOptions:
        """Return the options of the next step; `own_gradients` need not be zeroed after it."""

    @property
    def current_loss_scale(self) -> float:
        """Factor by which to multiply the next loss; 1.0 without `loss_scale`."""
        return self._state.progress.current_loss_scale(self._options)

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
        return self._state.iterations

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because a gradient was not finite."""
        return self._state.progress.skipped_steps

    @property
    def ema(self) -> list[Array]:
        """Moving averages of the parameters (live arrays); empty without `use_ema` or state."""
        return self._state.slots.get("ema", [])

    @property
    def weights(self) -> list[Array]:
        """The state: `iterations`, then each m, each v and, with `amsgrad`, each vhat.

        `iterations` is the current count as a read-only 0-d int64 array; the moments are the live
        arrays, as they are stored: with `moments="packed"`, one array of words in place of m and v.
        Empty before the state exists.
        """
        return weights_of(self._state)

    @public
    def build(self, params: Iterable[Any]) -> None:
        """Reset the moments to zero for these parameters; `iterations` is kept.

        Moving averages start at the parameters, and accumulated gradients are discarded.

        The first step builds the state if needed. Call `build` to change the number, shapes or
        dtypes of the parameters, or to allocate the memory before the first step.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            numpy.ndarray or torch.Tensor, nested as for `step`; float32, float64, float16 or
            bfloat16, aligned, writeable, with any strides that leave no gaps or overlaps, no two
            sharing memory.

        Raises
        ------
        TypeError, ValueError
            A parameter cannot be updated in place. The state is unchanged.
        """
        params, structure = leaves_of(params)
        with self._lock, Naming(structure):
            self._state.build(params, self._options)

    def get_weights(self) -> list[Array]:
        """Return copies of `weights`, with each m and v in float32 if they are stored in 16 bits.

        The result is a subclass of list, by which `set_weights` recognizes its layout, also after a
        copy or a pickle.
        """
        with self._lock:
            return copied_weights(self._state)

    @public
    def set_weights(self, weights: Iterable[Any], layout: str | None = None) -> None:
        """Set the state from a list of `get_weights` or of a version of Keras.

        Lists of `get_weights` are recognized by their type. Those of Keras 1.0.8 to 3, tf_keras and
        TensorFlow are told apart by their lengths, shapes, signs and the dtype of the count. A list
        that fits several layouts with different values is refused unless `layout` is given; this
        can happen if all parameters have the same shape.

        The list must be of an optimizer with the same `amsgrad`. A learning rate in it becomes
        `lr`, unless that is a schedule. Moving averages in a list of Keras 3 are used with
        `use_ema`; a list without any leaves the averages unchanged.

        Parameters
        ----------
        weights : iterable of array_like
            Cast to the dtypes of the moments.
        layout : str, optional
            "fusedadam" or "keras-2": `[iterations, m0, m1, ..., v0, v1, ...]`, then each `vhat`
            with `amsgrad`; of this package, TensorFlow 1.4, and Keras 1 and 2. The unused arrays of
            shape `(1,)` that Keras 2.1.3 to 2.15 appends are dropped.
            "keras-3": `[iteration, learning_rate, m0, v0, m1, v1, ...]`, then each `vhat`.
            "keras-3-schedule": the same without the learning rate; of Keras 3 with a schedule, and
            of tf_keras from 2.11 on.

        Raises
        ------
        ValueError
            The number of arrays or a shape does not match, `iterations` is not a valid count, or
            the list is ambiguous or contradicts `layout`. Nothing has changed.
        TypeError
            An array is not of real numbers, or is masked. Nothing has changed.
        """
        with self._lock:
            state = self._state
            state.require_not_swapped()
            taken = taken_weights(weights, state.slots if state.is_built else None, layout)
            if taken is None:
                return
            options = self._options
            if taken.learning_rate is not None and not callable(getattr(self, "lr", None)):
                options = require_not_negative(options.changed({"lr": taken.learning_rate}))
            without_interruption(
                partial(state.set_weights, taken.arrays, taken.iterations),
                *assignments(self, _options=options),
            )

    @public
    def master_weights(self, params: Iterable[Any]) -> list[Array]:
        """Return the parameters in float32 with their low bits: what the steps compute with.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            The parameters, nested as for `step`, of at most 32 bits.

        Returns
        -------
        list of numpy.ndarray
            A float32 copy of each. Without low bits, the parameter's own value.

        Raises
        ------
        ValueError
            The averages are swapped in, or the parameters do not match the low bits.
        TypeError
            A parameter has another dtype.
        """
        leaves, structure = leaves_of(params)
        with self._lock, Naming(structure):
            return [joined(p, low) for p, low in with_low_bits(self._state, leaves)]

    @public
    def set_master_weights(self, params: Iterable[Any], values: Iterable[Any]) -> None:
        """Set parameters and their low bits to float32 values, rounded to nearest.

        Use it after `build(params)` to start a bfloat16 model with the low bits of a float32 model.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            The parameters, as for `master_weights`. Updated in place.
        values : iterable of array_like
            The values, cast to float32; one for each parameter, of its shape.

        Raises
        ------
        TypeError, ValueError
            As for `master_weights`, or a shape does not match. Nothing has changed.
        """
        leaves, structure = leaves_of(params)
        with self._lock, Naming(structure):
            pairs = with_low_bits(self._state, leaves)
            without_interruption(*split_values(pairs, listed(values, "values")))
            mark_as_changed(leaves)

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration and the whole state to one file, atomically.

        The state includes moments, moving averages, accumulated gradients and counts. Parameters
        and schedules are not saved. A crash leaves either the old file or the new one.

        Parameters
        ----------
        path : str or os.PathLike
            The file, in the safetensors format; replaced if it exists.

        Raises
        ------
        ValueError
            The averages are swapped in, or neither a step nor `build` has followed
            `exclude_from_weight_decay` or `override`.
        TypeError
            The configuration of a subclass contains anything other than numbers, strings and None.
        OSError
            The file cannot be written; an existing one is unchanged.
        """
        from fusedadam import checkpoint

        checkpoint.save(self, path)

    @class_or_instance_method
    @public
    def load(
        cls,
        path: str | os.PathLike[str],
        params: Iterable[Any],
        *,
        lr: Any = None,
        learning_rate: Any = None,
    ) -> Self:
        """Restore an optimizer from a file of `save`.

        `Adam.load(path, params)` makes a new optimizer. `adam.load(path, params)` replaces the
        configuration and state of `adam`, and returns it.

        Parameters
        ----------
        path : str or os.PathLike
            The file.
        params : array, or list, tuple, dict or iterable of arrays
            The parameters, nested as for `step`, of the shapes and dtypes that the state was built
            for. They are not modified.
        lr : float or callable, optional
            Replaces the saved one. Required if that is a schedule, unless `adam` has one: code
            named by a file is never imported.
        learning_rate : float or callable, optional
            Another name of `lr`.

        Returns
        -------
        Optimizer
            The new one, or `adam` itself.

        Raises
        ------
        ValueError
            The file is damaged, is not a checkpoint of this class, has a later format version, or
            does not fit these parameters; or the averages of `adam` are swapped in. Nothing has
            changed.
        TypeError
            A parameter is not an array, or `lr` is neither a number nor a callable.
        OSError
            The file cannot be read; FileNotFoundError if it does not exist.
        """
        from fusedadam import checkpoint

        lr = either_name(lr, learning_rate, absent=None)
        into: Any = cls
        leaves, structure = leaves_of(params)
        with Naming(structure):
            if isinstance(into, type):
                new: Self = checkpoint.load(into, path, leaves, lr=lr)
                return new
            own_lr = getattr(into, "learning_rate", None)
            schedule = own_lr if callable(own_lr) else None
            loaded = checkpoint.load(type(into), path, leaves, lr=lr, schedule=schedule)
        attributes = {k: v for k, v in vars(loaded).items() if k != "_lock"}
        with into._lock:
            into._state.require_not_swapped()
            without_interruption(*assignments(into, **attributes))
        restored: Self = into
        return restored

    def __getstate__(self) -> dict[str, Any]:
        return pickled(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpickled(self, state)

    # ---- steps

    @public
    def get_gradients(self, loss: Any, params: Iterable[Any]) -> list[Array]:
        """Return the gradients of a loss with respect to the parameters, unscaled and clipped.

        Parameters
        ----------
        loss : callable, torch.Tensor or sequence of arrays
            A function `loss(params)` written with `autograd.numpy` that returns a scalar; a scalar
            tensor computed from `params`, which are then torch tensors; or the gradients
            themselves, one per parameter, such as those of `jax.grad`. The method multiplies the
            first two by `current_loss_scale`; gradients must be those of `scale_loss(loss)`.
        params : iterable of numpy.ndarray or torch.Tensor
            The parameters.

        Returns
        -------
        list of numpy.ndarray
            One per parameter, of its shape and dtype; float32 for 16-bit parameters. Clipped
            gradients are new arrays; the gradients passed in are never modified.

        Raises
        ------
        TypeError
            `loss` is none of the three, or the dtype of a gradient does not match its parameter.
        ValueError
            A gradient is None, or its shape does not match its parameter.
        """
        params = listed(params, "params")
        grads = self._gradients(loss, params)
        require_gradients(grads)
        state = self._state
        own = state.find_own(params) if state.pending[1] else state.own
        return clipped(
            parameter_arrays(params),
            gradient_arrays(grads),
            self._options,
            state.progress,
            overrides=own[1],
        )

    @public
    def get_updates(self, loss: Any, params: Iterable[Any]) -> list[Any]:
        """Take one step: compute the gradients and update the parameters in place.

        Parameters
        ----------
        loss, params
            As for `get_gradients`.

        Returns
        -------
        list
            `iterations` (0-d int64), then for each parameter its moments (with `amsgrad`, `vhat`
            first) and the parameter itself, all after the step. Live arrays or tensors, not copies.

        Raises
        ------
        TypeError, ValueError
            As for `get_gradients` and `build`. Nothing has changed.
        """
        params = listed(params, "params")
        grads = self._gradients(loss, params)
        require_gradients(grads)
        with self._lock:
            self._step(params, grads, self._step_options(own_gradients=not are_given(loss)))
            *moments, last = moments_of(self._state)
            if self._options.amsgrad:
                moments, last = [last, *moments[:-1]], moments[-1]
            groups = zip(*moments, last, params, strict=True)
            return [count_array(self._state), *(array for group in groups for array in group)]

    @public
    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> int:
        """Take one step with these gradients, updating the parameters in place.

        Parameters
        ----------
        grads_and_vars : iterable of (gradient, parameter)
            In the same order at every step. If a gradient is None, its parameter, the moments and
            their step count are unchanged; not all gradients may be None.

        Returns
        -------
        int
            `iterations`, which does not change if the call only accumulates gradients or skips the
            step.

        Raises
        ------
        TypeError, ValueError
            As for `get_gradients` and `build`. Nothing has changed.
        """
        pairs = listed(grads_and_vars, "grads_and_vars")
        with self._lock:
            options = self._step_options()
            # The fast path, without per-tensor work in Python; None if it does not apply.
            taken = self._state.step_pairs(pairs, options)
            if taken is None:
                grads, params = unzipped(pairs)
                taken = self._step(params, grads, options)
            return taken

    @public
    def step(self, params: Any, grads: Any) -> int:
        """Take one step with these gradients, updating the parameters in place.

        Parameters
        ----------
        params : array, or list, tuple or dict of arrays
            numpy.ndarray or torch.Tensor, nested in lists, tuples and dicts in any way, but in the
            same way and with dicts in the same order at every step.
        grads : array, or list, tuple or dict of arrays
            Nested like `params`; the order of dicts does not matter. A gradient is an array, a
            number or a list of numbers, cast to the parameter's dtype by NumPy's `same_kind` rule.
            If it is None, its parameter, the moments and their step count are unchanged; not all
            gradients may be None.

        Returns
        -------
        int
            `iterations`, which does not change if the call only accumulates gradients or skips the
            step.

        Raises
        ------
        TypeError, ValueError
            As for `get_gradients` and `build`, or `params` are nested differently than at the first
            step. Nothing has changed.

        Examples
        --------
        >>> import numpy as np
        >>> from fusedadam import Adam
        >>> adam = Adam(lr=0.1)
        >>> params = {"w": np.ones((2, 2)), "b": np.zeros(2)}
        >>> adam.step(params, {"w": np.ones((2, 2)), "b": [0.5, -0.5]})
        1
        >>> params["b"].round(3)
        array([-0.1,  0.1])
        """
        leaves, structure = flatten(params, "params")
        items = flatten_like(grads, structure, "grads")
        with self._lock, Naming(structure):
            return self._step(leaves, items, self._step_options(), (structure,))

    @public
    def minimize(self, loss: Any, params: Any) -> float:
        """Compute the gradients of a loss, take one step, and return the loss before it.

        Parameters
        ----------
        loss : callable or torch.Tensor
            A function `loss(params)` written with `autograd.numpy` that returns a scalar; or a
            scalar tensor computed from `params`, which are then torch tensors.
        params : array, or list, tuple or dict of arrays
            The parameters, as for `step`; passed to `loss` with the same nesting.

        Returns
        -------
        float
            The loss before the step, not multiplied by `loss_scale`.

        Raises
        ------
        TypeError, ValueError
            As for `step`, or the loss does not depend on a parameter. Nothing has changed.

        Examples
        --------
        >>> import autograd.numpy as anp
        >>> import numpy as np
        >>> from fusedadam import Adam
        >>> adam, params = Adam(lr=0.1), {"x": np.array([3.0])}
        >>> for _ in range(3):
        ...     print(round(adam.minimize(lambda p: anp.sum(p["x"] ** 2), params), 2))
        9.0
        8.41
        7.84
        """
        leaves, structure = flatten(params, "params")
        with Naming(structure):
            value, grads = value_and_gradients(loss, params, leaves, self.current_loss_scale)
            require_gradients(grads)
            with self._lock:
                self._step(leaves, grads, self._step_options(own_gradients=True), (structure,))
        return value

    @public
    def apply_sparse(self, indices: Any, grad_rows: Any, param: Any, *, lazy: bool = True) -> int:
        """Take one step of a table, given the gradients of some of its rows.

        Gradients of a repeated row are summed, in the order given.

        Parameters
        ----------
        indices : numpy.ndarray or torch.Tensor
            Row numbers, 1-d, int32 or int64; in any order, with or without repetitions.
        grad_rows : numpy.ndarray or torch.Tensor
            Their gradients, of shape `indices.shape + param.shape[1:]`.
        param : numpy.ndarray or torch.Tensor
            The table, the only parameter of this optimizer.
        lazy : bool, default True
            Update only the rows in `indices`, with their moments and averages, at a cost
            proportional to their number (as LazyAdam of TensorFlow Addons and
            `torch.optim.SparseAdam`). With False, update all rows, the others with a gradient of
            zero: the same bits and time as a dense step, but without a dense gradient in memory.

        Returns
        -------
        int
            `iterations`, the total number of steps taken.

        Raises
        ------
        TypeError, ValueError
            An index is out of range or of another dtype, a shape does not match, or the optimizer
            has several parameters or accumulates gradients; and as for `build`. Nothing has
            changed.
        """
        with self._lock:
            constraints = constraints_of([param], [grad_rows])
            options = self._step_options()
            taken = self._state.step_rows(
                index_array(indices), grad_rows, param, options, bool(lazy)
            )
            mark_as_changed([param, grad_rows] if options.zero_grad else [param])
            constrain([param], constraints)
            return taken

    @public
    def exclude_from_weight_decay(self, params: Iterable[Any]) -> None:
        """Exclude parameters, such as biases and norm scales, from `weight_decay` and `l2`.

        The next step or `build` looks these arrays up among its parameters; like the moments, the
        exclusion is then kept by position. A later call replaces an earlier one; an empty list
        excludes nothing.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            The same arrays, or views of the same memory, nested as for `step`.

        Raises
        ------
        TypeError
            An item of `params` is not an array. Nothing has changed.
        """
        arrays = list(leaves_of(params)[0])
        with self._lock:
            self._state.exclude(arrays)

    @public
    def override(self, params: Any = None, **settings: Any) -> None:
        """Override settings of the optimizer for these parameters.

        All parameters still share one step and one gradient norm. Like the moments, the settings
        are kept by position, and are saved. A later call changes only the settings that it names;
        without settings, it removes all of those of `params`, and `override()` those of all
        parameters.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            The same arrays, or views of the same memory, nested as for `step`; the next step or
            `build` looks them up among its parameters. None means all parameters, and allows no
            settings.
        **settings
            Any of `lr` (or `learning_rate`, a number), `beta_1`, `beta_2`, `epsilon`, `decay`,
            `bias_corrected_epsilon`, `weight_decay`, `l2`, `clipnorm` (a bound on the norm of all
            gradients), `clipnorm_per_tensor`, `clipvalue`, `ema_momentum`,
            `ema_overwrite_frequency`, `maximize`, `flush_denormals`, `rounding`, `seed`.

        Raises
        ------
        TypeError
            A setting is unknown or has another type, or an item of `params` is not an array.
            Nothing has changed.
        ValueError
            A setting is out of range or concerns the whole step. Nothing has changed.

        Examples
        --------
        >>> import numpy as np
        >>> from fusedadam import Adam
        >>> adam, body, head = Adam(lr=0.001), np.ones(2), np.ones(2)
        >>> adam.override([head], lr=0.1)
        >>> adam.apply_gradients([(np.ones(2), body), (np.ones(2), head)])
        1
        >>> body.round(3), head.round(3)
        (array([0.999, 0.999]), array([0.9, 0.9]))
        """
        if params is None:
            if settings:
                raise TypeError(
                    "params must be given if there are settings; for all parameters, set "
                    f"attributes of the optimizer. Received: {', '.join(settings)}"
                )
            with self._lock:
                self._state.override(None, {})
            return
        arrays = list(leaves_of(params)[0])
        with self._lock:
            self._state.override(arrays, checked_override(self._options, settings))

    @public
    def swap_ema(self) -> None:
        """Swap the parameters with their moving averages in place; a second call swaps them back.

        Use it to evaluate a model with the averages. Until they are swapped back, methods that
        step, build, copy or save raise an error.

        Raises
        ------
        ValueError
            There are no averages or no parameters yet.
        """
        with self._lock:
            self._state.swap_ema()
            mark_as_changed(self._state.params)

    @public
    def scale_loss(self, loss: Any) -> Any:
        """Return the loss multiplied by `current_loss_scale`.

        Use it if you compute the gradients yourself; the step unscales them. `get_updates`,
        `get_gradients` and `minimize` scale the loss themselves.

        Parameters
        ----------
        loss : float, array, tensor or callable
            For a callable, the result is a callable.
        """
        return scaled(loss, self.current_loss_scale)

    def _gradients(self, loss: Any, params: Sequence[Any]) -> Sequence[Any]:
        scale = self.current_loss_scale
        if scale != 1 and (callable(loss) or is_tensor(loss)):
            loss = scaled(loss, scale)
        return gradients(loss, params)

    def _step(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        options: AdamOptions,
        structure: tuple[()] | tuple[Structure] = (),
    ) -> int:
        if structure and self._state.structure:
            require_same(structure[0], self._state.structure[0], "params")
        constraints = constraints_of(params, grads)
        taken = self._state.step(params, grads, options, structure)
        if not are_plain_arrays(params):
            mark_as_changed(p for p, grad in zip(params, grads, strict=True) if grad is not None)
        if options.zero_grad:
            mark_as_changed(grads)
        constrain(params, constraints)
        return taken
