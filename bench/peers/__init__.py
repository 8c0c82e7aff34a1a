# SPDX-License-Identifier: MIT
"""The contenders: other implementations of Adam on a CPU, each behind the same few methods.

A module of this package adapts one peer and may hold several of its variants. It imports the peer
only when it is asked for a contender, so that every adapter can be read where no peer is installed.
`Peer` says what an adapter module has, `Contender` what it makes.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

# Contender -> module of this package. Those of one module share a process, and what they can.
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
# The same for the training tail: clip by the global norm, decay, step, average, zero.
TAIL_PEERS = {
    "fusedadam": "fusedadam_adam",
    "traffic twin": "fusedadam_adam",
    "torch": "torch_adam",
}

# The library behind the interfaces of frameworks. They are timed in a section of their own.
ADAPTERS = {
    "fusedadam.torch": "fusedadam_torch",
    "fusedadam.keras": "fusedadam_keras",
}

# Arrays of the size of the parameters that a step holds for a while, beside those that it has to have
# (measured). The others hold none.
TEMPORARIES = {
    "torch default": 2,
    "torch foreach": 1,
    "keras torch": 3,
    "keras tensorflow": 1,
    "optax": 3,
    "numpy": 3,
}

# What a contender computes. With a = sqrt(1 - beta_2**t) and b = 1 - beta_1**t, step t is
#   "hat":         param -= lr * a / b * m / (sqrt(v) + epsilon)       the paper, before section 2.1
#   "algorithm 1": param -= lr / b * m / (sqrt(v) / a + epsilon)       the paper, algorithm 1
#   "twin":        param += grad                                       memory traffic, and no Adam
Form: TypeAlias = Literal["hat", "algorithm 1", "twin"]


@dataclass(frozen=True)
class Hyper:
    """The settings that all contenders share."""

    lr: float = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Tail:
    """The settings of a training tail."""

    # Below the norm of all lists of gradients here, so that each step clips.
    clipnorm: float = 0.1
    weight_decay: float = 0.01
    ema_momentum: float = 0.99


@dataclass(frozen=True)
class Work:
    """What is to be stepped: the sizes of the tensors, their type, and how."""

    sizes: tuple[int, ...]
    dtype: str = "float32"
    hyper: Hyper = field(default_factory=Hyper)
    tail: Tail | None = None
    seed: int = 1

    def params(self) -> Iterator[Array]:
        """Yield what the parameters start from: normal numbers, a new array at a time."""
        return self._tiled(self._block(self.seed))

    def grads(self) -> Iterator[Array]:
        """Yield gradients: small, and normal numbers without their signs.

        The traffic twin adds the gradients to all that a step writes, and v must stay positive.
        """
        return self._tiled(np.abs(self._block(self.seed + 1)) * np.array(1e-3, self.dtype))

    def _block(self, seed: int) -> Array:
        # Repeated where more are needed: to draw 100 million numbers takes longer than to step them.
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


class Contender(ABC):
    """A way to step the tensors of a `Work`."""

    form: ClassVar[Form]
    # The type that its scalars pass through, where that is not the tensors' own.
    scalars: ClassVar[str | None] = None

    @abstractmethod
    def step(self) -> object:
        """Take a step, and return when it is done. This is what is timed."""

    @abstractmethod
    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy these into the gradients that the next step uses."""

    @abstractmethod
    def params(self) -> list[Array]:
        """Return the parameters, as they are now."""

    def averages(self) -> list[Array]:
        """Return the averages of the parameters, of a training tail."""
        return []


# Makes an optimizer, over parameters and gradients that are there, and returns its step.
Beginning: TypeAlias = Callable[[], Callable[[], object]]


class Peer(Protocol):
    """An adapter module."""

    def versions(self) -> dict[str, str]:
        """Import the peer; return the version of each package that it needs."""

    def limit(self, name: str, work: Work) -> str:
        """Return why a contender is not run on this work, or ""."""

    def make(self, names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
        """Set up contenders, which may share what they do not write differently."""

    def beginning(self, work: Work, threads: int) -> Beginning:
        """Set up what is there before an optimizer. Where the first step is measured."""


def load(module: str) -> Peer:
    """Return the adapter of this name."""
    return cast("Peer", importlib.import_module(f"peers.{module}"))


def most_tensors(work: Work, most: int, why: str) -> str:
    """Say why lists of more than `most` tensors are not run; "" where there are fewer."""
    return f"more than {most:,} tensors: {why}" if len(work.sizes) > most else ""
