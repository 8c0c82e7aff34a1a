# SPDX-License-Identifier: MIT
"""The base of optimizers: it owns the state and the order of events, and knows no formula."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fusedadam._core import AdamProgress, public, require_gradients, require_table
from fusedadam.arrays import (
    Array,
    are_plain_arrays,
    as_array,
    gradient_array,
    gradient_arrays,
    index_array,
    is_tensor,
    listed,
    parameter_arrays,
    tensor_view,
)
from fusedadam.gradients import are_given, gradients, scaled, value_and_gradients
from fusedadam.locks import new_lock
from fusedadam.methods import class_or_instance_method
from fusedadam.own_settings import Finder, OwnSettings
from fusedadam.schedules import either_name
from fusedadam.signals import assignments, without_interruption
from fusedadam.structures import Naming, Structure, flatten, flatten_like, require_same
from fusedadam.weights import Weights, taken_weights

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

# Kinds of arrays that a list of weights holds, in its order. Averages and accumulators are no part
# of it, as in Keras up to 2.10.
_WEIGHT_KINDS = ("m", "v", "vhat")


class State(Protocol):
    """What an optimizer keeps for its parameters."""

    @property
    def slots(self) -> dict[str, list[Array]]:
        """Per kind of array, one per parameter: "m", "v", ..."""

    @property
    def steps(self) -> list[int]:
        """The number of steps that the moments of each parameter have taken."""

    @property
    def waiting(self) -> list[int]:
        """Positions whose accumulators hold gradients of a mean that is not complete."""

    def set_steps(self, steps: Sequence[int]) -> None:
        """Take over `steps`."""

    def set_waiting(self, positions: Sequence[int]) -> None:
        """Take over `waiting`."""

    def step(
        self,
        params: Sequence[Array],
        grads: Sequence[Array | None],
        options: Any,
        progress: AdamProgress,
    ) -> None:
        """Step all parameters with a gradient in place and count it, or raise before a write."""

    def step_pairs(self, pairs: Sequence[Any], options: Any, progress: AdamProgress) -> int | None:
        """Step pairs (gradient, parameter) and return the number of steps taken.

        None, and nothing is done, where there is anything but tuples of two plain arrays, or of
        None and one.
        """

    def step_rows(
        self,
        indices: Array,
        grad_rows: Array,
        param: Array,
        options: Any,
        progress: AdamProgress,
        lazy: bool,
    ) -> None:
        """Step the only parameter from gradients of rows."""

    def override(self, overrides: list[tuple[list[int], dict[str, Any]]]) -> None:
        """Use settings of their own for the parameters at some positions from now on."""

    def swap_ema(self, views: dict[int, Array]) -> None:
        """Exchange the parameters with their averages.

        `views` has, by position, fresh views of parameters whose memory may have moved.
        """

    def unbind(self) -> None:
        """Forget the parameters, not what is kept for them."""


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
    # What a subclass hands to its state, but for a schedule.
    _options: Any

    def __init__(self) -> None:
        self._lock = new_lock()
        self._state = None
        self._progress = AdamProgress()
        # Arrays given to exclude_from_weight_decay and override until a step finds them among its
        # parameters; then what these have by position.
        self._to_exclude: list[Any] | None = None
        self._to_override: list[tuple[list[Any] | None, dict[str, Any]]] = []
        self._own = OwnSettings()
        # How the parameters of `step` and `minimize` are nested; empty before the first.
        self._structure: tuple[()] | tuple[Structure] = ()
        self._swapped = False
        # Parameters last seen that are torch tensors, with their positions: torch is told when they
        # change, and their memory may move.
        self._tensors: tuple[tuple[int, Any], ...] = ()

    # ---- what a subclass adds

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Return the configuration as plain Python numbers, for `from_config`."""

    @abstractmethod
    def _new_state(self, params: Sequence[Array], *, only_like: bool = False) -> State:
        """Fresh state for these parameters; raises where one of them cannot be updated in place.

        With `only_like` they are only looked at: for their shapes, dtypes and layouts.
        """

    @abstractmethod
    def _clip(
        self, params: Sequence[Array], grads: Sequence[Array], own: OwnSettings
    ) -> list[Array]:
        """The gradients as a step uses them: checked, and new arrays where they are clipped."""

    @abstractmethod
    def _step_options(self, *, own_gradients: bool = False) -> Any:
        """What a step hands to `State.step`; `own_gradients` are of no use to anyone afterwards."""

    @abstractmethod
    def _set_learning_rate(self, lr: float) -> None:
        """Take over the learning rate of a list of weights that holds one."""

    @abstractmethod
    def _checked_override(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings that some parameters may have of their own, as plain numbers, or raise."""

    @abstractmethod
    def _saved_config(self) -> dict[str, Any]:
        """The configuration as a checkpoint holds it."""

    @property
    @abstractmethod
    def current_loss_scale(self) -> float:
        """What the next loss is to be multiplied by; 1.0 without a loss scale."""

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
        return self._progress.iterations

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped because a gradient was not finite."""
        return self._progress.skipped_steps

    @property
    def ema(self) -> list[Array]:
        """The averages of the parameters: the live arrays; empty without `use_ema` or state."""
        return [] if self._state is None else self._state.slots.get("ema", [])

    @property
    def weights(self) -> list[Array]:
        """The state: `[iterations]` and then the moments, kind by kind.

        `iterations` is a read-only 0-d int64 array, the count now; the moments are the live arrays:
        each m, each v and, with `amsgrad`, each vhat. Empty before the state exists.
        """
        if self._state is None:
            return []
        moments = self._moments(self._state)
        return Weights([self._iterations_array(), *(array for kind in moments for array in kind)])

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
        params, structure = _leaves(params)
        with self._lock, Naming(structure):
            self._require_not_swapped()
            state = self._new_state(parameter_arrays(params))
            own = self._found(params)
            state.override(own.groups())
            tensors = _tensors_among(params)
            progress = AdamProgress(self._progress.as_dict() | {"accumulated": 0})
            without_interruption(
                *assignments(
                    self,
                    _state=state,
                    _own=own,
                    _to_exclude=None,
                    _to_override=[],
                    _structure=(),
                    _tensors=tensors,
                    _progress=progress,
                )
            )

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
            self._require_not_swapped()
            state = self._state
            taken = taken_weights(weights, None if state is None else state.slots, layout)
            if taken is None or state is None:
                return
            # Converted here, where a warning of an overflow may be an exception. What does not own
            # its memory may be another of these very moments.
            values = [
                (live, new.astype(live.dtype, copy=not new.flags.owndata))
                for live, new in taken.arrays
            ]
            progress = AdamProgress(self._progress.as_dict() | {"iterations": taken.iterations})
            if taken.learning_rate is not None:
                self._set_learning_rate(taken.learning_rate)
            without_interruption(
                *(partial(operator.setitem, live, ..., new) for live, new in values),
                partial(state.set_steps, [taken.iterations] * len(state.steps)),
                *assignments(self, _progress=progress),
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
        leaves, structure = _leaves(params)
        with Naming(structure):
            if isinstance(into, type):
                new: Self = checkpoint.load(into, path, leaves, lr=lr)
                return new
            own_lr = getattr(into, "learning_rate", None)
            schedule = own_lr if callable(own_lr) else None
            loaded = checkpoint.load(type(into), path, leaves, lr=lr, schedule=schedule)
        with into._lock:
            into._require_not_swapped()
            attributes = {k: v for k, v in vars(loaded).items() if k != "_lock"}
            without_interruption(*assignments(into, **attributes))
        restored: Self = into
        return restored

    def _snapshot(self) -> dict[str, Any]:
        """What a checkpoint holds. The arrays are live: `_lock` must be held while they are used."""
        self._require_not_swapped()
        to_find = len(self._to_exclude or ())
        to_find += sum(len(arrays or ()) for arrays, _ in self._to_override)
        if to_find:
            raise ValueError(
                "exclude_from_weight_decay(params) and override(params) must be followed by a step "
                "or by build(params), which find their positions, before save. "
                f"Received: {to_find} parameters still to be found"
            )
        own = self._found(())  # what was taken back since the last step is not in it
        return {
            "config": self._saved_config(),
            "progress": self._progress.as_dict(),
            "excluded": list(own.excluded),
            "own": self._own_counts_and_settings(own.overrides),
            "slots": {} if self._state is None else self._state.slots,
        }

    def _own_counts_and_settings(
        self, overrides: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What is not the same for all parameters, and not by `excluded`; by kind."""
        own: dict[str, Any] = {}
        if self._state is not None:
            steps = self._state.steps
            if any(count != self.iterations for count in steps):
                own["steps"] = steps
            if self._progress.accumulated and len(self._state.waiting) != len(steps):
                own["waiting"] = self._state.waiting
        if overrides:
            own["overrides"] = [
                [positions, settings] for positions, settings in OwnSettings((), overrides).groups()
            ]
        return own

    @classmethod
    def _restored(
        cls,
        config: dict[str, Any],
        lr: Any,
        params: Sequence[Any],
        progress: dict[str, Any],
        excluded: Sequence[int],
        own: Mapping[str, Any],
        slots: Mapping[str, Iterable[Array]],
    ) -> Self:
        """Make an optimizer from what `_snapshot` gave."""
        optimizer = cls(**(config if lr is None else config | {"lr": lr}))
        optimizer._progress = AdamProgress(progress)
        optimizer._progress.require_valid_for(optimizer._options)
        overrides = {
            position: optimizer._checked_override(settings)
            for positions, settings in own.get("overrides", ())
            for position in positions
        }
        optimizer._own = OwnSettings(tuple(excluded), overrides)
        if slots:
            optimizer._state = optimizer._state_from(params, slots, own)
            optimizer._tensors = _tensors_among(params)
        return optimizer

    def _state_from(
        self, like: Sequence[Any], slots: Mapping[str, Iterable[Array]], own: Mapping[str, Any]
    ) -> State:
        """State for such parameters, with these arrays, and counts of their own where given."""
        state = self._new_state(parameter_arrays(like), only_like=True)
        state.override(self._own.groups())
        positions = range(len(like))
        state.set_steps(own.get("steps", [self.iterations for _ in positions]))
        if self._progress.accumulated:
            state.set_waiting(own.get("waiting", positions))
        for kind, arrays in state.slots.items():
            for array, value in zip(arrays, slots[kind], strict=True):
                array[...] = value
        return state

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._require_not_swapped()
            state = self.__dict__.copy()
            del state["_lock"], state["_tensors"]
            state["_counts"] = {}
            # Copies, also where the caller copies shallowly: two optimizers never share moments.
            if self._state is not None:
                state["_state"] = {
                    kind: [array.copy() for array in arrays]
                    for kind, arrays in self._state.slots.items()
                }
                state["_counts"] = {"steps": self._state.steps, "waiting": self._state.waiting}
            state["_progress"] = AdamProgress(self._progress.as_dict())
            state["_own"] = (self._own.excluded, dict(self._own.overrides))
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        slots = state.pop("_state")
        counts = state.pop("_counts")
        own = OwnSettings(*state.pop("_own"))
        self.__dict__.update(state)
        self._lock = new_lock()
        self._state = None
        self._tensors = ()
        self._own = own
        if slots is not None:
            self._state = self._state_from(slots["m"], slots, counts)
            self._state.unbind()

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
        own = self._found(params) if self._to_override else self._own
        return self._clip(parameter_arrays(params), gradient_arrays(grads), own)

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
            self._require_not_swapped()
            self._step(params, grads, self._step_options(own_gradients=not are_given(loss)))
            assert self._state is not None
            m, v, *vhat = self._moments(self._state)
            updates: list[Any] = [self._iterations_array()]
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
            self._require_not_swapped()
            options = self._step_options()
            # What most steps are: no work in Python for each tensor.
            if self._state is not None and not self._is_to_find():
                taken = self._state.step_pairs(pairs, options, self._progress)
                if taken is not None:
                    self._tensors = ()
                    return taken
            grads, params = _unzipped(pairs)
            self._step(params, grads, options)
            return self.iterations

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
            self._require_not_swapped()
            self._step_structure(structure, leaves, items, self._step_options())
            return self.iterations

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
                self._require_not_swapped()
                options = self._step_options(own_gradients=True)
                self._step_structure(structure, leaves, grads, options)
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
            self._require_not_swapped()
            array = tensor_view(param, "param") if is_tensor(param) else param
            require_table(array)
            constraints = _constraints([param], [grad_rows])
            state = self._state if self._state is not None else self._new_state([array])
            options = self._step_options()
            rows = gradient_array(grad_rows, "grad_rows", written=options.zero_grad)
            work = (index_array(indices), rows, array, options, self._progress, bool(lazy))
            self._keep_stepped(state, [param], state.step_rows, work)
            self._tensors = _tensors_among([param])
            _mark_as_changed([grad_rows] if options.zero_grad else [])
            _mark_as_changed([param])
            _constrain([param], [array], constraints)
            return self.iterations

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
        arrays = list(_leaves(params)[0])
        with self._lock:
            self._to_exclude = arrays

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
                self._to_override = [(None, {})]  # what was to be found is not looked for any more
            return
        arrays = list(_leaves(params)[0])
        with self._lock:
            checked = self._checked_override(settings)
            self._to_override = [*self._to_override, (arrays, checked)]

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
            if self._state is None:
                raise ValueError(
                    "swap_ema needs averages: use_ema=True, and a step or build(params) before it. "
                    "Received: no state"
                )
            views = {i: tensor_view(tensor, f"params[{i}]") for i, tensor in self._tensors}
            without_interruption(
                partial(self._state.swap_ema, views),
                *assignments(self, _swapped=not self._swapped),
            )
            _mark_as_changed([tensor for _, tensor in self._tensors])

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

    def _step_structure(
        self, structure: Structure, params: Sequence[Any], grads: Sequence[Any], options: Any
    ) -> None:
        if self._structure:
            require_same(structure, self._structure[0], "params")
        self._step(params, grads, options)
        self._structure = (structure,)

    def _step(self, params: Sequence[Any], grads: Sequence[Any], options: Any) -> None:
        arrays = gradient_arrays(grads, written=options.zero_grad)
        zeroed = grads if options.zero_grad and arrays is not grads else ()
        if are_plain_arrays(params):
            self._step_arrays(params, params, arrays, options)
            self._tensors = ()
            _mark_as_changed(zeroed)
            return
        param_arrays = parameter_arrays(params)
        constraints = _constraints(params, grads)
        self._step_arrays(params, param_arrays, arrays, options)
        self._tensors = _tensors_among(params)
        _mark_as_changed(zeroed)
        _mark_as_changed([p for p, grad in zip(params, grads, strict=True) if grad is not None])
        _constrain(params, param_arrays, constraints)

    def _step_arrays(
        self,
        params: Sequence[Any],
        arrays: Sequence[Array],
        grads: Sequence[Array | None],
        options: Any,
    ) -> None:
        state = self._state if self._state is not None else self._new_state(arrays)
        self._keep_stepped(state, params, state.step, (arrays, grads, options, self._progress))

    def _require_not_swapped(self) -> None:
        if self._swapped:
            raise ValueError(
                "the averages must be swapped out first: call swap_ema() again. "
                "Received: parameters that are swapped with their averages"
            )

    def _is_to_find(self) -> bool:
        return self._to_exclude is not None or bool(self._to_override)

    def _found(self, params: Sequence[Any]) -> OwnSettings:
        """What parameters have of their own, with that of the arrays still to be found."""
        if not self._is_to_find():
            return self._own
        excluded, overrides = self._own.excluded, dict(self._own.overrides)
        find = Finder(params)
        if self._to_exclude is not None:
            excluded = tuple(sorted(find(self._to_exclude, "exclude_from_weight_decay")))
        for arrays, settings in self._to_override:
            if arrays is None:
                overrides.clear()
                continue
            for position in find(arrays, "override"):
                overrides[position] = (
                    {**overrides.get(position, {}), **settings} if settings else {}
                )
        return OwnSettings(excluded, {i: own for i, own in overrides.items() if own})

    def _keep_stepped(
        self,
        state: State,
        params: Sequence[Any],
        step: Callable[..., object],
        arguments: tuple[Any, ...],
    ) -> None:
        """Step this state, then keep it and what its parameters have of their own."""
        if state is self._state and not self._is_to_find():
            step(*arguments)
            return
        own = self._found(params)
        state.override(own.groups())
        without_interruption(
            partial(step, *arguments),
            *assignments(self, _state=state, _own=own, _to_exclude=None, _to_override=[]),
        )

    def _iterations_array(self) -> Array:
        array = np.array(self.iterations, dtype=np.int64)
        array.flags.writeable = False
        return array

    @staticmethod
    def _moments(state: State) -> list[list[Array]]:
        slots = state.slots
        return [slots[kind] for kind in _WEIGHT_KINDS if kind in slots]


def _leaves(params: Any) -> tuple[Sequence[Any], Structure]:
    """Parameters in one list, and how they were nested; an iterable of them counts as a list."""
    if not (isinstance(params, (list, tuple, dict, np.ndarray)) or is_tensor(params)):
        params = listed(params, "params")
    return flatten(params, "params")


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


def _constraints(params: Sequence[Any], grads: Sequence[Any]) -> list[tuple[int, Any]]:
    """Of the parameters that are stepped, by position."""
    constraints = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        constraint = getattr(param, "constraint", None)
        if constraint is None or grad is None:
            continue
        if not callable(constraint):
            raise TypeError(
                f"params[{i}].constraint must be callable. Received: {type(constraint).__name__}"
            )
        constraints.append((i, constraint))
    return constraints


def _constrain(
    params: Sequence[Any], arrays: Sequence[Array], constraints: Sequence[tuple[int, Any]]
) -> None:
    for i, constraint in constraints:
        value = as_array(constraint(params[i]), f"params[{i}].constraint(...)")
        if value.shape != arrays[i].shape:
            raise ValueError(
                f"params[{i}].constraint must return an array of the parameter's shape, "
                f"{arrays[i].shape}; the step has been taken. Received: shape={value.shape}"
            )
        arrays[i][...] = value


def _tensors_among(params: Sequence[Any]) -> tuple[tuple[int, Any], ...]:
    """Those of torch, each with its position."""
    return tuple((i, param) for i, param in enumerate(params) if is_tensor(param))


def _mark_as_changed(values: Sequence[Any]) -> None:
    """Tell torch of the writes, so that a graph that still needs the old values refuses to run."""
    tensors = [value for value in values if is_tensor(value)]
    if tensors:
        import torch

        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
