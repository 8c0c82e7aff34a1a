# SPDX-License-Identifier: MIT
"""The base of optimizers: it owns the state and the order of events, and knows no formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fusedadam._core import AdamOptions, AdamState, public, require_gradients
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
from fusedadam.schedules import either_name, require_not_negative, saved_config
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
from fusedadam.weights import Weights, count_array, moments_of, taken_weights, weights_of

if TYPE_CHECKING:
    import os

    from typing_extensions import Self


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

    _lock: Any
    # Counts, moments and settings of some parameters' own.
    _state: AdamState
    # The hyper-parameters, but for a schedule.
    _options: AdamOptions

    def __init__(self) -> None:
        self._lock = new_lock()
        self._state = AdamState(as_array)

    # ---- what a subclass adds

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Return the configuration as plain Python numbers, for `from_config`."""

    @abstractmethod
    def _step_options(self, *, own_gradients: bool = False) -> AdamOptions:
        """The hyper-parameters of the next step; `own_gradients` need not be zeroed after it."""

    @property
    def current_loss_scale(self) -> float:
        """What the next loss is to be multiplied by; 1.0 without `loss_scale`."""
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
        """Number of steps that were skipped because a gradient was not finite."""
        return self._state.progress.skipped_steps

    @property
    def ema(self) -> list[Array]:
        """The averages of the parameters: the live arrays; empty without `use_ema` or state."""
        return self._state.slots.get("ema", [])

    @property
    def weights(self) -> list[Array]:
        """The state: `[iterations]` and then the moments, kind by kind.

        `iterations` is a read-only 0-d int64 array, the count now; the moments are the live arrays:
        each m, each v and, with `amsgrad`, each vhat. Empty before the state exists.
        """
        return weights_of(self._state)

    @public
    def build(self, params: Iterable[Any]) -> None:
        """Start fresh moments, all zeros, for these parameters; `iterations` counts on.

        Averages start as the parameters, and gradients that were accumulated are forgotten.

        The first step does this by itself. Call it to change the parameters' number, shapes or
        dtypes, or to pay for the memory ahead of the first step.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            numpy.ndarray or torch.Tensor, nested as for `step`; float32 or float64, aligned,
            writeable, of any strides without gaps or overlaps, no two sharing memory.

        Raises
        ------
        TypeError, ValueError
            A parameter that cannot be updated in place, named by its index. The state is unchanged.
        """
        params, structure = leaves_of(params)
        with self._lock, Naming(structure):
            self._state.build(params, self._options)

    def get_weights(self) -> list[Array]:
        """Return copies of `weights`.

        The list is of a type of its own, by which `set_weights` knows it, also after a copy or a
        pickle; in all else it is a list.
        """
        with self._lock:
            return Weights(weight.copy() for weight in self.weights)

    @public
    def set_weights(self, weights: Iterable[Any], layout: str | None = None) -> None:
        """Take over a state, as `get_weights` or a version of Keras returns it.

        What `get_weights` returns is known for what it is. Lists of Keras 1.0.8 to 3, of tf_keras
        and of TensorFlow are told apart by their lengths, shapes, signs and the dtype of the count;
        one that fits several layouts, with other values in each, is refused until `layout` names
        the right one. That can be the case where all parameters have one shape.

        The list must be of an optimizer with the same `amsgrad`. A learning rate in it becomes
        `lr`, unless that is a schedule. Averages in a list of Keras 3 are taken over with
        `use_ema`; a list without leaves the averages alone.

        Parameters
        ----------
        weights : iterable of array_like
            Cast to the dtypes of the moments.
        layout : str, optional
            "fusedadam" or "keras-2": `[iterations, m0, m1, ..., v0, v1, ...]` and with `amsgrad`
            each `vhat`, of this package, TensorFlow 1.4, and Keras 1 and 2; in Keras 2.1.3 to 2.15
            there is an unused array of shape `(1,)` more for each parameter, which is dropped.
            "keras-3": `[iteration, learning_rate, m0, v0, m1, v1, ...]`, then each `vhat`.
            "keras-3-schedule": the same without the rate, of Keras 3 with a schedule, and of
            tf_keras from 2.11 on.

        Raises
        ------
        ValueError
            The number of arrays or a shape does not match, `iterations` is no count, the list is
            ambiguous, or it cannot be of the layout named. Nothing has changed.
        TypeError
            An array is not of real numbers, or is masked. Nothing has changed.
        """
        with self._lock:
            state = self._state
            state.require_not_swapped()
            taken = taken_weights(weights, state.slots if state.is_built else None, layout)
            if taken is None:
                return
            # Converted here, where a warning of an overflow may be an exception. What does not own
            # its memory may be another of these very moments.
            values = [
                (live, new.astype(live.dtype, copy=not new.flags.owndata))
                for live, new in taken.arrays
            ]
            options = self._options
            if taken.learning_rate is not None and not callable(getattr(self, "lr", None)):
                options = require_not_negative(options.changed({"lr": taken.learning_rate}))
            without_interruption(
                partial(state.set_weights, values, taken.iterations),
                *assignments(self, _options=options),
            )

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file: configuration, state, averages, accumulators, counts.

        A crash at any instant leaves the old file or the new one. The parameters are not in it, nor
        is a schedule, which `load` asks for.

        Parameters
        ----------
        path : str or os.PathLike
            The file, in the safetensors format; replaced if it exists.

        Raises
        ------
        ValueError
            The averages are swapped in, or parameters with settings of their own are still to be
            found by a step or by `build`.
        TypeError
            The configuration of a subclass holds more than numbers, strings and None.
        OSError
            The file cannot be written; an old one is as it was.
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
        """Go on where a file of `save` left off.

        `Adam.load(path, params)` makes an optimizer; `adam.load(path, params)` makes `adam` the one
        that was saved, configuration included, and returns it.

        Parameters
        ----------
        path : str or os.PathLike
            The file.
        params : array, or list, tuple, dict or iterable of arrays
            The parameters, nested as for `step`, of the shapes and dtypes that the state was built
            for. Only looked at.
        lr : float or callable, optional
            In place of the one in the file. Needed where that is a schedule, unless `adam` has one:
            a file is never trusted to name code to run.
        learning_rate : float or callable, optional
            Another name of `lr`.

        Returns
        -------
        Optimizer
            The new one, or `adam` itself.

        Raises
        ------
        ValueError
            The file is truncated, is not a checkpoint of this class, is of a future version, or
            does not fit these parameters; or the averages of `adam` are swapped in. Nothing has
            changed.
        TypeError
            A parameter is not an array, or `lr` neither a number nor a callable.
        OSError
            The file cannot be read; FileNotFoundError where there is none.
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
        with into._lock:
            into._state.require_not_swapped()
            attributes = {k: v for k, v in vars(loaded).items() if k != "_lock"}
            without_interruption(*assignments(into, **attributes))
        restored: Self = into
        return restored

    def _saved_config(self) -> dict[str, Any]:
        """The configuration as a checkpoint holds it."""
        return saved_config(self.get_config)

    def __getstate__(self) -> dict[str, Any]:
        return pickled(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpickled(self, state)

    # ---- steps

    @public
    def get_gradients(self, loss: Any, params: Iterable[Any]) -> list[Array]:
        """Return the gradients of a loss with respect to the parameters, as a step uses them.

        They are unscaled (`loss_scale`) and clipped.

        Parameters
        ----------
        loss : callable, torch.Tensor or sequence of arrays
            A function `loss(params)` written with `autograd.numpy` that returns a scalar; a scalar
            tensor whose graph reaches `params`, which are then torch tensors; or the gradients
            themselves, one per parameter, such as those of `jax.grad`. The first two are multiplied
            by `current_loss_scale` here; gradients must be those of `scale_loss(loss)`.
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
            `iterations` (0-d int64), then for each parameter in turn its moments (`vhat` first,
            where there is one) and the parameter, all after the step. The live arrays (or tensors),
            not copies.

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
            m, v, *vhat = moments_of(self._state)
            updates: list[Any] = [count_array(self._state)]
            for group in zip(*vhat, m, v, params, strict=True):
                updates.extend(group)
            return updates

    @public
    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> int:
        """Take one step with these gradients, updating the parameters in place.

        Parameters
        ----------
        grads_and_vars : iterable of (gradient, parameter)
            In the same order at every step. A gradient of None leaves its parameter, its moments and
            their count of steps alone; not all may be None.

        Returns
        -------
        int
            The number of steps taken. A call that only accumulates, or whose step is skipped, takes
            none.

        Raises
        ------
        TypeError, ValueError
            As for `get_gradients` and `build`. Nothing has changed.
        """
        pairs = listed(grads_and_vars, "grads_and_vars")
        with self._lock:
            options = self._step_options()
            # What most steps are: no work in Python for each tensor.
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
            numpy.ndarray or torch.Tensor, nested in lists, tuples and dicts as you like, in the same
            way at every step; a dict in the order of its insertion.
        grads : array, or list, tuple or dict of arrays
            Nested likewise; the keys of a dict may come in another order. A gradient is an array, a
            number or a list of numbers, cast to the parameter's dtype where NumPy's `same_kind`
            allows it. None leaves its parameter, its moments and their count of steps alone; not
            all may be None.

        Returns
        -------
        int
            The number of steps taken. A call that only accumulates, or whose step is skipped, takes
            none.

        Raises
        ------
        TypeError, ValueError
            As for `get_gradients` and `build`, or `params` are nested otherwise than before.
            Nothing has changed.

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
        """Take one step down the gradient of a loss, and return the loss before it.

        Parameters
        ----------
        loss : callable or torch.Tensor
            A function `loss(params)` written with `autograd.numpy` that returns a scalar; or a
            scalar tensor whose graph reaches `params`, which are then torch tensors.
        params : array, or list, tuple or dict of arrays
            The parameters, as for `step`; `loss` gets them nested in the same way.

        Returns
        -------
        float
            The loss of the parameters before the step, not multiplied by `loss_scale`.

        Raises
        ------
        TypeError, ValueError
            As for `step`, and where the loss does not depend on a parameter. Nothing has changed.

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
        """Take one step of a table from the gradients of some of its rows.

        Gradients of the same row are added up first, in the order in which they come.

        Parameters
        ----------
        indices : numpy.ndarray or torch.Tensor
            Row numbers, int32 or int64, of one dimension; in any order, repeated or not.
        grad_rows : numpy.ndarray or torch.Tensor
            A gradient for each, of the shape `indices.shape + param.shape[1:]`.
        param : numpy.ndarray or torch.Tensor
            The table, the only parameter of this optimizer.
        lazy : bool, default True
            Touch only the rows named: parameters, moments and averages of the others stay as they
            are, and the cost grows with the rows named (as LazyAdam of TensorFlow Addons and
            `torch.optim.SparseAdam`). With False, all rows are stepped, those not named with a
            gradient of zero: bit for bit the dense step, at its cost, without a dense gradient in
            memory.

        Returns
        -------
        int
            The number of steps taken.

        Raises
        ------
        TypeError, ValueError
            An index out of range or of another dtype, rows that do not fit, an optimizer of several
            parameters or one that accumulates gradients; and as for `build`. Nothing has changed.
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
        """Leave these parameters out of `weight_decay` and `l2`: biases and scales of norms.

        The arrays are looked for among the parameters of the next step, or of `build`; like the
        moments, the exclusion then belongs to their positions in that list. A later call replaces
        an earlier one; an empty list excludes nothing.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            The very arrays, or views of the same memory, nested as for `step`.

        Raises
        ------
        TypeError
            Something in `params` is not an array. Nothing has changed.
        """
        arrays = list(leaves_of(params)[0])
        with self._lock:
            self._state.exclude(arrays)

    @public
    def override(self, params: Any = None, **settings: Any) -> None:
        """Give these parameters settings of their own, in place of the optimizer's.

        One optimizer, one step and one norm: `adam.override(head, lr=0.01, weight_decay=None)`. Like
        the moments, the settings then belong to the parameters' positions, and are saved with them.
        A later call changes the settings that it names; without any, it takes all of them back, and
        `override()` those of all parameters.

        Parameters
        ----------
        params : array, or list, tuple, dict or iterable of arrays
            The very arrays, or views of the same memory, nested as for `step`; looked for among the
            parameters of the next step, or of `build`. None stands for all parameters, and needs no
            settings.
        **settings
            Any of `lr` (or `learning_rate`, a number), `beta_1`, `beta_2`, `epsilon`, `decay`,
            `bias_corrected_epsilon`, `weight_decay`, `l2`, `clipnorm` (its bound of the one norm of
            all gradients), `clipnorm_per_tensor`, `clipvalue`, `ema_momentum`,
            `ema_overwrite_frequency`, `maximize`, `flush_denormals`.

        Raises
        ------
        TypeError
            A setting is unknown or of another type, or something in `params` is not an array.
            Nothing has changed.
        ValueError
            A setting is out of range, or concerns the step as a whole. Nothing has changed.

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
                    "params must be given with settings of their own; those of all parameters are "
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
        """Exchange the parameters with their averages, in place; a second call exchanges them back.

        For an evaluation with the averages. Until they are swapped back, whatever steps, builds,
        copies or saves is refused.

        Raises
        ------
        ValueError
            There are no averages, or no parameters yet.
        """
        with self._lock:
            self._state.swap_ema()
            mark_as_changed(self._state.params)

    @public
    def scale_loss(self, loss: Any) -> Any:
        """Return the loss multiplied by `current_loss_scale`.

        For those who take gradients themselves and hand them over: they are unscaled in the step. A
        loss handed to `get_updates` or `get_gradients` is scaled there.

        Parameters
        ----------
        loss : float, array, tensor or callable
            A callable gives a callable.
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
