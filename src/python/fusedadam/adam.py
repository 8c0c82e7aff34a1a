# SPDX-License-Identifier: MIT
"""Adam: its hyper-parameters, and the way into the compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar, overload

import numpy as np

from fusedadam import _core
from fusedadam.arrays import Array, gradient_arrays, listed
from fusedadam.optimizer import Optimizer

# Recognised by identity: `learning_rate` may stand in for `lr`, but not beside it.
_DEFAULT_LR: Final = 0.001

# Settings that a configuration always names, in Keras' order, and those that it leaves out while
# they are off.
_ALWAYS: Final = ("lr", "beta_1", "beta_2", "decay", "epsilon")
_OFF: Final[dict[str, Any]] = {"clipnorm": None, "clipvalue": None, "flush_denormals": True}

_Value = TypeVar("_Value")


class _HyperParameter(Generic[_Value]):
    """An attribute of `Adam`, kept in its checked options; a refused value leaves the old one."""

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
        value: _Value = getattr(adam._settings, self._option)
        return value

    def __set__(self, adam: Adam, value: _Value) -> None:
        adam._configure(**{self._option: value})


class Adam(Optimizer):
    r"""Adam with fused, in-place, multi-threaded steps, shaped like `tf.keras.optimizers.Adam`.

    Step :math:`t = 1, 2, \ldots`, with the scalars in float64 and :math:`\beta^t` correctly
    rounded, is

    .. math::

        lr' &= lr \cdot \frac{1}{1 + decay \cdot (t - 1)} \\
        lr_t &= lr' \cdot \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \\
        m &= \beta_1 m + (1 - \beta_1) g \\
        v &= \beta_2 v + (1 - \beta_2) g^2 \\
        p &= p - \frac{lr_t \, m}{\sqrt{v} + \epsilon}

    elementwise, in the parameter's own precision. `epsilon` is the "epsilon hat" of [1]_, in the
    formula just before its section 2.1: it is not divided by the bias correction. PyTorch and optax
    use the paper's Algorithm 1; to get their results, pass `eps * sqrt(1 - beta_2**t)`.

    Parameters
    ----------
    lr : float, default 0.001
        Step size, >= 0.
    beta_1 : float, default 0.9
        Decay rate of the first moment, > 0 and < 1.
    beta_2 : float, default 0.999
        Decay rate of the second moment, > 0 and < 1.
    epsilon : float, default 1e-8
        Added to the root, >= 0.
    decay : float, default 0.0
        Inverse-time decay of `lr`, per step, >= 0. The first step takes `lr` whole.
    **kwargs
        clipnorm : float
            Upper bound of the norm of all gradients together (later versions of Keras bound
            the norm of each gradient by itself under this name): where :math:`n = \sqrt{\sum g^2}`,
            over all elements of all gradients, is at least `clipnorm`, every gradient is multiplied
            by `clipnorm / n`. 0 clips nothing.
        clipvalue : float
            Gradients are clamped to `[-clipvalue, clipvalue]`, after `clipnorm`. 0 clips nothing.
        flush_denormals : bool, default True
            Store moments smaller in magnitude than the smallest normal number as zero. With False,
            the moments decay into the subnormal range, where many CPUs are a hundred times slower.
            With ``epsilon=0``, a flushed second moment divides by zero.
        learning_rate : float
            Another name of `lr`.

    Raises
    ------
    ValueError
        A hyper-parameter is out of range.
    TypeError
        A hyper-parameter is no number, or an argument is unknown.

    Notes
    -----
    Results are the same to the last bit for every instruction set and thread count.

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

    lr = _HyperParameter[float]("lr", "Step size.")
    learning_rate = _HyperParameter[float]("lr", "Another name of `lr`.")
    beta_1 = _HyperParameter[float]("beta_1", "Decay rate of the first moment.")
    beta_2 = _HyperParameter[float]("beta_2", "Decay rate of the second moment.")
    epsilon = _HyperParameter[float]("epsilon", "Added to the root of the second moment.")
    decay = _HyperParameter[float]("decay", "Inverse-time decay of `lr`, per step.")
    clipnorm = _HyperParameter["float | None"]("clipnorm", "Bound of the global gradient norm.")
    clipvalue = _HyperParameter["float | None"]("clipvalue", "Bound of each gradient element.")
    flush_denormals = _HyperParameter[bool](
        "flush_denormals", "Whether subnormal moments are zero."
    )

    def __init__(
        self,
        lr: float = _DEFAULT_LR,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if "learning_rate" in kwargs:
            if lr is not _DEFAULT_LR:
                raise TypeError(
                    "lr and learning_rate are the same argument: give one. "
                    f"Received: lr={lr!r}, learning_rate={kwargs['learning_rate']!r}"
                )
            lr = kwargs.pop("learning_rate")
        for name in kwargs:
            if name not in _OFF:
                raise TypeError(f"Unexpected keyword argument passed to optimizer: {name}")
        self._options = _core.AdamOptions(
            lr=lr, beta_1=beta_1, beta_2=beta_2, decay=decay, epsilon=epsilon, **(_OFF | kwargs)
        )

    def get_config(self) -> dict[str, Any]:
        """Return the configuration as plain Python numbers; options that are off are left out."""
        config = {name: getattr(self._options, name) for name in _ALWAYS}
        for name, off in _OFF.items():
            value = getattr(self._options, name)
            if value != off:
                config[name] = value
        return config

    def _configure(self, **changes: Any) -> None:
        current = {name: getattr(self._options, name) for name in (*_ALWAYS, *_OFF)}
        self._options = _core.AdamOptions(**(current | changes))

    @property
    def _settings(self) -> _core.AdamOptions:
        return self._options

    def _new_state(self, params: Sequence[Array]) -> _core.AdamState:
        return _core.AdamState(params)

    def _clip(self, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
        return _core.clip_gradients(params, grads, self._options)


def adam_step(
    params: Array | Sequence[Array],
    grads: Array | Sequence[Array],
    m: Array | Sequence[Array],
    v: Array | Sequence[Array],
    *,
    step: int,
    lr: float = _DEFAULT_LR,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    flush_denormals: bool = True,
) -> None:
    """Take one step of `Adam` in place, over moments that the caller holds.

    Parameters
    ----------
    params : numpy.ndarray or sequence of numpy.ndarray
        float32 or float64; C-contiguous, aligned, writeable. Updated in place.
    grads : numpy.ndarray or sequence of numpy.ndarray
        Gradients, of the shapes and dtypes of `params`.
    m, v : numpy.ndarray or sequence of numpy.ndarray
        First and second moments, zeros before the first step; like `params`. Updated in place.
    step : int
        t, 1 for the first step.
    lr, beta_1, beta_2, epsilon, flush_denormals
        As for `Adam`.

    Raises
    ------
    TypeError
        An array is none, or of another dtype; a hyper-parameter is no number.
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
    options = _core.AdamOptions(
        lr=lr,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        decay=0.0,
        clipnorm=None,
        clipvalue=None,
        flush_denormals=flush_denormals,
    )
    if isinstance(params, np.ndarray):
        lists: tuple[Any, ...] = ([params], [grads], [m], [v])
    else:
        lists = (params, grads, m, v)
    params, grads, m, v = map(listed, lists, ("params", "grads", "m", "v"))
    _core.adam_step(params, gradient_arrays(grads), m, v, options, step)
