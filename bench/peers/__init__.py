# SPDX-License-Identifier: MIT
"""The contenders: implementations of Adam on a CPU behind a common interface.

Each module of this package adapts one peer, possibly in several variants. It imports the peer only
inside of functions, so that every adapter can be imported without its peer. `Peer` is the interface
of an adapter module, and `Contender` that of what it makes.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
from formats import FORMATS, ISAS, contender
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

# Contender -> module of this package. Contenders of one module share a process, and memory where
# possible.
PEERS = {
    "fusedadam": "fusedadam_adam",
    "traffic twin": "fusedadam_adam",
    "torch default": "torch_adam",
    "torch foreach": "torch_adam",
    "torch fused": "torch_adam",
    "deepspeed": "deepspeed_adam",
    "tensorflow ResourceApplyAdam": "tensorflow_adam",
    "keras torch": "keras_torch",
    "keras tensorflow": "keras_tensorflow",
    "optax": "optax_adam",
    "numba": "numba_adam",
    "numpy": "numpy_adam",
}
# The same for the training tail: clip by the global norm, decay, step, average, zero the gradients.
TAIL_PEERS = {
    "fusedadam": "fusedadam_adam",
    "traffic twin": "fusedadam_adam",
    "torch": "torch_adam",
}

# fusedadam behind the interfaces of frameworks, timed in the section `adapters`.
ADAPTERS = {
    "fusedadam.torch": "fusedadam_torch",
    "fusedadam.keras": "fusedadam_keras",
}

# The formats of `fusedadam.torch` on each instruction set, and optimizers of others that store less
# than float32; timed in the section `storage`.
FORMAT_PEERS = {contender(name, isa): "fusedadam_storage" for isa in ISAS for name in FORMATS}
STORING_PEERS = {
    "torch fused bf16": "torch_bf16",
    "deepspeed bf16": "deepspeed_bf16",
    "bitsandbytes 8 bit": "bitsandbytes_adam",
    "bitsandbytes-cpu-fork 8 bit": "bitsandbytes_fork",
    "torchao 8 bit": "torchao_adam",
}
# All without a training tail.
MODULES = PEERS | ADAPTERS | FORMAT_PEERS | STORING_PEERS

# Bytes per element of a module whose contenders have arrays of their own. Others hold parameters,
# gradients and two moments, once.
HELD_BYTES = {"fusedadam_storage": sum(stored.held for stored in FORMATS.values())}

# Temporary arrays of a step, beside those that Adam requires, in multiples of the parameters' size
# (measured). Other contenders have none.
TEMPORARIES = {
    "torch default": 2,
    "torch foreach": 1,
    "keras torch": 3,
    "keras tensorflow": 1,
    "optax": 3,
    "numpy": 3,
}

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
    seed: int = 1

    def params(self) -> Iterator[Array]:
        """Yield initial parameters: normally distributed, each a new array."""
        return self._tiled(self._block(self.seed))

    def grads(self) -> Iterator[Array]:
        """Yield gradients: small absolute values of normally distributed numbers.

        The traffic twin adds the gradients to every array that a step writes, and v must stay
        positive.
        """
        return self._tiled(np.abs(self._block(self.seed + 1)) * np.array(1e-3, self.dtype))

    def _block(self, seed: int) -> Array:
        # Larger arrays repeat the block: drawing 100 million numbers takes longer than a step.
        size = min(max(self.sizes, default=0) + 4099, 1 << 20)
        random = np.random.default_rng(seed)
        return random.standard_normal(size, dtype=cast("Any", np.dtype(self.dtype)))

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


class Contender(ABC):
    """An implementation that steps the tensors of a `Work`."""

    form: ClassVar[Form]
    # The type that its scalars are rounded to, if not that of the tensors.
    scalars: ClassVar[str | None] = None
    rounding: Rounding = Rounding()

    @abstractmethod
    def step(self) -> object:
        """Take a step, and return when it has completed. This call is timed."""

    @abstractmethod
    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy arrays into the gradients of the next step."""

    @abstractmethod
    def params(self) -> list[Array]:
        """Return the current parameters."""

    def averages(self) -> list[Array]:
        """Return the averages of the parameters; [] without a training tail."""
        return []

    def held_bytes(self) -> int:
        """Return the bytes of parameters, gradients and state. Not all contenders count them."""
        raise NotImplementedError("counts no bytes")


# Makes an optimizer over existing parameters and gradients, and returns its step.
Beginning: TypeAlias = Callable[[], Callable[[], object]]


class Peer(Protocol):
    """An adapter module."""

    def versions(self) -> dict[str, str]:
        """Import the peer, and return the version of each package that it needs."""

    def limit(self, name: str, work: Work) -> str:
        """Return why a contender cannot run this work, or ""."""

    def make(self, names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
        """Make contenders. They may share arrays that they all write in the same way."""

    def beginning(self, work: Work, threads: int) -> Beginning:
        """Make parameters and gradients. Only peers whose first step is timed have this."""


def load(module: str) -> Peer:
    """Import an adapter module."""
    return cast("Peer", importlib.import_module(f"peers.{module}"))


def most_tensors(work: Work, most: int, why: str) -> str:
    """Return `why` as a reason if there are more than `most` tensors, else ""."""
    return f"more than {most:,} tensors: {why}" if len(work.sizes) > most else ""
