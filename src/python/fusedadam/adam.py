# SPDX-License-Identifier: MIT
"""The Adam optimizer, and its step as a function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NoReturn, TypeVar, overload

import numpy as np

from fusedadam import _core
from fusedadam._core import public
from fusedadam.arrays import Array, as_array, listed
from fusedadam.optimizer import Optimizer
from fusedadam.own_settings import STRUCTURAL
from fusedadam.schedules import (
    Schedule,
    by_name,
    configured,
    either_name,
    require_not_negative,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_DEFAULTS: Final = _core.AdamOptions().as_dict()
# Compared by identity, to detect that both `lr` and `learning_rate` are given. Not a literal, since
# Python without a GIL interns constants.
_DEFAULT_LR: Final[float] = _DEFAULTS["lr"]

# Settings that a configuration always includes; others are left out at their defaults.
_ALWAYS: Final = ("lr", "beta_1", "beta_2", "decay", "epsilon")

_Value = TypeVar("_Value")


class _HyperParameter(Generic[_Value]):
    """A descriptor that reads and sets a setting in the checked options of `Adam`."""

    def __init__(self, option: str, doc: str) -> None:
        self._option = option
        self.__doc__ = doc

    @overload
    def __get__(self, adam: None, owner: type[Adam]) -> _HyperParameter[_Value]: ...
    @overload
    def __get__(self, adam: Adam, owner: type[Adam]) -> _Value: ...
    def __get__(self, adam: Adam | None, owner: type[Adam]) -> _HyperParameter[_Value] | _Value:
        if adam is None:
            return self
        value: _Value = getattr(adam._options, self._option)
        return value

    @public
    def __set__(self, adam: Adam, value: _Value) -> None:
        adam._configure(self._option, value)


class Adam(Optimizer):
    """Adam with fused, in-place, multi-threaded steps and the API of `tf.keras.optimizers.Adam`.

    Step t = 1, 2, ... computes, with scalars in float64 and correctly rounded powers of beta::

        lr'  = lr * (1 / (1 + decay * (t - 1)))
        lr_t = lr' * sqrt(1 - beta_2**t) / (1 - beta_1**t)
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        p = p - lr_t * m / (sqrt(v) + epsilon)

    elementwise, in float64 for float64 parameters, and in float32 for those in float32, bfloat16
    (of the package ml_dtypes) and float16. `epsilon` is the "epsilon hat" of [1]_, in the
    formula just before section 2.1. PyTorch and optax use Algorithm 1 of the paper instead, where
    epsilon is added after bias correction; set `bias_corrected_epsilon` for their results.

    The options add stages to the same pass over memory; `docs/numerics.md` has their formulas and
    their order. Each option is also an attribute that may be set between steps.

    Parameters
    ----------
    lr : float or callable, default 0.001
        Step size, >= 0; or a schedule, a function of `iterations` (the number of steps already
        taken) that returns it. See `current_lr`.
    beta_1 : float, default 0.9
        Decay rate of the first moment, >= 0 and < 1.
    beta_2 : float, default 0.999
        Decay rate of the second moment, >= 0 and < 1.
    epsilon : float, default 1e-8
        Added to the square root, >= 0. None means 1e-7, as in Keras 2.1.3 to 2.3.
    decay : float, default 0.0
        Inverse-time decay of `lr` per step, >= 0. The first step uses `lr` without decay.
    bias_corrected_epsilon : bool, default False
        Use epsilon as in Algorithm 1 of [1]_: step t adds ``epsilon * sqrt(1 - beta_2**t)`` to the
        square root.
    amsgrad : bool, default False
        Divide by the square root of the largest v so far, ``vhat = max(vhat, v)``.
    weight_decay : float, optional
        Decoupled weight decay (AdamW), before the update: ``p = p - lr' * weight_decay * p``. >= 0.
    l2 : float, default 0.0
        L2 regularization: ``g = g + l2 * p``, after clipping. >= 0.
    clipnorm : float, optional
        Upper bound of the norm of all gradients together: if `global_norm` of the gradients is at
        least `clipnorm`, every gradient is multiplied by ``clipnorm / norm``. 0 disables clipping.
        (In later versions of Keras, `clipnorm` bounds the norm of each gradient.)
    clipnorm_per_tensor : float, optional
        Likewise for the norm of each gradient separately. Cannot be combined with `clipnorm`.
    clipvalue : float, optional
        Clip gradients to ``[-clipvalue, clipvalue]``, after clipping by norm. 0 disables clipping.
    use_ema : bool, default False
        Keep an exponential moving average of each parameter, as in Keras 3: after a step,
        ``ema = ema_momentum * ema + (1 - ema_momentum) * p``; the first step sets it to p. See
        `ema` and `swap_ema`.
    ema_momentum : float, default 0.99
        >= 0 and <= 1. Requires `use_ema`.
    ema_overwrite_frequency : int, optional
        Overwrite the parameters by their averages every this many steps. >= 1. Requires `use_ema`.
    loss_scale : float or "dynamic", optional
        Factor by which the loss was multiplied, >= 2**-127 and <= 2**127; the step unscales the
        gradients. "dynamic" is dynamic loss scaling: the factor starts at 2**15, doubles after
        2,000 consecutive finite steps, and halves if a gradient is not finite, which skips the
        step.
    skip_nonfinite : bool, default False
        Skip steps with a gradient that is not finite, and count them in `skipped_steps`.
    gradient_accumulation_steps : int, optional
        Step once every this many calls, with the mean of their gradients. >= 1.
    zero_grad : bool, default False
        Set the gradients to zero in the same pass, even if the call only accumulates or skips the
        step. The gradients must then be writeable arrays.
    maximize : bool, default False
        Maximize the objective instead of minimizing it.
    flush_denormals : bool, default True
        Flush subnormal moments to zero. With False, moments can decay into the subnormal range,
        where many CPUs are a hundred times slower. With ``epsilon=0``, a second moment flushed to
        zero causes a division by zero.
    moments : {"float32", "bfloat16", "packed", "auto"}, default "float32"
        How m and v are stored: in the precision of the arithmetic (float64 for float64
        parameters), in 2 bytes each, or both in one word of 2 bytes; "auto" is "bfloat16" for
        16-bit parameters and "float32" for others. `docs/storage.md` has the formats and their
        limits. "packed" excludes `amsgrad`.
    low_bits : {None, "int8", "int16"}, default None
        Keep this many more bits of each bfloat16 parameter in the state. With "int16", the
        parameter is the upper half of an exact float32 weight. Without, parameters in bfloat16 and
        float16 are rounded at each step. Parameters of other dtypes have none. See
        `master_weights`.
    rounding : {"stochastic", "nearest"}, default "stochastic"
        Of what is stored in 16 bits. Nearest rounding loses updates that are small compared with
        the parameter; it excludes `low_bits="int8"` and packed moments.
    seed : int, default 0
        Of stochastic rounding, >= 0. The random bits depend only on it, on the number of the step,
        and on the index of an element in its parameter.
    learning_rate : float or callable
        Alias of `lr`; give only one of them.
    **kwargs
        Refused, as in Keras; lets subclasses pass on unknown arguments.

    Raises
    ------
    ValueError
        A hyper-parameter is out of range, or two of them exclude each other.
    TypeError
        A hyper-parameter is not a number, or an argument is unknown.

    Notes
    -----
    Results are bitwise identical for every instruction set and thread count.

    References
    ----------
    .. [1] D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization",
       https://arxiv.org/abs/1412.6980

    Examples
    --------
    >>> import numpy as np
    >>> from fusedadam import Adam
    >>> adam = Adam(lr=0.1)
    >>> w = np.array([1.0, 2.0])
    >>> adam.apply_gradients([(np.array([0.5, -0.5]), w)])
    1
    >>> w
    array([0.90000006, 2.09999994])
    """

    beta_1 = _HyperParameter[float]("beta_1", "Decay rate of the first moment.")
    beta_2 = _HyperParameter[float]("beta_2", "Decay rate of the second moment.")
    epsilon = _HyperParameter[float]("epsilon", "Added to the root of the second moment.")
    decay = _HyperParameter[float]("decay", "Inverse-time decay of `lr`, per step.")
    bias_corrected_epsilon = _HyperParameter[bool](
        "bias_corrected_epsilon", "Whether epsilon is used as in Algorithm 1 of the paper."
    )
    amsgrad = _HyperParameter[bool]("amsgrad", "Whether the largest v so far is used.")
    weight_decay = _HyperParameter["float | None"]("weight_decay", "Decoupled weight decay.")
    l2 = _HyperParameter[float]("l2", "L2 regularization.")
    clipnorm = _HyperParameter["float | None"]("clipnorm", "Bound of the global gradient norm.")
    clipnorm_per_tensor = _HyperParameter["float | None"](
        "clipnorm_per_tensor", "Bound of the norm of each gradient."
    )
    clipvalue = _HyperParameter["float | None"]("clipvalue", "Bound of each gradient element.")
    use_ema = _HyperParameter[bool]("use_ema", "Whether moving averages are kept.")
    ema_momentum = _HyperParameter[float]("ema_momentum", "Decay rate of the averages.")
    ema_overwrite_frequency = _HyperParameter["int | None"](
        "ema_overwrite_frequency", "Number of steps between overwriting parameters by averages."
    )
    loss_scale = _HyperParameter["float | Literal['dynamic'] | None"](
        "loss_scale", "Factor by which losses are multiplied."
    )
    skip_nonfinite = _HyperParameter[bool](
        "skip_nonfinite", "Whether steps with a gradient that is not finite are skipped."
    )
    gradient_accumulation_steps = _HyperParameter["int | None"](
        "gradient_accumulation_steps", "Number of calls per step."
    )
    zero_grad = _HyperParameter[bool]("zero_grad", "Whether gradients are set to zero.")
    maximize = _HyperParameter[bool]("maximize", "Whether the objective is maximized.")
    flush_denormals = _HyperParameter[bool](
        "flush_denormals", "Whether subnormal moments are flushed to zero."
    )

    moments = _HyperParameter["Literal['float32', 'bfloat16', 'packed', 'auto']"](
        "moments", "How m and v are stored."
    )
    low_bits = _HyperParameter["Literal['int8', 'int16'] | None"](
        "low_bits", "Which further bits of bfloat16 parameters are kept."
    )
    rounding = _HyperParameter["Literal['stochastic', 'nearest']"](
        "rounding", "How 16-bit weights and moments are rounded."
    )
    seed = _HyperParameter[int]("seed", "Seed of stochastic rounding.")

    @public
    def __init__(
        self,
        lr: float | Schedule = _DEFAULT_LR,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float | None = 1e-8,
        decay: float = 0.0,
        *,
        bias_corrected_epsilon: bool = False,
        amsgrad: bool = False,
        weight_decay: float | None = None,
        l2: float = 0.0,
        clipnorm: float | None = None,
        clipnorm_per_tensor: float | None = None,
        clipvalue: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale: float | Literal["dynamic"] | None = None,
        skip_nonfinite: bool = False,
        gradient_accumulation_steps: int | None = None,
        zero_grad: bool = False,
        maximize: bool = False,
        flush_denormals: bool = True,
        moments: Literal["float32", "bfloat16", "packed", "auto"] = "float32",
        low_bits: Literal["int8", "int16"] | None = None,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        learning_rate: float | Schedule = _DEFAULT_LR,
        **kwargs: NoReturn,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name in _DEFAULTS} | kwargs
        super().__init__()
        lr = either_name(lr, learning_rate, absent=_DEFAULT_LR)
        self._schedule: Schedule | None = lr if callable(lr) else None
        settings["lr"] = lr if self._schedule is None else _DEFAULT_LR
        self._options = require_not_negative(_core.AdamOptions(settings))

    @property
    def lr(self) -> float | Schedule:
        """Step size, or the schedule that returns it."""
        return self._options.lr if self._schedule is None else self._schedule

    @lr.setter
    @public
    def lr(self, value: float | Schedule) -> None:
        if callable(value):
            self._schedule = value
        else:
            self._configure("lr", value)
            self._schedule = None

    @property
    def learning_rate(self) -> float | Schedule:
        """Alias of `lr`."""
        return self.lr

    @learning_rate.setter
    @public
    def learning_rate(self, value: float | Schedule) -> None:
        self.lr = value

    @property
    @public
    def current_lr(self) -> float:
        """Learning rate of the next step, after the schedule and `decay`."""
        options = self._step_options()
        return options.lr * (1 / (1 + options.decay * self.iterations))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration as plain Python values, without options at their defaults.

        Raises
        ------
        ValueError
            `lr` is a schedule that cannot be imported by name.
        """
        config = self._plain_config()
        if self._schedule is not None:
            config["lr"] = configured(self._schedule)
        return config

    @classmethod
    @public
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make an optimizer with an empty state from the result of `get_config`.

        A schedule is imported by name.
        """
        config = dict(config)
        lr = config.get("lr")
        if isinstance(lr, str) and ":" in lr:
            config["lr"] = by_name(lr)
        return cls(**config)

    def __repr__(self) -> str:
        config = self._plain_config() | {"lr": self.lr}
        settings = ", ".join(f"{name}={value!r}" for name, value in config.items())
        return f"{type(self).__name__}({settings})"

    def _plain_config(self) -> dict[str, Any]:
        """Return the configuration without a schedule."""
        return {
            name: value
            for name, value in self._options.as_dict().items()
            if name in _ALWAYS or value != _DEFAULTS[name]
        }

    def _configure(self, option: str, value: Any) -> None:
        options = require_not_negative(self._options.changed({option: value}))
        if option in STRUCTURAL and self._state.is_built:
            old, new = (getattr(o, option) for o in (self._options, options))
            if old != new:
                raise ValueError(
                    f"{option} must not change once the state exists: make a new optimizer. "
                    f"Received: {option}={new!r} in place of {old!r}"
                )
        self._options = options

    def _step_options(self, *, own_gradients: bool = False) -> _core.AdamOptions:
        options = self._options
        if self._schedule is not None:
            options = require_not_negative(options.changed({"lr": self._schedule(self.iterations)}))
        if own_gradients and options.zero_grad:
            options = options.changed({"zero_grad": False})
        return options


@public
def adam_step(
    params: Array | Sequence[Array],
    grads: Array | Sequence[Array],
    m: Array | Sequence[Array] | None = None,
    v: Array | Sequence[Array] | None = None,
    *,
    step: int,
    vhat: Array | Sequence[Array] | None = None,
    ema: Array | Sequence[Array] | None = None,
    packed: Array | Sequence[Array] | None = None,
    low_bits: Array | Sequence[Array | None] | None = None,
    lr: float = _DEFAULT_LR,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float | None = 1e-8,
    bias_corrected_epsilon: bool = False,
    decay: float = 0.0,
    ema_momentum: float = 0.99,
    weight_decay: float | None = None,
    l2: float = 0.0,
    clipnorm: float | None = None,
    clipnorm_per_tensor: float | None = None,
    clipvalue: float | None = None,
    zero_grad: bool = False,
    maximize: bool = False,
    flush_denormals: bool = True,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
) -> None:
    """Take one step of `Adam` in place, with the moments held by the caller.

    Parameters
    ----------
    params : numpy.ndarray or sequence of numpy.ndarray
        float32, float64, float16 or bfloat16; without gaps, aligned, writeable. Updated in place.
    grads : numpy.ndarray or sequence of numpy.ndarray
        Gradients, of the shapes of `params`; cast by NumPy's rule `same_kind`.
    m, v : numpy.ndarray or sequence of numpy.ndarray, optional
        First and second moments, in the shapes of `params`; zeros before the first step. float32,
        or all in bfloat16; float64 for float64 parameters. Updated in place.
    step : int
        t, 1 for the first step.
    vhat : numpy.ndarray or sequence of numpy.ndarray, optional
        Largest second moments; zeros before the first step. Enables `amsgrad`. Updated in place.
    ema : numpy.ndarray or sequence of numpy.ndarray, optional
        Moving averages of the parameters, in the dtypes of `params`, but in float32 for 16-bit
        parameters. Enables `use_ema`. Updated in place.
    packed : numpy.ndarray or sequence of numpy.ndarray, optional
        Packed moments in place of `m` and `v`: int16, zeros before the first step. Updated in
        place.
    low_bits : numpy.ndarray or sequence of numpy.ndarray or None, optional
        Low bits of bfloat16 parameters, int8 or int16; None for parameters of other dtypes. Updated
        in place.
    lr, beta_1, beta_2, epsilon, bias_corrected_epsilon, decay, ema_momentum, weight_decay
        As for `Adam`; `lr` is a number, and `ema_momentum` requires `ema`.
    l2, clipnorm, clipnorm_per_tensor, clipvalue, zero_grad, maximize, flush_denormals, rounding, seed
        As for `Adam`.

    Raises
    ------
    TypeError
        An item is not an array or has another dtype; a hyper-parameter is not a number.
    ValueError
        An array cannot be updated in place, shapes or counts do not match, arrays that are written
        share memory, or a number is out of range. Nothing has changed.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedadam import adam_step
    >>> w, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    >>> adam_step(w, np.array([1.0, 0.0, -1.0]), m, v, step=1)
    >>> w
    array([0.999, 1.   , 1.001])
    """
    settings = {name: value for name, value in locals().items() if name in _DEFAULTS}
    single = isinstance(params, np.ndarray)

    def items(arrays: Any, name: str) -> list[Any]:
        return [arrays] if single else list(listed(arrays, name))

    params, grads = items(params, "params"), items(grads, "grads")
    named = {"m": m, "v": v, "vhat": vhat, "ema": ema, "packed": packed, "low_bits": low_bits}
    state = {name: items(arrays, name) for name, arrays in named.items() if arrays is not None}
    if (packed is None) != ({"m", "v"} <= state.keys()) or (packed is not None and "m" in state):
        raise TypeError(
            "the moments must be given as m and v, or as packed. "
            f"Received: {', '.join(state) or 'none'}"
        )
    settings |= {
        "amsgrad": vhat is not None,
        "use_ema": ema is not None,
        "moments": "packed" if packed is not None else _moments_dtype(state["m"]),
        "low_bits": _low_bits_dtype(state.get("low_bits", ())),
    }
    options = require_not_negative(_core.AdamOptions(settings))
    progress = _core.AdamProgress.before(step)
    _core.require_gradients(grads)
    plan = _core.TensorPlan(as_array, casts=True)
    plan.step(params, grads, state, [0] * len(params), [options], progress)


def _first_dtype(arrays: Iterable[Any]) -> str | None:
    """Return the name of the dtype of the first item that has one."""
    return next((a.dtype.name for a in arrays if isinstance(a, np.ndarray)), None)


def _low_bits_dtype(arrays: Sequence[Any]) -> str | None:
    # Any name will do for items that are no arrays, which the core then refuses.
    return _first_dtype(arrays) or ("int8" if any(a is not None for a in arrays) else None)


def _moments_dtype(m: Iterable[Any]) -> str:
    return "bfloat16" if _first_dtype(m) == "bfloat16" else "float32"
