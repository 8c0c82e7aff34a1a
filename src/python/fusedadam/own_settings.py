# SPDX-License-Identifier: MIT
"""Settings that some parameters have of their own, and how these parameters are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from fusedadam.arrays import memory_of

_TAKES_BACK: Final = {
    "exclude_from_weight_decay": "exclude_from_weight_decay([])",
    "override": "override()",
}
_WITHOUT_DECAY: Final = {"weight_decay": None, "l2": 0.0}


class OwnSettings(NamedTuple):
    """What parameters have of their own, by position."""

    excluded: tuple[int, ...] = ()
    overrides: Mapping[int, Mapping[str, Any]] = MappingProxyType({})

    def groups(self) -> list[tuple[list[int], dict[str, Any]]]:
        """Positions that share settings, and these: for `State.override`."""
        by_position = {i: dict(own) for i, own in self.overrides.items()}
        for i in self.excluded:
            by_position[i] = _WITHOUT_DECAY | by_position.get(i, {})
        groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        for i, own in by_position.items():
            groups.setdefault(tuple(own.items()), []).append(i)
        return [(positions, dict(own)) for own, positions in groups.items()]


class Finder:
    """Finds the positions of arrays among parameters, by their identity or their memory."""

    def __init__(self, params: Sequence[Any]) -> None:
        self._by_identity = {id(param): i for i, param in enumerate(params)}
        self._by_memory = {memory_of(param): i for i, param in enumerate(params)}

    def __call__(self, arrays: Sequence[Any], method: str) -> set[int]:
        """Return the positions; an error names the method that the arrays were given to."""
        positions = set()
        for i, array in enumerate(arrays):
            position = self._by_identity.get(id(array))
            if position is None and memory_of(array) is not None:
                position = self._by_memory.get(memory_of(array))
            if position is None:
                raise ValueError(
                    f"{method}(params) must name parameters of the optimizer; "
                    f"{_TAKES_BACK[method]} takes it back. "
                    f"Received: params[{i}], of shape {tuple(array.shape)}, is none of them"
                )
            positions.add(position)
        return positions
