# SPDX-License-Identifier: MIT
"""fusedadam itself, and the traffic twin over the same arrays.

The twin's library is the CMake target `traffic_twin`, which `twin.py` builds.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peers import Array, Beginning, Contender, Work
from peers.twin import LIBRARY_VARIABLE

if TYPE_CHECKING:
    import fusedadam


def versions() -> dict[str, str]:
    """Return the version. `machine.describe_software` has details of the build."""
    import fusedadam

    return {"fusedadam": fusedadam.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Accept all work."""
    return ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contenders over the same arrays."""
    arrays = Arrays(work, threads)
    return {
        name: Twin(arrays, threads) if name == "traffic twin" else Step(arrays) for name in names
    }


def beginning(work: Work, threads: int) -> Beginning:
    """Make parameters and gradients, and return what builds an optimizer over them."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    params = list(work.params())
    pairs = list(zip(work.grads(), params, strict=True))

    def begin() -> Callable[[], object]:
        adam = optimizer(work)
        adam.build(params)
        return lambda: adam.apply_gradients(pairs)

    return begin


def optimizer(work: Work) -> fusedadam.Adam:
    """Return an optimizer with the settings of this work."""
    import fusedadam

    hyper, tail = work.hyper, work.tail
    options: dict[str, Any] = {}
    if tail is not None:
        options = {
            "clipnorm": tail.clipnorm,
            "weight_decay": tail.weight_decay,
            "use_ema": True,
            "ema_momentum": tail.ema_momentum,
            "zero_grad": True,
        }
    return fusedadam.Adam(hyper.lr, hyper.beta_1, hyper.beta_2, hyper.epsilon, **options)


class Arrays:
    """Parameters, gradients, and an optimizer, which owns the moments."""

    def __init__(self, work: Work, threads: int) -> None:
        import fusedadam

        fusedadam.set_num_threads(threads)
        self.params = list(work.params())
        self.grads = list(work.grads())
        self.adam = optimizer(work)
        self.adam.build(self.params)


class Shared(Contender):
    """The common part of both contenders."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy arrays into the gradients."""
        for grad, values in zip(self._arrays.grads, grads, strict=True):
            grad[...] = values

    def params(self) -> list[Array]:
        """Return the arrays themselves."""
        return self._arrays.params

    def averages(self) -> list[Array]:
        """Return the arrays themselves."""
        return self._arrays.adam.ema


class Step(Shared):
    """`apply_gradients`, as users call it."""

    form = "hat"

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(arrays)
        self._apply = arrays.adam.apply_gradients
        self._pairs = list(zip(arrays.grads, arrays.params, strict=True))

    def step(self) -> object:
        """Take a step."""
        return self._apply(self._pairs)


class Twin(Shared):
    """The passes of a step over the same memory, with additions instead of the update."""

    form = "twin"

    def __init__(self, arrays: Arrays, threads: int) -> None:
        import fusedadam

        super().__init__(arrays)
        library = load_library()
        count = len(arrays.params)
        moments = arrays.adam.weights[1:]
        streams = [arrays.params, arrays.grads, moments[:count], moments[count:], arrays.adam.ema]
        addresses = [(ctypes.c_void_p * count)(*map(address, s)) if s else None for s in streams]
        sizes = (ctypes.c_int64 * count)(*(param.size for param in arrays.params))
        is_float64 = count > 0 and arrays.params[0].dtype == np.float64
        isa = fusedadam.active_isa()
        handle = library.traffic_twin_make(isa.encode(), is_float64, count, *addresses, sizes)
        if not handle:
            raise RuntimeError(f"the traffic twin was built without this instruction set: {isa}")
        weakref.finalize(self, library.traffic_twin_free, handle)
        library.traffic_twin_set_num_threads(threads)
        self._step = library.traffic_twin_step
        self._handle = ctypes.c_void_p(handle)

    def step(self) -> object:
        """Generate the memory traffic of a step."""
        return self._step(self._handle)


def address(array: Array) -> int:
    """Return the address of an array."""
    return array.ctypes.data


def load_library() -> ctypes.CDLL:
    """Load the twin's library."""
    path = os.environ.get(LIBRARY_VARIABLE)
    if not path:
        raise RuntimeError(f"{LIBRARY_VARIABLE} must be the path of the traffic twin's library")
    library = ctypes.CDLL(path)
    pointer, array = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    library.traffic_twin_make.restype = pointer
    library.traffic_twin_make.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int64,
        *[array] * 5,
        ctypes.POINTER(ctypes.c_int64),
    ]
    library.traffic_twin_free.restype = None
    library.traffic_twin_free.argtypes = [pointer]
    library.traffic_twin_step.restype = None
    library.traffic_twin_step.argtypes = [pointer]
    library.traffic_twin_set_num_threads.restype = None
    library.traffic_twin_set_num_threads.argtypes = [ctypes.c_int]
    return library
