# SPDX-License-Identifier: MIT
"""The compiled step: convert, check, release the GIL, call.

Use it through the package, whose classes own the state and hold the locks.
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, final

import numpy.typing as npt

_Array: TypeAlias = npt.NDArray[Any]

__version__: str
compiler: str
threading_runtime: str
max_iterations: int

@final
class AdamOptions:
    """Checked hyper-parameters. None for a clip is no clip.

    Raises
    ------
    TypeError
        A setting is not a real number; named.
    ValueError
        A setting is out of range; named.
    """

    def __init__(
        self,
        lr: SupportsFloat,
        beta_1: SupportsFloat,
        beta_2: SupportsFloat,
        epsilon: SupportsFloat,
        decay: SupportsFloat,
        clipnorm: SupportsFloat | None,
        clipvalue: SupportsFloat | None,
        flush_denormals: bool,
    ) -> None: ...
    @property
    def lr(self) -> float: ...
    @property
    def beta_1(self) -> float: ...
    @property
    def beta_2(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def clipnorm(self) -> float | None: ...
    @property
    def clipvalue(self) -> float | None: ...
    @property
    def flush_denormals(self) -> bool: ...

@final
class AdamState:
    """Moments, zeros at first, and the parameters last stepped. Not for two threads at once."""

    def __init__(self, params: Sequence[_Array]) -> None: ...
    def step(
        self,
        params: Sequence[_Array],
        grads: Sequence[_Array],
        options: AdamOptions,
        step: SupportsIndex,
    ) -> None: ...
    @property
    def slots(self) -> list[list[_Array]]: ...

def adam_step(
    params: Sequence[_Array],
    grads: Sequence[_Array],
    m: Sequence[_Array],
    v: Sequence[_Array],
    options: AdamOptions,
    step: SupportsIndex,
) -> None: ...
def clip_gradients(
    params: Sequence[_Array], grads: Sequence[_Array], options: AdamOptions
) -> list[_Array]: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: SupportsIndex) -> None: ...
def supported_isas() -> tuple[str, ...]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
