# SPDX-License-Identifier: MIT
"""The contenders: implementations of Adam on a CPU behind a common interface.

Each module of this package adapts some peers: its `make(names, work, threads)` makes contenders,
which may share arrays that they all write in the same way. It imports the peers only inside of
functions, so that every module can be imported without them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from peers.formats import FORMATS, ISAS, contender

Array: TypeAlias = NDArray[Any]

# bitsandbytes-cpu-fork calls its import package `bitsandbytes` too, so it is installed in a
# directory of its own, which only the process of this contender sees.
FORK = Path(__file__).parents[1] / "apart" / "bitsandbytes-cpu-fork"

# The formula of a contender. With a = sqrt(1 - beta_2**t) and b = 1 - beta_1**t, step t is
#   "hat":         param -= lr * a / b * m / (sqrt(v) + epsilon)       the paper, before section 2.1
#   "algorithm 1": param -= lr / b * m / (sqrt(v) / a + epsilon)       the paper, algorithm 1
#   "twin":        param += grad                                       memory traffic without Adam
Form: TypeAlias = Literal["hat", "algorithm 1", "twin"]


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters of all contenders."""

    lr: float = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8

    @property
    def as_torch(self) -> dict[str, Any]:
        """The arguments of torch's optimizers, without weight decay."""
        betas = (self.beta_1, self.beta_2)
        return {"lr": self.lr, "betas": betas, "eps": self.epsilon, "weight_decay": 0.0}


@dataclass(frozen=True)
class Tail:
    """The settings of a training tail."""

    # Less than the norm of any gradients in the benchmark, so that each step clips.
    clipnorm: float = 0.1
    weight_decay: float = 0.01
    ema_momentum: float = 0.99


@dataclass(frozen=True)
class Work:
    """What to step: the sizes of the tensors, their type, and the settings."""

    sizes: tuple[int, ...]
    dtype: str = "float32"
    hyper: Hyper = field(default_factory=Hyper)
    tail: Tail | None = None

    @property
    def bytes_of_parameters(self) -> int:
        """The bytes of all parameters."""
        return sum(self.sizes) * np.dtype(self.dtype).itemsize

    def params(self) -> Iterator[Array]:
        """Yield initial parameters: normally distributed, each a new array."""
        return self._tiled(self._block(1))

    def grads(self) -> Iterator[Array]:
        """Yield gradients: small absolute values of normally distributed numbers.

        The traffic twin adds the gradients to every array that a step writes, and v must stay
        positive.
        """
        return self._tiled(np.abs(self._block(2)) * np.array(1e-3, self.dtype))

    def _block(self, seed: int) -> Array:
        # Larger arrays repeat the block: drawing 100 million numbers takes longer than a step.
        size = min(max(self.sizes, default=0) + 4099, 1 << 20)
        dtype = cast("Any", np.dtype(self.dtype))
        return np.random.default_rng(seed).standard_normal(size, dtype=dtype)

    def _tiled(self, block: Array) -> Iterator[Array]:
        for index, size in enumerate(self.sizes):
            offset = index % 4096
            if size <= len(block) - offset:
                yield block[offset : offset + size].copy()
            else:
                yield np.resize(block, size)


class Rounding(NamedTuple):
    """The largest errors of a contender that stores less than it computes with."""

    weight: float = 0.0  # relative, of a stored weight
    update: float = 0.0  # of the update of a step, in learning rates


class Contender(NamedTuple):
    """An implementation that steps the tensors of a `Work`, as functions."""

    form: Form
    step: Callable[[], object]  # takes a step, and returns when it has completed; this is timed
    set_grads: Callable[[Iterable[Array]], object]  # copies the gradients of the next step
    params: Callable[[], list[Array]]
    averages: Callable[[], list[Array]] = list  # of the parameters, in a training tail
    held_bytes: Callable[[], int] = int  # parameters, gradients and state, where they are counted
    scalars: str = ""  # the type that its scalars are rounded to, if not that of the tensors
    rounding: Rounding = Rounding()


def copies_to(arrays: Iterable[Array]) -> Callable[[Iterable[Array]], None]:
    """Return a function that copies gradients into these arrays."""

    def copy(grads: Iterable[Array]) -> None:
        for array, values in zip(arrays, grads, strict=True):
            array[...] = values

    return copy


class Peer(NamedTuple):
    """A contender: what it needs and cannot do."""

    # Contenders of one process, named after a colon if they are not all of a module, share memory.
    module: str
    packages: tuple[str, ...] = ()  # to import
    # Temporary arrays of a step, beside those that Adam requires, in multiples of the parameters'
    # size (measured).
    temporaries: int = 0
    most_tensors: int = 1_000_000
    too_many: str = ""
    has_float64: bool = True
    held_bytes: int = 0  # of an element, if its process does not hold one set of arrays
    # Sizes of the tensors that it is checked with, if not the usual ones.
    checked: tuple[int, ...] = ()

    def limit(self, work: Work) -> str:
        """Return why it cannot do this work, or ""."""
        if work.dtype == "float64" and not self.has_float64:
            return "has no float64"
        if len(work.sizes) > self.most_tensors:
            return f"more than {self.most_tensors:,} tensors: {self.too_many}"
        return ""

    def absent(self) -> str:
        """Return what is not installed, or ""."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if self.module.endswith(":fork") and not FORK.exists():
            missing.append(f"{FORK.name} (docs/benchmarks.md says how)")
        return f"not installed: {', '.join(missing)}" if missing else ""


def stored(process: str, *packages: str, checked: tuple[int, ...] = ()) -> Peer:
    """Return an optimizer over bfloat16 parameters."""
    module = f"torch_adam:{process}"
    return Peer(module, (*packages, "torch"), has_float64=False, checked=checked)


TORCH, JAX = ("torch",), ("jax", "optax")
KERAS_TORCH, KERAS_TF = ("keras", "torch"), ("keras", "tensorflow")
OURS = {"fusedadam": Peer("fusedadam_adam"), "traffic twin": Peer("fusedadam_adam")}
STEPS = {
    **OURS,
    "torch default": Peer("torch_adam", TORCH, 2),
    "torch foreach": Peer("torch_adam", TORCH, 1),
    "torch fused": Peer("torch_adam", TORCH),
    "deepspeed": Peer("torch_adam:deepspeed", ("deepspeed", "torch"), has_float64=False),
    "tensorflow ResourceApplyAdam": Peer(
        "tensorflow_adam", ("tensorflow",), 0, 1_000, "10,000 take a minute to trace"
    ),
    "keras torch": Peer("keras_adam:torch", KERAS_TORCH, 3, 10_000, "100,000 take 4 s a step"),
    "keras tensorflow": Peer(
        "keras_adam:tensorflow", KERAS_TF, 1, 1_000, "1,000 take half a minute to compile"
    ),
    "optax": Peer("jax_adam:optax", JAX, 3, 1_000, "10,000 take minutes to compile"),
    "numba": Peer("numba_adam", ("numba",)),
    "numpy": Peer("numpy_adam", ("numpy",), 3),
}
# A training tail: clip by the global norm, decay, step, average, zero the gradients.
TAILS = {**OURS, "torch": Peer("torch_adam", TORCH)}
# fusedadam behind the interfaces of frameworks.
ADAPTERS = {
    "fusedadam.torch": Peer("torch_adam:fusedadam", TORCH),
    "fusedadam.keras": Peer("keras_adam:fusedadam", KERAS_TORCH),
    "fusedadam.jax": Peer("jax_adam:fusedadam", JAX, 0, 1_000, "10,000 take minutes to compile"),
}
# Optimizers that store less than float32.
STORING = {
    "torch fused bf16": stored("bf16"),
    "deepspeed bf16": stored("deepspeed bf16", "deepspeed"),
    "bitsandbytes 8 bit": stored("bitsandbytes", "bitsandbytes"),
    "bitsandbytes-cpu-fork 8 bit": stored("fork"),
    # The last size is that of whole blocks, which are stored in 8 bits. It compiles ten seconds for
    # each size.
    "torchao 8 bit": stored("torchao", "torchao", checked=(1_025, 1 << 16)),
}
# The formats of `fusedadam.torch` on each instruction set. All are in one process.
STORED_BYTES = sum(form.held for form in FORMATS.values())
STORED = {
    contender(name, isa): Peer("fusedadam_storage", TORCH, held_bytes=STORED_BYTES)
    for isa in ISAS
    for name in FORMATS
}
PEERS = {**STEPS, **TAILS, **ADAPTERS, **STORING, **STORED}


def load(name: str) -> Any:
    """Import the module of a contender."""
    return importlib.import_module(f"peers.{PEERS[name].module.partition(':')[0]}")
