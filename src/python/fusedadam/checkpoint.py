# SPDX-License-Identifier: MIT
"""Save and load the whole state of an optimizer; docs/checkpoints.md describes the format."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeGuard, TypeVar

import numpy as np

from fusedadam._core import AdamOptions, needed_state
from fusedadam.arrays import Array, as_array, listed, parameter_arrays
from fusedadam.atomic_file import replace_file
from fusedadam.snapshots import restored
from fusedadam.snapshots import snapshot as snapshot_of
from fusedadam.tensor_file import DTYPES, TensorFile, refused, strict_json

if TYPE_CHECKING:
    from fusedadam.optimizer import Optimizer

_FORMAT: Final = "fusedadam"
# Version 2 adds counts and settings of single parameters, version 3 state in 16 bits. A file has the
# lowest version that suffices.
_VERSIONS: Final = ("1", "2", "3")

# Limits on the parts of a header: the configuration and counts; the kinds of arrays (a class has 2
# to 5); the name, dtype and offsets of an array; the number and comma of a dimension.
_MAX_METADATA_BYTES: Final = 1_000_000
_MAX_KINDS: Final = 16
_MAX_ENTRY_BYTES: Final = 200
_MAX_DIMENSION_BYTES: Final = 21

_PARAM_DTYPES: Final = ("float32", "float64", "float16", "bfloat16")
_MAX_REASON: Final = 400
_MAX_COUNT: Final = 2**63 - 1

PathLike: TypeAlias = str | os.PathLike[str]

_Optimizer = TypeVar("_Optimizer", bound="Optimizer")


# ---- save


def save(optimizer: Optimizer, path: PathLike) -> None:
    """Write the whole state to `path`, atomically; refuse a state that `load` would refuse."""
    with optimizer._lock:
        _save(optimizer, path)


def _save(optimizer: Optimizer, path: PathLike) -> None:
    snapshot = snapshot_of(optimizer)
    for name, value in snapshot["config"].items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise TypeError(
                f"The configuration must consist of numbers, strings and None to be saved. "
                f"Received: {name}={reprlib.repr(value)}"
            )
    tensors = {
        f"{kind}.{i}": array
        for kind, arrays in snapshot["slots"].items()
        for i, array in enumerate(arrays)
        if array is not None
    }
    stored = any(array.itemsize < 4 for array in tensors.values())
    metadata = {
        "format": _FORMAT,
        "version": _VERSIONS[2 if stored else bool(snapshot["own"])],
        "optimizer": type(optimizer).__name__,
        "config": json.dumps(snapshot["config"], allow_nan=False),
        "progress": json.dumps(snapshot["progress"], allow_nan=False),
        "excluded": json.dumps(snapshot["excluded"]),
    }
    if snapshot["own"]:
        metadata["own"] = json.dumps(snapshot["own"], allow_nan=False)
    # Sort by item size, descending, so that every array in the file is aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header = _header(metadata, {name: tensors[name] for name in names})
    if len(header) > 8 + _longest_header(next(iter(snapshot["slots"].values()), [])):
        raise ValueError(
            f"The configuration must be of less than {_MAX_METADATA_BYTES} bytes to be saved. "
            f"Received: a header of {len(header)} bytes"
        )
    # The writer of safetensors 0.8 uses a temporary file with mode 0600, leaves it behind if it
    # is killed, and renames it without a flush to disk.
    # As bytes: buffers do not know bfloat16.
    arrays = (np.ascontiguousarray(tensors[name]).reshape(-1) for name in names)
    contents = (array.view(np.uint8).data for array in arrays)
    replace_file(os.fsdecode(path), itertools.chain([header], contents))


def _header(metadata: dict[str, str], tensors: dict[str, Array]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (offset, offset + array.nbytes),
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ---- load


def load(
    cls: type[_Optimizer],
    path: PathLike,
    params: Iterable[Any],
    lr: Any = None,
    schedule: Any = None,
) -> _Optimizer:
    """Return the saved optimizer for these parameters, which are not modified.

    `lr` replaces the saved one, and `schedule` replaces a saved schedule if `lr` is None.
    """
    path = os.fsdecode(path)
    params = listed(params, "params")
    arrays: Sequence[Array] = parameter_arrays(params)
    for i, array in enumerate(arrays):
        as_array(array, f"params[{i}]")  # refuses masked arrays
        if array.dtype.name not in _PARAM_DTYPES or not array.dtype.isnative:
            raise TypeError(
                f"params[{i}] must be float32, float64, float16 or bfloat16. "
                f"Received: dtype={array.dtype}"
            )
    if isinstance(lr, str):
        raise TypeError(f"lr must be a number or a callable. Received: {lr!r}")
    with TensorFile(path, _longest_header(arrays)) as file:
        config, progress, excluded, own = _read_metadata(path, file.metadata, cls.__name__)
        if isinstance(config.get("lr"), str):
            lr = schedule if lr is None else lr
            if not callable(lr):
                raise ValueError(  # noqa: TRY004 (the file needs it, whatever the type of lr)
                    "lr must be given as a callable where a schedule was saved, "
                    f"load(path, params, lr=schedule): {path!r} names "
                    f"{reprlib.repr(config['lr'])}, which is not imported. Received: lr={lr!r}"
                )
            config["lr"] = 0.0  # a placeholder: `lr` replaces it
        with _refusing(path):
            blank = cls.from_config(config)
            blank.build([])
            expected = snapshot_of(blank)
        # A missing setting would silently take its default.
        if expected["config"] != config:
            raise refused(path, "this file is damaged: 'config' is not what get_config returns")
        if expected["progress"].keys() != progress.keys():
            raise refused(path, "this file is damaged: 'progress' has more or fewer counts")
        if lr is not None:
            cls.from_config(config | {"lr": lr})
        slots = _slots(path, file, blank._options, arrays)
        if not slots and arrays and (progress.get("iterations") or progress.get("accumulated")):
            # Only an optimizer that has not been built has no arrays, and it has seen no gradients.
            raise _other_count(path, 0, len(arrays))
        if any(position >= len(arrays) for position in excluded):
            raise refused(path, "this file is damaged: an excluded parameter does not exist")
        if own != {} and not _is_own(own, len(arrays)):
            raise refused(
                path, "this file is damaged: 'own' has something else than settings and counts"
            )
        with _refusing(path):
            optimizer: _Optimizer = restored(
                cls, config, lr, params, progress, excluded, own, slots
            )
        return optimizer


def _longest_header(arrays: Sequence[Array]) -> int:
    dimensions = sum(array.ndim for array in arrays)
    entries = len(arrays) * _MAX_ENTRY_BYTES + dimensions * _MAX_DIMENSION_BYTES
    return _MAX_METADATA_BYTES + _MAX_KINDS * entries


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Re-raise errors as a ValueError that names the file."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        reason = str(error)
        if len(reason) > _MAX_REASON:  # it may quote a long text in the file
            reason = f"{reason[:_MAX_REASON]}..."
        if "Received: " not in reason:
            reason = f"{reason}. Received: {path!r}"
        raise ValueError(f"Cannot load {path!r}: {reason}") from error


def _read_metadata(
    path: str, metadata: dict[str, str], optimizer: str
) -> tuple[dict[str, Any], dict[str, Any], list[int], dict[str, Any]]:
    """Return config, progress, excluded and own; the last is not checked."""
    if metadata.get("format") != _FORMAT:
        raise refused(path, "this safetensors file is not a fusedadam checkpoint")
    version = metadata.get("version")
    if version not in _VERSIONS:
        raise refused(
            path,
            f"this file has format version {reprlib.repr(version)}, of a later release of "
            f"fusedadam; this one reads versions {', '.join(_VERSIONS)}",
        )
    if metadata.get("optimizer") != optimizer:
        raise refused(
            path,
            f"this file is of an optimizer {reprlib.repr(metadata.get('optimizer'))}, not of "
            f"{optimizer!r}",
        )
    config, progress, excluded = (
        _parsed(path, metadata, name) for name in ("config", "progress", "excluded")
    )
    if not isinstance(config, dict) or not all(map(_is_setting, config.values())):
        raise refused(path, "this file is damaged: 'config' has something else than settings")
    if not isinstance(progress, dict) or not all(map(_is_count, progress.values())):
        raise refused(path, "this file is damaged: 'progress' has something else than counts")
    if not _are_positions(excluded, math.inf):
        raise refused(path, "this file is damaged: 'excluded' is not a list of distinct positions")
    has_own = version == "2" or (version == "3" and "own" in metadata)
    own = _parsed(path, metadata, "own") if has_own else {}
    return config, progress, excluded, own


def _parsed(path: str, metadata: dict[str, str], name: str) -> Any:
    if name not in metadata:
        raise refused(path, f"this file is damaged: {name!r} is missing")
    try:
        return strict_json(metadata[name])
    except (ValueError, RecursionError) as error:
        raise refused(path, f"this file is damaged: in {name!r}, {error}") from error


def _is_own(own: object, params: int) -> bool:
    """Whether this can be the `own` of a snapshot for this number of parameters."""
    if not isinstance(own, dict) or not own.keys() <= {"steps", "waiting", "overrides"}:
        return False
    steps = own.get("steps", [0] * params)
    if not isinstance(steps, list) or len(steps) != params or not all(map(_is_position, steps)):
        return False
    overrides = own.get("overrides", [])
    if not isinstance(overrides, list) or not all(
        isinstance(entry, list)
        and [type(item) for item in entry] == [list, dict]
        and all(map(_is_setting, entry[1].values()))
        for entry in overrides
    ):
        return False
    with_settings = [position for positions, _ in overrides for position in positions]
    return all(_are_positions(each, params) for each in (own.get("waiting", []), with_settings))


def _are_positions(values: object, params: float) -> bool:
    return (
        isinstance(values, list)
        and all(_is_position(value) and value < params for value in values)
        and len(set(values)) == len(values)
    )


def _is_setting(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, str)) or _is_integer(value)


def _is_count(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and value >= 0
    return _is_position(value)


def _is_position(value: object) -> bool:
    return _is_integer(value) and value >= 0


def _is_integer(value: object) -> TypeGuard[int]:
    # bool is a subclass of int. JSON does not limit integers; the core does.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_COUNT


def _slots(
    path: str, file: TensorFile, options: AdamOptions, params: Sequence[Array]
) -> dict[str, Iterable[Array | None]]:
    """Return the arrays of each kind, checked against the parameters and read one at a time."""
    names = file.entries.keys()
    if not names:
        return {}
    needed = [needed_state(options, param.dtype.name) for param in params]
    every = needed_state(options, "float32")  # without low bits, which only some parameters have
    # Count the names instead of parsing their numbers, which may be huge.
    count = max((sum(name.startswith(f"{kind}.") for name in names) for kind in every), default=0)
    expected = {f"{kind}.{i}" for kind in every for i in range(count)}
    if count == len(params):
        expected |= {f"{kind}.{i}" for i, kinds in enumerate(needed) for kind in kinds}
    else:
        expected |= {name for name in names if name.startswith("low_bits.")}
    odd = names ^ expected
    if odd:
        name = min(odd)
        what = "should not be there" if name in names else "is missing"
        raise refused(path, f"this file is damaged: the tensor {reprlib.repr(name)} {what}")
    if count != len(params):
        raise _other_count(path, count, len(params))
    for i, param in enumerate(params):
        for kind, named in needed[i].items():
            name = f"{kind}.{i}"
            dtype, shape = file.entries[name][:2]
            if shape != param.shape:
                raise ValueError(
                    f"params[{i}] must have the shape of {name} in {path!r}, {shape}. "
                    f"Received: shape={param.shape}"
                )
            if dtype != DTYPES[named]:
                raise ValueError(
                    f"params[{i}] must have the dtype of {name} in {path!r}, {dtype}. "
                    f"Received: dtype={param.dtype}"
                )
    return {
        kind: _read(file, kind, [kind in kinds for kinds in needed])
        for kind in dict.fromkeys(kind for kinds in needed for kind in kinds)
    }


def _read(file: TensorFile, kind: str, has_kind: Sequence[bool]) -> Iterator[Array | None]:
    for i, has in enumerate(has_kind):
        yield file.read(f"{kind}.{i}") if has else None


def _other_count(path: str, saved: int, given: int) -> ValueError:
    return ValueError(
        f"params must be as many as were saved: {path!r} has the state of {saved}. "
        f"Received: {given}"
    )
