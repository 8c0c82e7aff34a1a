# SPDX-License-Identifier: MIT
"""The compiled part of fusedadam; private, use the classes of the package."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeVar, final

import numpy.typing as npt

_Array: TypeAlias = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Pending: TypeAlias = tuple[list[Any] | None, list[tuple[list[Any] | None, dict[str, Any]]]]

__version__: str
compiler: str
threading_runtime: str
max_iterations: int
state_kinds: tuple[str, ...]
xla_shared_words: int

def public(function: _Function) -> _Function:
    """Decorate `function` so that tracebacks of its errors end at the caller's line.

    A `TypeError`, `ValueError` or `OverflowError` whose traceback is entirely within this package
    loses it, as do such errors in its `__context__`. An error that passed through other code, such
    as a loss, keeps its traceback. If the environment has `FUSEDADAM_TRACEBACK=full` at import,
    returns `function` unchanged.
    """

@final
class AdamOptions:
    """Validated hyper-parameters: the arguments of `Adam`, except that `lr` is a number.

    Raises
    ------
    TypeError
        A setting is unknown, or has the wrong type.
    ValueError
        A setting is out of range, or two exclude each other.
    """

    def __init__(self, settings: dict[str, Any] = ...) -> None: ...
    def changed(self, settings: dict[str, Any]) -> AdamOptions: ...
    def as_dict(self) -> dict[str, Any]: ...
    @property
    def lr(self) -> float: ...
    @property
    def beta_1(self) -> float: ...
    @property
    def beta_2(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def bias_corrected_epsilon(self) -> bool: ...
    @property
    def amsgrad(self) -> bool: ...
    @property
    def weight_decay(self) -> float | None: ...
    @property
    def l2(self) -> float: ...
    @property
    def clipnorm(self) -> float | None: ...
    @property
    def clipnorm_per_tensor(self) -> float | None: ...
    @property
    def clipvalue(self) -> float | None: ...
    @property
    def use_ema(self) -> bool: ...
    @property
    def ema_momentum(self) -> float: ...
    @property
    def ema_overwrite_frequency(self) -> int | None: ...
    @property
    def loss_scale(self) -> float | Literal["dynamic"] | None: ...
    @property
    def skip_nonfinite(self) -> bool: ...
    @property
    def gradient_accumulation_steps(self) -> int | None: ...
    @property
    def zero_grad(self) -> bool: ...
    @property
    def maximize(self) -> bool: ...
    @property
    def flush_denormals(self) -> bool: ...
    @property
    def moments(self) -> Literal["float32", "bfloat16", "packed", "auto"]: ...
    @property
    def low_bits(self) -> Literal["int8", "int16"] | None: ...
    @property
    def rounding(self) -> Literal["stochastic", "nearest"]: ...
    @property
    def seed(self) -> int: ...

@final
class AdamProgress:
    """The counts of an optimizer; only steps change them.

    Raises
    ------
    TypeError
        A count is unknown, or is not a number.
    ValueError
        A count is out of range.
    """

    def __init__(self, counts: dict[str, Any] = ...) -> None: ...
    @staticmethod
    def before(step: SupportsIndex) -> AdamProgress:
        """Return the counts before this step, where the first step is 1."""

    def as_dict(self) -> dict[str, Any]: ...
    def require_valid_for(self, options: AdamOptions) -> None: ...
    def current_loss_scale(self, options: AdamOptions) -> float: ...
    @property
    def iterations(self) -> int: ...
    @property
    def skipped_steps(self) -> int: ...
    @property
    def accumulated(self) -> int: ...
    @property
    def dynamic_loss_scale(self) -> float: ...
    @property
    def good_steps(self) -> int: ...

@final
class AdamState:
    """The mutable state of an optimizer. Not thread-safe.

    It has the moments, the counts, the settings of single parameters, and whether the averages are
    swapped in. Each call either succeeds, or raises and changes nothing.
    `as_array(gradient, name)` converts a gradient that is neither a NumPy array nor a tensor.
    `own` has the positions excluded from weight decay, and the settings by position. `pending` has
    the arrays not yet looked up among the parameters: those to exclude, and those with settings
    (None for all parameters).
    """

    def __init__(
        self,
        as_array: Callable[[Any, str], _Array] | None,
        progress: AdamProgress = ...,
        own: tuple[set[int], dict[int, dict[str, Any]]] = ...,
        pending: _Pending = ...,
        structure: tuple[Any, ...] = ...,
    ) -> None: ...
    def build(self, params: Sequence[Any], options: AdamOptions) -> None: ...
    def restore(
        self,
        like: Sequence[Any],
        options: AdamOptions,
        steps: Sequence[int],
        waiting: Sequence[int],
    ) -> None:
        """Allocate moments for parameters such as these, which are not modified."""

    def step(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        options: AdamOptions,
        structure: tuple[Any, ...] = ...,
    ) -> int:
        """Step all parameters that have a gradient, and return `iterations`.

        Stores `structure`, the nesting of the parameters, unless it is empty.
        """

    def step_pairs(self, pairs: Sequence[Any], options: AdamOptions) -> int | None:
        """Step (gradient, parameter) pairs of plain arrays; for others return None, do nothing."""

    def step_rows(
        self, indices: _Array, grad_rows: Any, param: Any, options: AdamOptions, lazy: bool
    ) -> int: ...
    def exclude(self, arrays: list[Any]) -> None: ...
    def override(self, arrays: list[Any] | None, settings: dict[str, Any]) -> None: ...
    def find_own(self, params: Sequence[Any]) -> tuple[set[int], dict[int, dict[str, Any]]]:
        """Return `own` updated by `pending`, looked up among these parameters."""

    def swap_ema(self) -> None: ...
    def set_weights(self, values: list[tuple[_Array, _Array]], iterations: int) -> None:
        """Write new values into live arrays, and set the step counts to `iterations`."""

    def require_not_swapped(self) -> None: ...
    def forget_params(self) -> None: ...
    @property
    def progress(self) -> AdamProgress: ...
    @property
    def iterations(self) -> int: ...
    @property
    def is_built(self) -> bool: ...
    @property
    def is_swapped(self) -> bool: ...
    @property
    def own(self) -> tuple[set[int], dict[int, dict[str, Any]]]: ...
    @property
    def pending(self) -> _Pending: ...
    @property
    def arrays_to_find(self) -> int: ...
    @property
    def structure(self) -> tuple[Any, ...]: ...
    @property
    def params(self) -> list[Any]: ...
    @property
    def steps(self) -> list[int]: ...
    @property
    def waiting(self) -> list[int]: ...
    @property
    def slots(self) -> dict[str, list[Any]]:
        """The live arrays by kind; None instead of an array that a parameter does not have."""

    @property
    def dtypes(self) -> list[str]:
        """The dtype of each parameter."""

@final
class TensorPlan:
    """A step over arrays that the caller owns, including the state. Not thread-safe.

    Every list has one item per parameter. A parameter whose gradient is None is not updated.
    `state` has lists of arrays by kind, or is a list with a dict per parameter; `names` maps kinds
    to its keys. `groups` has indices into `options`. With `casts`, all are NumPy arrays, gradients
    are cast, and `convert(gradient, name)` converts a gradient that is not an array. Otherwise they
    are torch CPU tensors, and `convert(gradient, parameter)` copies a gradient into the parameter's
    layout.

    Raises
    ------
    TypeError, ValueError
        An array cannot be used, named by its list and index. Nothing has changed.
    """

    def __init__(
        self, convert: Callable[[Any, Any], Any], names: dict[str, str] = ..., casts: bool = ...
    ) -> None: ...
    def step(
        self,
        params: list[Any],
        grads: list[Any],
        state: dict[str, list[Any]] | list[dict[str, Any]],
        groups: list[int],
        options: Sequence[AdamOptions],
        progress: AdamProgress,
    ) -> None: ...
    def step_counted(
        self,
        params: list[Any],
        grads: list[Any],
        state: dict[str, list[Any]] | list[dict[str, Any]],
        groups: list[int],
        options: Sequence[AdamOptions],
        parts: Sequence[tuple[Sequence[int], Sequence[int]] | None] | None = ...,
    ) -> int:
        """Step, and increment "step" in the state of each parameter, a one-element tensor.

        `parts` has the shape of the whole tensor and the offset in it for parameters that are parts
        of larger tensors. Returns the number of parameters with a gradient.
        """

def same_objects(a: list[Any], b: list[Any]) -> bool: ...
def gradients_of(tensors: list[Any]) -> list[Any]: ...
def needed_state(options: AdamOptions, dtype: str, name: str = ...) -> dict[str, str]:
    """Return the dtypes of the state, by kind, that a parameter of this dtype needs.

    For a complex dtype, those of its real view. Raises ValueError, with this name, if such a parameter cannot be stepped.
    """

def allocate_state(
    params: list[Any], positions: list[int], options: AdamOptions
) -> dict[str, list[_Array | None]]:
    """Return initial state for torch tensors, lists of arrays by kind. Errors name `positions`.

    Arrays of bfloat16 are of int16, of the same size. None for a kind that a tensor does not need.
    """

def join_weights(param: Any, low_bits: Any) -> _Array:
    """Return the weights in float32, from a parameter and its low bits or None."""

def split_weights(values: Any, param: Any, low_bits: Any) -> None:
    """Set a parameter and its low bits, or None, to float32 values, rounded to nearest."""

def unpack_moments(packed: Any) -> tuple[_Array, _Array]:
    """Return m and v in float32."""

def pack_moments(m: Any, v: Any, packed: Any) -> None:
    """Set packed moments to float32 values, rounded to nearest."""

def clip_gradients(
    params: Sequence[_Array],
    grads: Sequence[_Array],
    options: AdamOptions,
    progress: AdamProgress,
) -> list[_Array]: ...
def require_gradients(grads: Sequence[Any]) -> None: ...
def global_norm(arrays: Sequence[_Array]) -> float: ...
def xla_handlers() -> dict[str, Any]:
    """Return the handlers of XLA's foreign function interface, as capsules by name."""

def cpu_quota() -> float | None:
    """Return the number of CPUs that the control groups of this process allow; None if all."""

def get_num_threads() -> int: ...
def set_num_threads(threads: SupportsIndex) -> None: ...
def supported_isas() -> tuple[str, ...]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
