# SPDX-License-Identifier: MIT
"""An optimizer as plain data, for checkpoints, pickles and copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedadam._core import AdamProgress, AdamState
from fusedadam.arrays import Array, as_array, dtype_named
from fusedadam.locks import new_lock
from fusedadam.own_settings import checked_override, grouped
from fusedadam.schedules import saved_config

if TYPE_CHECKING:
    from fusedadam.optimizer import Optimizer


# ---- checkpoints


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Return the contents of a checkpoint: config, progress, excluded, own, slots.

    The arrays are live, so the caller must hold the optimizer's lock while it uses them.
    """
    state = optimizer._state
    state.require_not_swapped()
    if state.arrays_to_find:
        raise ValueError(
            "exclude_from_weight_decay(params) and override(params) need a step or build(params), "
            "which look up the parameters, before save. "
            f"Received: {state.arrays_to_find} parameters not looked up yet"
        )
    excluded, overrides = state.find_own(())  # applies removals since the last step
    return {
        "config": saved_config(optimizer.get_config),
        "progress": state.progress.as_dict(),
        "excluded": sorted(excluded),
        "own": _own(state, overrides),
        "slots": state.slots,
    }


def _own(state: AdamState, overrides: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return counts and settings that differ between parameters, other than `excluded`."""
    own: dict[str, Any] = {}
    steps, waiting = state.steps, state.waiting
    if any(count != state.iterations for count in steps):
        own["steps"] = steps
    if state.progress.accumulated and len(waiting) != len(steps):
        own["waiting"] = waiting
    if overrides:
        own["overrides"] = [[positions, settings] for positions, settings in grouped(overrides)]
    return own


def restored(
    cls: type[Optimizer],
    config: dict[str, Any],
    lr: Any,
    params: Sequence[Any],
    progress: dict[str, Any],
    excluded: Sequence[int],
    own: Mapping[str, Any],
    slots: Mapping[str, Iterable[Array | None]],
) -> Any:
    """Make an optimizer from the result of `snapshot`; an `lr` replaces that of `config`."""
    optimizer: Any = cls(**(config if lr is None else config | {"lr": lr}))
    counts = AdamProgress(progress)
    counts.require_valid_for(optimizer._options)
    overrides = {
        position: checked_override(optimizer._options, settings)
        for positions, settings in own.get("overrides", ())
        for position in positions
    }
    optimizer._state = AdamState(as_array, counts, (set(excluded), overrides))
    if slots:
        _restore_moments(optimizer, params, slots, own)
    return optimizer


def _restore_moments(
    optimizer: Optimizer,
    like: Sequence[Any],
    slots: Mapping[str, Iterable[Array | None]],
    own: Mapping[str, Any],
) -> None:
    """Allocate the moments of parameters such as `like`, and set them and the counts."""
    state, positions = optimizer._state, range(len(like))
    steps = own.get("steps", [state.iterations for _ in positions])
    waiting = own.get("waiting", positions) if state.progress.accumulated else ()
    state.restore(like, optimizer._options, steps, list(waiting))
    for kind, arrays in state.slots.items():
        for array, value in zip(arrays, slots[kind], strict=True):
            if array is None:
                continue
            if value is None or (value.shape, value.dtype) != (array.shape, array.dtype):
                raise ValueError(
                    f"{kind} must have the shape and dtype {array.shape}, {array.dtype}. "
                    f"Received: {value!r}"
                )
            array[...] = value


# ---- pickles and copies


def pickled(optimizer: Optimizer) -> dict[str, Any]:
    """Return the attributes of an optimizer, with its state as plain data."""
    with optimizer._lock:
        state = optimizer._state
        state.require_not_swapped()
        attributes = optimizer.__dict__.copy()
        del attributes["_lock"]
        # Copy the moments even for a shallow copy: two optimizers never share them.
        slots = {
            kind: [None if a is None else a.copy() for a in arrays]
            for kind, arrays in state.slots.items()
        }
        attributes["_state"] = slots if state.is_built else None
        attributes["_counts"] = {
            "steps": state.steps,
            "waiting": state.waiting,
            "dtypes": state.dtypes,
        }
        attributes["_progress"] = state.progress
        attributes["_own"] = state.own
        attributes["_to_find"] = state.pending
        attributes["_structure"] = state.structure
        return attributes


def unpickled(optimizer: Optimizer, attributes: dict[str, Any]) -> None:
    """Set the attributes of an optimizer from the result of `pickled`."""
    slots, counts, *state = map(
        attributes.pop, ("_state", "_counts", "_progress", "_own", "_to_find", "_structure")
    )
    optimizer.__dict__.update(attributes)
    optimizer._lock = new_lock()
    optimizer._state = AdamState(as_array, *state)
    if slots is not None:
        # Templates of the parameters, which have the shapes and layouts of their state. Pickles of
        # earlier versions have no dtypes: those of m.
        like = next(iter(slots.values()))
        dtypes = counts.get("dtypes", [array.dtype for array in like])
        like = [np.empty_like(a, dtype_named(name)) for a, name in zip(like, dtypes, strict=True)]
        _restore_moments(optimizer, like, slots, counts)
        optimizer._state.forget_params()
