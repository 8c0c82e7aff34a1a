# SPDX-License-Identifier: MIT
"""fusedadam itself, and the traffic twin over the same arrays."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers import Array, Contender, Work, copies_to

SOURCE = Path(__file__).resolve().parents[2]
BUILD = SOURCE / "build" / "bench-twin"
LIBRARY = "FUSEDADAM_TWIN_LIBRARY"


def build_twin() -> None:
    """Build the twin's library with CMake, like the wheel. The environment tells its path."""
    if LIBRARY in os.environ:
        return
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = ["-S", str(SOURCE), "-B", str(BUILD), "-DFUSEDADAM_TWIN=ON"]
    compile_ = ["--build", str(BUILD), "--config", "Release", "--target", "traffic_twin", "-j2"]
    for arguments in (configure, compile_):
        subprocess.run([cmake, *arguments], check=True, stdout=subprocess.DEVNULL)
    found = BUILD.glob("bench/**/*traffic_twin.*")
    os.environ[LIBRARY] = next(str(f) for f in found if f.suffix in {".so", ".dylib", ".dll"})


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contenders over the same arrays."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    params, grads = list(work.params()), list(work.grads())
    pairs = list(zip(grads, params, strict=True))
    adam = optimizer(work)
    adam.build(params)
    found = {}
    for name in names:
        twin = name == "traffic twin"
        step = twin_step(params, grads, adam) if twin else lambda: adam.apply_gradients(pairs)
        form: Any = "twin" if twin else "hat"
        found[name] = Contender(
            form, step, copies_to(grads), lambda: params, lambda: list(adam.ema)
        )
    return found


def beginning(work: Work, threads: int) -> Callable[[], Callable[[], object]]:
    """Make parameters and gradients, and return what makes an optimizer and returns its step."""
    import fusedadam

    fusedadam.set_num_threads(threads)
    params = list(work.params())
    pairs = list(zip(work.grads(), params, strict=True))

    def begin() -> Callable[[], object]:
        adam = optimizer(work)
        adam.build(params)
        return lambda: adam.apply_gradients(pairs)

    return begin


def optimizer(work: Work) -> Any:
    """Return an optimizer with the settings of this work."""
    import fusedadam

    options: dict[str, Any] = {}
    if work.tail is not None:
        options = {**vars(work.tail), "use_ema": True, "zero_grad": True}
    return fusedadam.Adam(*vars(work.hyper).values(), **options)


def twin_step(params: list[Array], grads: list[Array], adam: Any) -> Callable[[], object]:
    """Return a function that makes the passes of a step over the same memory, with additions."""
    import fusedadam

    library = ctypes.CDLL(os.environ[LIBRARY])
    library.traffic_twin_make.restype = ctypes.c_void_p
    count = len(params)
    moments = adam.weights[1:]
    addresses = [
        (ctypes.c_void_p * count)(*(array.ctypes.data for array in stream)) if stream else None
        for stream in (params, grads, moments[:count], moments[count:], adam.ema)
    ]
    sizes = (ctypes.c_int64 * count)(*(param.size for param in params))
    isa = fusedadam.active_isa()
    is_float64 = int(params[0].dtype == np.float64)
    make_twin = library.traffic_twin_make
    twin = make_twin(isa.encode(), is_float64, ctypes.c_int64(count), *addresses, sizes)
    if not twin:
        raise RuntimeError(f"the traffic twin was built without this instruction set: {isa}")
    library.traffic_twin_set_num_threads(fusedadam.get_num_threads())
    step, handle = library.traffic_twin_step, Twin(library, twin)
    return lambda: step(handle.pointer)


class Twin:
    """Frees a twin with its last reference."""

    def __init__(self, library: ctypes.CDLL, twin: int) -> None:
        self.pointer = ctypes.c_void_p(twin)
        self._free = library.traffic_twin_free

    def __del__(self) -> None:
        self._free(self.pointer)
