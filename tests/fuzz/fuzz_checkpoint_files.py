# SPDX-License-Identifier: MIT
"""Fuzzing of the checkpoint reader: valid files, their mutations, and the rules for any file.

Files with random bytes are rejected at the first missing brace. So mutations change the structure
of the file: the header, the JSON texts in the metadata, or the table of tensors. The length of the
header and the offsets are usually corrected afterwards.
"""

from __future__ import annotations

import copy

# Loading must import nothing, so modules that the reader imports late are imported here. It uses
# difflib to find the option that was meant.
import difflib  # noqa: F401
import itertools
import json
import math
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import fusedadam.checkpoint  # noqa: F401
import numpy as np
from fusedadam import Adam
from fusedadam.arrays import dtype_named
from fusedadam.snapshots import snapshot
from helpers import Array, assert_all_same_bits
from safetensors import safe_open

Mutate: TypeAlias = Callable[[bytes, random.Random], bytes]

_SHAPES: Final = [(3,), (2, 2), (), (0, 2)]
# The dtypes of the parameters for a file whose configuration names this setting. The first fits.
_DTYPES: Final = {
    b"low_bits": ("bfloat16", "bfloat16", "float32", "bfloat16"),
    b"moments": ("bfloat16", "float16", "float16", "float32"),
    b"": ("float32", "float64", "float64", "float32"),
}
_SIZES: Final = {"F32": 4, "F64": 8, "BF16": 2, "I16": 2, "I8": 1}

# Not a meaningful schedule, only an importable one.
SCHEDULE: Final = math.erf
_OPTIONS: Final[list[dict[str, Any]]] = [
    {},
    {"amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 2, "maximize": True},
    {"loss_scale": "dynamic", "gradient_accumulation_steps": 3, "clipnorm": 1.0},
    {"lr": SCHEDULE, "weight_decay": 0.01, "l2": 0.001, "skip_nonfinite": True},
    {"moments": "bfloat16", "amsgrad": True, "rounding": "nearest"},
    {"moments": "packed", "gradient_accumulation_steps": 3, "seed": 2**63 - 1},
    {"moments": "auto", "lr": SCHEDULE, "low_bits": "int16", "use_ema": True},
    {"low_bits": "int8", "loss_scale": "dynamic"},
]

_NUMBERS: Final = [
    *(0, 1, 2, 3, -1, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf),
    *(2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30),
]
_TEXTS: Final = [
    *("", "a", "m.0", "v.4", "low_bits.2", "F16", "F32", "F64", "BF16", "I8", "I16", "packed"),
    *("float32", "dynamic", "os:system", "\ud800", "\x00"),
]
_VALUES: Final[list[Any]] = [*_NUMBERS, *_TEXTS, None, True, False, [], {}, [[]], [0, 0], {"": 1}]


class Pairs(list[Any]):
    """A JSON object as a list of pairs, in which a name may occur twice."""


def parameters(content: bytes) -> list[Array]:
    """Parameters for a file with these bytes, or for its configuration as text."""
    dtypes = next(dtypes for name, dtypes in _DTYPES.items() if name in content)
    named = zip(_SHAPES, map(dtype_named, dtypes), strict=True)
    return [np.full(shape, 0.5, dtype) for shape, dtype in named]


def seeds(folder: Path) -> list[bytes]:
    """Valid files: before and after steps, with own settings and counts, without parameters."""
    found, path = [], folder / "seed"
    for options, steps in itertools.product(_OPTIONS, (0, 2, 4)):
        adam, params = Adam(**options), parameters(str(options).encode())
        adam.exclude_from_weight_decay(params[1:2])
        if steps == 4:
            adam.override(params[::2], lr=0.5, maximize=True)
        adam.build(params)
        for step in range(steps):
            grads: list[Any] = [np.ones_like(param) for param in params]
            if steps == 4 and step:
                grads[0] = None
            adam.apply_gradients(list(zip(grads, params, strict=True)))
        adam.save(path)
        found.append(path.read_bytes())
    Adam().save(path)
    return [*found, path.read_bytes()]


# -- mutations --------------------------------------------------------------------------------


def mutated(content: bytes, rng: random.Random, mutate_bytes: Mutate) -> bytes:
    """Mutate a file in one to three ways. `mutate_bytes` mutates bytes without known structure."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = _mutated_once(content, rng, mutate_bytes)
    return content


def blindly(content: bytes, rng: random.Random) -> bytes:
    """Change, remove or repeat some bytes."""
    at = rng.randrange(len(content) + 1)
    length = min(len(content) - at, rng.choice([1, 1, 2, 8, 64]))
    changes = [bytes([rng.randrange(256)]), b"", content[at : at + length] * 2]
    return content[:at] + rng.choice(changes) + content[at + length :]


def _mutated_once(content: bytes, rng: random.Random, mutate_bytes: Mutate) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    how = rng.random()
    if how < 0.05:
        return mutate_bytes(content, rng)
    if how < 0.15:
        return _file(mutate_bytes(text, rng), data)
    if how < 0.2:
        return _file(text, mutate_bytes(data, rng))
    try:
        header = json.loads(text, object_pairs_hook=Pairs)
        if not isinstance(header, Pairs) or not header:
            return mutate_bytes(content, rng)
        if how < 0.3:
            data = _with_moved_tensor(header, data, rng)
        elif how < 0.6:
            _change_metadata(header, rng, mutate_bytes)
        else:
            _change(header, rng)
            if how > 0.8:
                data = _with_right_offsets(header, data)
        return _file(_dumped(header).encode("utf-8", "surrogatepass"), data)
    except (ValueError, RecursionError):
        return _file(mutate_bytes(text, rng), data)


def _file(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _change_metadata(header: Pairs, rng: random.Random, mutate_bytes: Mutate) -> None:
    """Mutate one text of the metadata, mostly as JSON."""
    tables = [value for name, value in header if name == "__metadata__" and value]
    if not tables or not isinstance(tables[0], Pairs):
        _change(header, rng)
        return
    i = rng.randrange(len(tables[0]))
    name, text = tables[0][i]
    try:
        value = json.loads(text, object_pairs_hook=Pairs)
        holder = [value]
        _change(holder, rng)
        changed = _dumped(holder[0]) if holder else ""
    except (TypeError, ValueError, RecursionError):
        changed = mutate_bytes(str(text).encode("utf-8", "replace"), rng).decode("utf-8", "replace")
    tables[0][i] = (name, changed)


def _change(root: list[Any], rng: random.Random) -> None:
    """Change one place in decoded JSON: a value, a name, or how often an item occurs."""
    nodes = list(_nodes(root))
    node = rng.choice(nodes)
    if not node:
        node.append(("a", 1) if isinstance(node, Pairs) else 1)
        return
    i = rng.randrange(len(node))
    name, value = node[i] if isinstance(node, Pairs) else (None, node[i])
    other = rng.choice(nodes)
    change = rng.randrange(7)
    if change == 0:
        del node[i]
    elif change == 1:
        node.insert(rng.randrange(len(node) + 1), node[i])
    elif change == 2 and isinstance(node, Pairs):
        names = [pair[0] for some in nodes if isinstance(some, Pairs) for pair in some]
        node[i] = (rng.choice([*names, *_TEXTS, f"{name}0"]), value)
    else:
        if change == 3 and isinstance(value, (int, float)):
            value += rng.choice([1, -1, 4, -4, 8, 2**32, 0.5])
        elif change == 4 and other:
            taken = rng.choice(other)
            value = taken[1] if isinstance(other, Pairs) else taken
        else:
            value = rng.choice(_VALUES)
        value = copy.deepcopy(value)  # a copy, or an object could end up inside itself
        node[i] = (name, value) if isinstance(node, Pairs) else value


def _nodes(root: Any) -> Iterator[list[Any]]:
    """All lists and objects in this one, itself first."""
    if isinstance(root, list):
        yield root
        for value in root:
            yield from _nodes(value[1] if isinstance(root, Pairs) else value)


def _with_moved_tensor(header: Pairs, data: bytes, rng: random.Random) -> bytes:
    """Move one tensor, or its end and all later ones, and end the data at the last tensor.

    The table may then have a hole, or two tensors may share bytes, while everything else is valid.
    """
    tensors = [Pairs(value) for _, value in header if isinstance(value, Pairs)]
    offsets = [value for tensor in tensors for name, value in tensor if name == "data_offsets"]
    spans = [span for span in offsets if _is_span(span)]
    if not spans:
        return data
    begin, end = rng.choice(spans)
    by = rng.choice([4, -4, 8, -8, begin - end, end - begin, rng.choice(spans)[0] - begin])
    stretch = rng.random() < 0.5
    for span in spans:
        if stretch:
            span[:] = [n + by if n >= end and span[1] > begin else n for n in span]
        elif span == [begin, end]:
            span[:] = [begin + by, end + by]
    whole = max(0, min(10_000, max(end for _, end in spans)))
    return (data + bytes(whole))[:whole]


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)


def _with_right_offsets(header: Pairs, data: bytes) -> bytes:
    """Give the tensors consecutive bytes according to their shapes, and resize the data."""
    end = 0
    for _, value in header:
        described = dict(value) if isinstance(value, Pairs) else {}
        shape, size = described.get("shape"), _SIZES.get(str(described.get("dtype")))
        if size is None or not isinstance(shape, list):
            continue
        if all(isinstance(n, int) and 0 <= n < 1000 for n in shape):
            begin, end = end, end + size * math.prod(shape)
            described["data_offsets"] = [begin, end]
            value[:] = described.items()
    return (data + bytes(min(end, 10_000)))[: min(end, 10_000)]


def _dumped(value: Any) -> str:
    """Like `json.dumps`, for objects in which names may occur twice."""
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{_dumped(one)}" for name, one in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dumped, value)) + "]"
    return json.dumps(value)


# -- a file of any bytes is refused, or is what it claims to be ---------------------------------


def loads(path: Path, content: bytes) -> bool:
    """Check all rules for a file with these bytes, written to `path`. Return whether it loads."""
    path.write_bytes(content)
    # For about half of all files, and always for the same ones.
    lr = SCHEDULE if zlib.crc32(content) & 1 else None
    params = parameters(content)
    modules = set(sys.modules)
    try:
        adam = Adam.load(path, params, lr=lr)
    except ValueError as error:
        message = str(error)
        assert str(path) in message, message
        assert len(message) < 1000, message
        assert re.search(r"Received: .+\Z", message, re.DOTALL), message
        return False
    finally:
        assert not set(sys.modules) - modules, set(sys.modules) - modules
        assert all(np.all(param == 0.5) for param in params)
    _check_against_the_library(path, adam, ignored={} if lr is None else {"lr": None})
    # Saving what was loaded, loading and saving it again must give the same file.
    adam.save(path)
    saved = path.read_bytes()
    lr = SCHEDULE if adam.lr is SCHEDULE else None
    Adam.load(path, parameters(saved), lr=lr).save(path)
    assert path.read_bytes() == saved
    adam.apply_gradients([(np.ones_like(param), param) for param in params])
    return True


def _check_against_the_library(path: Path, adam: Adam, ignored: dict[str, None]) -> None:
    """The safetensors library and a reader of the JSON must find the same contents."""
    state = snapshot(adam)
    with safe_open(path, framework="numpy") as file:
        found = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # An optimizer without steps has no arrays in its file, so loading creates them.
    for kind, arrays in state["slots"].items() if tensors else ():
        # Not every parameter has low bits.
        there = {f"{kind}.{i}": array for i, array in enumerate(arrays) if array is not None}
        assert_all_same_bits([*there.values()], [tensors.pop(name) for name in there], kind)
    assert not tensors
    assert {**state["config"], **ignored} == {**json.loads(found["config"]), **ignored}
    assert_same_numbers(state["progress"], json.loads(found["progress"]))
    assert state["excluded"] == sorted(json.loads(found["excluded"]))
    assert (found["format"], found["optimizer"]) == ("fusedadam", "Adam")
    # A file of version 1 has no settings of its parameters, one of version 2 must, and one of 3 may.
    text = {"1": "{}", "3": found.get("own", "{}")}.get(found["version"]) or found["own"]
    own, overrides = json.loads(text), adam._state.own[1]
    named = {i: each for positions, each in own.get("overrides", ()) for i in positions}
    assert overrides.keys() == named.keys()
    for position, settings in overrides.items():
        assert_same_numbers(settings, named[position])
    if adam._state.is_built:
        count = len(adam._state.steps)
        assert adam._state.steps == own.get("steps", [adam.iterations] * count)
        if adam._state.progress.accumulated:
            assert adam._state.waiting == sorted(own.get("waiting", range(count)))


def assert_same_numbers(actual: dict[str, Any], written: dict[str, Any]) -> None:
    """Fail unless the values and their types are the same. A float may be written as an integer."""
    floats = {name: float(written[name]) for name, x in actual.items() if isinstance(x, float)}
    assert repr(sorted(actual.items())) == repr(sorted({**written, **floats}.items()))
