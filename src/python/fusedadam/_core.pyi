# SPDX-License-Identifier: MIT
"""The compiled step: convert, check, release the GIL, call.

Use it through the package, whose classes own the state and hold the locks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeVar, final

import numpy.typing as npt

_Array: TypeAlias = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

__version__: str
compiler: str
threading_runtime: str
max_iterations: int

def public(function: _Function) -> _Function:
    """Make the traceback of what `function` refuses end at its caller's line.

    A `TypeError`, `ValueError` or `OverflowError` whose traceback lies wholly inside of this
    package loses it, and those of its `__context__` that do as well. What has passed through
    another's code, such as a loss, keeps all. With `FUSEDADAM_TRACEBACK=full` in the environment
    at import, returns the function as it is.
    """

@final
class AdamOptions:
    """Checked hyper-parameters: the arguments of `Adam`, but for a schedule of `lr`.

    Raises
    ------
    TypeError
        A setting is unknown, or not of its type; named.
    ValueError
        A setting is out of range, or two exclude each other; named.
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

@final
class AdamProgress:
    """What an optimizer counts; only steps change it.

    Raises
    ------
    TypeError
        A count is unknown, or no number; named.
    ValueError
        A count is out of range; named.
    """

    def __init__(self, counts: dict[str, Any] = ...) -> None: ...
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
    """What an optimizer keeps for each parameter, and these as last seen. Not for two threads."""

    def __init__(
        self, params: Sequence[_Array], options: AdamOptions, only_like: bool = False
    ) -> None: ...
    def require_kinds(self, options: AdamOptions) -> None: ...
    def override(self, overrides: list[tuple[list[int], dict[str, Any]]]) -> None: ...
    def step(
        self,
        params: Sequence[_Array],
        grads: Sequence[_Array | None],
        options: AdamOptions,
        progress: AdamProgress,
    ) -> None: ...
    def step_pairs(
        self,
        pairs: Sequence[tuple[Any, Any]],
        options: AdamOptions,
        progress: AdamProgress,
    ) -> int | None:
        """Step, and return the number of steps taken; None, and do nothing, if not all are plain."""

    def step_rows(
        self,
        indices: _Array,
        grad_rows: _Array,
        param: _Array,
        options: AdamOptions,
        progress: AdamProgress,
        lazy: bool,
    ) -> None: ...
    def unbind(self) -> None: ...
    def swap_ema(self, views: dict[int, _Array]) -> None: ...
    def set_steps(self, steps: Sequence[int]) -> None: ...
    def set_waiting(self, positions: Sequence[int]) -> None: ...
    @property
    def steps(self) -> list[int]: ...
    @property
    def waiting(self) -> list[int]: ...
    @property
    def slots(self) -> dict[str, list[_Array]]: ...

@final
class TensorPlan:
    """A step over CPU tensors of torch, whose memory others own. Not for two threads.

    Every list has an item for each parameter. A gradient that is None leaves its parameter alone.
    `state` has lists of tensors, "m", "v" and as the options need them "vhat", "ema",
    "accumulator"; or it is a list with a dict for each parameter, whose keys `names` tells.
    `groups` has positions in `options`. `copy_like(gradient, parameter)` copies into the
    parameter's layout.

    Raises
    ------
    ValueError
        A tensor is not what it must be; named by its list and index. Nothing has changed.
    """

    def __init__(
        self, copy_like: Callable[[Any, Any], Any], names: dict[str, str] = ...
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
    ) -> int:
        """Step, and count it in the state "step" of each parameter, a tensor of one element.

        Returns the number of parameters that had a gradient.
        """

def same_objects(a: list[Any], b: list[Any]) -> bool: ...
def gradients_of(tensors: list[Any]) -> list[Any]: ...
def allocate_state(params: list[Any], positions: list[int], kinds: int) -> list[list[_Array]]:
    """Zeros for tensors of torch: `kinds` lists of flat arrays. Errors name `positions`."""

def adam_step(
    params: Sequence[_Array],
    grads: Sequence[_Array],
    m: Sequence[_Array],
    v: Sequence[_Array],
    vhat: Sequence[_Array] | None,
    ema: Sequence[_Array] | None,
    options: AdamOptions,
    step: SupportsIndex,
) -> None: ...
def clip_gradients(
    params: Sequence[_Array],
    grads: Sequence[_Array],
    options: AdamOptions,
    progress: AdamProgress,
) -> list[_Array]: ...
def require_gradients(grads: Sequence[Any]) -> None: ...
def require_table(param: _Array) -> None: ...
def global_norm(arrays: Sequence[_Array]) -> float: ...
def cpu_quota() -> float | None:
    """The CPUs that the control groups of this process let it use at a time; None: all."""

def get_num_threads() -> int: ...
def set_num_threads(threads: SupportsIndex) -> None: ...
def supported_isas() -> tuple[str, ...]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
