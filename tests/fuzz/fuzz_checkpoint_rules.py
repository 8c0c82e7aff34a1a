# SPDX-License-Identifier: MIT
"""Rules for a checkpoint of any bytes: it is refused, or it is what it claims to be."""

from __future__ import annotations

# Loading must import nothing, so modules that the reader imports late are imported here. It uses
# difflib to find the option that was meant.
import difflib  # noqa: F401
import json
import re
import sys
import zlib
from pathlib import Path

import fusedadam.checkpoint  # noqa: F401
import numpy as np
from fusedadam import Adam
from fusedadam.snapshots import snapshot
from fuzz_checkpoint_files import SCHEDULE, parameters
from helpers import assert_all_same_bits
from safetensors import safe_open


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
    _check_against_the_library(path, adam, replaced=set() if lr is None else {"lr"})
    _check_that_it_is_kept(path, adam)
    grads = [np.ones_like(param) for param in params]
    adam.apply_gradients(list(zip(grads, params, strict=True)))
    return True


def _check_against_the_library(path: Path, adam: Adam, replaced: set[str]) -> None:
    """The safetensors library and a reader of the JSON must find the same contents."""
    state = snapshot(adam)
    with safe_open(path, framework="numpy") as file:
        found = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for kind, arrays in state["slots"].items():
        # An optimizer without steps has no arrays in its file, so loading creates them.
        if tensors:
            # Not every parameter has low bits.
            there = {f"{kind}.{i}": array for i, array in enumerate(arrays) if array is not None}
            assert_all_same_bits([*there.values()], [tensors.pop(name) for name in there], kind)
    assert not tensors
    config = json.loads(found["config"])
    assert {**state["config"], **dict.fromkeys(replaced)} == {**config, **dict.fromkeys(replaced)}
    # The loss scale, a float64, may be written as an integer.
    counts = json.loads(found["progress"])
    assert state["progress"] == {
        name: type(state["progress"].get(name, 0))(count) for name, count in counts.items()
    }
    assert state["excluded"] == sorted(json.loads(found["excluded"]))
    assert (found["format"], found["optimizer"]) == ("fusedadam", "Adam")
    _check_what_parameters_have_of_their_own(adam, found)


def _check_what_parameters_have_of_their_own(adam: Adam, found: dict[str, str]) -> None:
    # A file of version 1 has none, one of version 2 must have them, and one of version 3 may.
    text = {"1": "{}", "3": found.get("own", "{}")}.get(found["version"]) or found["own"]
    own = json.loads(text)
    overrides = {
        position: settings
        for positions, settings in own.get("overrides", ())
        for position in positions
    }
    assert adam._state.own[1].keys() == overrides.keys()
    for position, settings in adam._state.own[1].items():
        # A float64 may be written as an integer.
        assert settings == {
            name: float(value) if isinstance(settings.get(name), float) else value
            for name, value in overrides[position].items()
        }
    if adam._state.is_built:
        count = len(adam._state.steps)
        assert adam._state.steps == own.get("steps", [adam.iterations] * count)
        if adam._state.progress.accumulated:
            assert adam._state.waiting == sorted(own.get("waiting", range(count)))


def _check_that_it_is_kept(path: Path, adam: Adam) -> None:
    """Save what was loaded. Loading and saving it again must give the same file."""
    adam.save(path)
    saved = path.read_bytes()
    lr = SCHEDULE if adam.lr is SCHEDULE else None
    Adam.load(path, parameters(saved), lr=lr).save(path)
    assert path.read_bytes() == saved
