# SPDX-License-Identifier: MIT
"""Calls under a limit of the address space that rises until they succeed.

Needs its own interpreter with MALLOC_MMAP_THRESHOLD_ set. Then every large array is new address
space, which is subject to the limit, and no memory that malloc has kept.
"""

from __future__ import annotations

import contextlib
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fusedadam
import numpy as np
from fusedadam import Adam
from interrupts import Case

# The size of each array, far more than Python and NumPy allocate otherwise.
MIB = 1 << 20
_ELEMENTS = MIB // 4
# The increment of the limit: half an array, so that each array is missing once.
_RISE = MIB // 2


def _address_space() -> int:
    status = Path("/proc/self/status").read_text("ascii")
    found = re.search(r"VmSize:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@contextlib.contextmanager
def limited(more: int) -> Iterator[None]:
    """Limit the address space to this many bytes more than now."""
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + more, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


def exhaust(make: Callable[[], Case], errors: tuple[type[Exception], ...] = (MemoryError,)) -> int:
    """Repeat a call with ever more memory until it succeeds. Return the number of failures.

    Each failure must be one of `errors` and must change nothing. Afterwards the call must succeed
    with the correct result once there is memory.
    """
    undone, done, on = make(), make(), make()
    before = undone.observe()
    done.call()
    after = done.observe()
    on.call()
    on.go_on()
    after_and_on = on.observe()
    failures = 0
    while True:
        case = make()
        try:
            with limited(failures * _RISE):
                case.call()
        except errors:
            failures += 1
            assert failures < 100, "it never succeeds"
            assert case.observe() == before, f"failure {failures} has changed something"
            case.call()
        else:
            assert case.observe() == after
            return failures
        assert case.observe() == after
        case.go_on()
        assert case.observe() == after_and_on


class Steps(Case):
    """A call of an optimizer after earlier ones."""

    def __init__(self, calls: int = 0, shape: tuple[int, ...] = (_ELEMENTS,), **options: object):
        ascending = np.arange(_ELEMENTS, dtype=np.float32).reshape(shape)
        self.optimizer = Adam(**options)  # type: ignore[arg-type]
        self.params = [ascending / 7]
        self.grads = [ascending / 3]
        for _ in range(calls):
            self.go_on()

    def call(self) -> object:
        return self.optimizer.apply_gradients([(self.grads[0], self.params[0])])

    def go_on(self) -> object:
        return self.optimizer.apply_gradients([(self.grads[0], self.params[0])])

    def observe(self) -> object:
        arrays = [*self.params, *self.optimizer.weights, *self.optimizer.ema]
        return [a.tobytes() for a in arrays], self.optimizer._state.progress.as_dict()


class Build(Steps):
    """Moments created before the first step."""

    def call(self) -> object:
        self.optimizer.build(self.params)
        return None


class Copied(Steps):
    """A step with a gradient that is not contiguous and is therefore copied."""

    def __init__(self) -> None:
        super().__init__(1, shape=(1024, _ELEMENTS // 1024))
        self.strided = np.asfortranarray(self.grads[0])

    def call(self) -> object:
        return self.optimizer.apply_gradients([(self.strided, self.params[0])])


class Cast(Steps):
    """A step with a gradient of another dtype."""

    def __init__(self) -> None:
        super().__init__(1)
        self.cast = self.grads[0].astype(np.float64)

    def call(self) -> object:
        return self.optimizer.apply_gradients([(self.cast, self.params[0])])


class Relaid(Steps):
    """A step with parameters in another layout, to which the state is converted."""

    def __init__(self) -> None:
        super().__init__(1, shape=(1024, _ELEMENTS // 1024), use_ema=True)
        self.turned = np.asfortranarray(self.params[0])

    def call(self) -> object:
        return self.optimizer.apply_gradients([(self.grads[0], self.turned)])

    def observe(self) -> object:
        # The swap shows which parameters the optimizer is bound to.
        self.optimizer.swap_ema()
        swapped = self.turned.tobytes(), super().observe()
        self.optimizer.swap_ema()
        return swapped


class Frozen(Steps):
    """A step that freezes one of two parameters."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.params.append(self.params[0].copy())
        for _ in range(calls):
            self.go_on()

    def call(self) -> object:
        return self.optimizer.apply_gradients(
            [(self.grads[0], self.params[0]), (None, self.params[1])]
        )

    def go_on(self) -> object:
        return self.optimizer.apply_gradients([(self.grads[0], p) for p in self.params])


class Sparse(Steps):
    """A step with repeated rows, which are added up."""

    def __init__(self, calls: int, lazy: bool) -> None:
        super().__init__(calls, shape=(1024, _ELEMENTS // 1024))
        self.lazy = lazy
        self.indices = np.concatenate([np.arange(1000), np.arange(24)])

    def call(self) -> object:
        return self.optimizer.apply_sparse(
            self.indices, self.grads[0], self.params[0], lazy=self.lazy
        )


class Clipped(Steps):
    """Clipped copies of gradients."""

    def __init__(self) -> None:
        super().__init__(1, clipnorm=0.5)

    def call(self) -> object:
        return self.optimizer.get_gradients(self.grads, self.params)


class Copies(Steps):
    """Copies of the weights."""

    def call(self) -> object:
        return self.optimizer.get_weights()


class Weights(Steps):
    """A state taken over from another dtype."""

    def __init__(self) -> None:
        super().__init__(1)
        self.new = [np.array(7), *(np.linspace(0, 1, _ELEMENTS) for _ in range(2))]

    def call(self) -> object:
        self.optimizer.set_weights(self.new)
        return None


class Saved(Steps):
    """A save, which writes existing memory and needs almost none."""

    def __init__(self) -> None:
        super().__init__(1)
        self.path = Path(tempfile.mkdtemp()) / "state"

    def call(self) -> object:
        self.optimizer.save(self.path)
        return None


class Loaded(Saved):
    """An optimizer loaded from a file."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer.save(self.path)

    def call(self) -> object:
        return Adam.load(self.path, self.params)


class LoadedInPlace(Loaded):
    """An optimizer that loads a file in place."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer.apply_gradients([(self.grads[0], self.params[0])])

    def call(self) -> object:
        return self.optimizer.load(self.path, self.params)


class Pickled(Steps):
    """A copy made by `pickle`."""

    def call(self) -> object:
        return self.optimizer.__reduce_ex__(5)


class Averages(Steps):
    """A swap of averages, which needs no memory."""

    def __init__(self) -> None:
        super().__init__(use_ema=True)
        for _ in range(2):
            super().go_on()

    def call(self) -> object:
        self.optimizer.swap_ema()
        return None

    def go_on(self) -> object:
        self.optimizer.swap_ema()
        return super().go_on()


# The minimum number of failures, from arrays that are missing once.
CASES: dict[str, tuple[Callable[[], Case], int]] = {
    "build": (Build, 2),
    "first step": (Steps, 2),
    "first step, more state": (
        lambda: Steps(amsgrad=True, use_ema=True, gradient_accumulation_steps=2),
        5,
    ),
    "step": (lambda: Steps(1, clipnorm=1.0), 0),
    "gradient that is copied": (Copied, 1),
    "gradient that is cast": (Cast, 1),
    "another layout": (Relaid, 4),
    "first step, frozen": (lambda: Frozen(0), 4),
    "frozen": (lambda: Frozen(1), 0),
    "first sparse step": (lambda: Sparse(0, lazy=True), 3),
    "sparse step": (lambda: Sparse(1, lazy=True), 1),
    "dense step of sparse gradients": (lambda: Sparse(1, lazy=False), 1),
    "get_gradients": (Clipped, 1),
    "get_weights": (lambda: Copies(1), 2),
    "set_weights": (Weights, 2),
    "save": (Saved, 0),
    "load": (Loaded, 2),
    "load in place": (LoadedInPlace, 2),
    "pickle": (lambda: Pickled(1), 2),
    "swap_ema": (Averages, 0),
}


def exhaust_named(name: str) -> int:
    """Run one of `CASES`."""
    make, least = CASES[name]
    # An OpenMP runtime that cannot start threads would end the process.
    fusedadam.set_num_threads(1)
    failures = exhaust(make)
    assert failures >= least, f"{failures} failures"
    return failures
