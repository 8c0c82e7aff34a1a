# SPDX-License-Identifier: MIT
"""An optimizer as plain data: for a checkpoint, and for pickles and copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusedadam._core import AdamProgress, AdamState
from fusedadam.arrays import Array, as_array
from fusedadam.locks import new_lock
from fusedadam.own_settings import checked_override, grouped

if TYPE_CHECKING:
    from fusedadam.optimizer import Optimizer


# ---- checkpoints


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Return what a checkpoint holds: config, progress, excluded, own, slots.

    The arrays are live: the optimizer's lock must be held while they are used.

    Raises
    ------
    ValueError
        The averages are swapped in, or parameters with settings of their own are still to be found.
    """
    state = optimizer._state
    state.require_not_swapped()
    if state.arrays_to_find:
        raise ValueError(
            "exclude_from_weight_decay(params) and override(params) must be followed by a step "
            "or by build(params), which find their positions, before save. "
            f"Received: {state.arrays_to_find} parameters still to be found"
        )
    excluded, overrides = state.find_own(())  # without what was taken back since the last step
    return {
        "config": optimizer._saved_config(),
        "progress": state.progress.as_dict(),
        "excluded": sorted(excluded),
        "own": _own(state, overrides),
        "slots": state.slots,
    }


def _own(state: AdamState, overrides: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What is not the same for all parameters, and not by `excluded`; by kind."""
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
    slots: Mapping[str, Iterable[Array]],
) -> Any:
    """Make an optimizer from what `snapshot` gave; `lr` replaces that of `config` unless None."""
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
    slots: Mapping[str, Iterable[Array]],
    own: Mapping[str, Any],
) -> None:
    """Moments for such parameters, with these values, and counts of their own where given."""
    state, positions = optimizer._state, range(len(like))
    steps = own.get("steps", [state.iterations for _ in positions])
    waiting = own.get("waiting", positions) if state.progress.accumulated else ()
    state.restore(like, optimizer._options, steps, list(waiting))
    for kind, arrays in state.slots.items():
        for array, value in zip(arrays, slots[kind], strict=True):
            array[...] = value


# ---- pickles and copies


def pickled(optimizer: Optimizer) -> dict[str, Any]:
    """Return the attributes of an optimizer, its state in plain ones."""
    with optimizer._lock:
        state = optimizer._state
        state.require_not_swapped()
        attributes = optimizer.__dict__.copy()
        del attributes["_lock"]
        # Copies, also where the caller copies shallowly: two optimizers never share moments.
        slots = {kind: [a.copy() for a in arrays] for kind, arrays in state.slots.items()}
        attributes["_state"] = slots if state.is_built else None
        attributes["_counts"] = {"steps": state.steps, "waiting": state.waiting}
        attributes["_progress"] = state.progress
        attributes["_own"] = state.own
        attributes["_to_find"] = state.pending
        attributes["_structure"] = state.structure
        return attributes


def unpickled(optimizer: Optimizer, attributes: dict[str, Any]) -> None:
    """Set the attributes of an optimizer from what `pickled` gave."""
    slots, counts, *state = map(
        attributes.pop, ("_state", "_counts", "_progress", "_own", "_to_find", "_structure")
    )
    optimizer.__dict__.update(attributes)
    optimizer._lock = new_lock()
    optimizer._state = AdamState(as_array, *state)
    if slots is not None:
        _restore_moments(optimizer, slots["m"], slots, counts)
        optimizer._state.forget_params()
