# SPDX-License-Identifier: MIT
"""Checkpoints for tests: trainings that resume from one, and files edited by hand."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fusedadam import Adam
from fusedadam.snapshots import snapshot
from helpers import Array, assert_all_same_bits, values
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

SHAPES_AND_DTYPES = [((3, 5), "float32"), ((7,), "float64"), ((), "float32"), ((0, 2), "float64")]
# An importable function that serves as a schedule, from 0 up to 1.
SCHEDULE = math.erf
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "numbers": {
        "lr": 1 / 3,
        "beta_1": 0.1 + 0.2,
        "beta_2": 0.99,
        "epsilon": 5e-324,
        "decay": 0.05,
        "clipnorm": 3.0,
        "clipvalue": 0.5,
        "flush_denormals": False,
    },
    "amsgrad": {"amsgrad": True},
    "weight decay": {"weight_decay": 0.01, "l2": 0.001},
    "norm of each": {"clipnorm_per_tensor": 0.1},
    "averages": {"use_ema": True, "ema_momentum": 0.75},
    "averages taken over": {"use_ema": True, "ema_overwrite_frequency": 3},
    "constant scale": {"loss_scale": 2.0**-20},
    "dynamic scale": {"loss_scale": "dynamic"},
    "skips": {"skip_nonfinite": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "one at a time": {"gradient_accumulation_steps": 1},
    "zeroed": {"zero_grad": True},
    "maximize": {"maximize": True},
    "schedule": {"lr": SCHEDULE},
    "everything": {
        "lr": SCHEDULE,
        "decay": 0.01,
        "amsgrad": True,
        "weight_decay": 0.01,
        "l2": 0.001,
        "clipnorm": 2.0,
        "clipvalue": 0.5,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "loss_scale": "dynamic",
        "skip_nonfinite": True,
        "gradient_accumulation_steps": 4,
        "zero_grad": True,
        "maximize": True,
        "flush_denormals": False,
    },
}


class Training:
    """An optimizer and its parameters. The gradients depend only on the number of the call."""

    def __init__(self, **options: Any) -> None:
        rng = np.random.default_rng(7)
        self.params = [values(rng, *of) for of in SHAPES_AND_DTYPES]
        self.optimizer = Adam(**options)
        self.calls = 0

    def step(self, calls: int) -> None:
        for _ in range(calls):
            self.calls += 1
            rng = np.random.default_rng(self.calls)
            grads = [values(rng, *of) for of in SHAPES_AND_DTYPES]
            if self.calls in (4, 9) and self.skips:
                grads[0][1, 2] = np.inf
            self.optimizer.apply_gradients(list(zip(grads, self.params, strict=True)))

    @property
    def skips(self) -> bool:
        config = self.optimizer.get_config()
        return bool(config.get("skip_nonfinite")) or config.get("loss_scale") == "dynamic"

    def resumed(self, path: Path) -> Training:
        """Resume from a checkpoint, as far as the file and the parameters carry this training."""
        self.optimizer.save(path)
        other = copy.copy(self)
        other.params = [param.copy() for param in self.params]
        schedule = SCHEDULE if self.optimizer.lr is SCHEDULE else None
        other.optimizer = Adam.load(path, other.params, lr=schedule)
        return other

    def assert_same_as(self, other: Training) -> None:
        assert_all_same_bits(self.params, other.params, "params")
        assert_same_state(self.optimizer, other.optimizer)


def assert_same_state(actual: Adam, expected: Adam) -> None:
    ours, theirs = snapshot(actual), snapshot(expected)
    for part in ("config", "progress", "excluded", "own"):
        assert ours[part] == theirs[part]
    assert sorted(ours["slots"]) == sorted(theirs["slots"])
    for kind, arrays in theirs["slots"].items():
        assert_all_same_bits(ours["slots"][kind], arrays, kind)


def names_beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


class Edited:
    """The parts of a checkpoint, to be changed and written back."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="numpy") as file:
            self.metadata: dict[str, str] = file.metadata()
        self.tensors: dict[str, Array] = load_file(path)

    def write(self, path: Path) -> None:
        save_file(self.tensors, path, self.metadata)


def rejson(part: str, **changes: Any) -> Callable[[Edited], None]:
    """Change entries of a JSON part. `...` removes one."""

    def edit(file: Edited) -> None:
        entries = json.loads(file.metadata[part]) | changes
        file.metadata[part] = json.dumps({k: v for k, v in entries.items() if v is not ...})

    return edit


def metadata(name: str, value: str | None) -> Callable[[Edited], None]:
    def edit(file: Edited) -> None:
        if value is None:
            del file.metadata[name]
        else:
            file.metadata[name] = value

    return edit


def tensor(name: str, array: Array | None) -> Callable[[Edited], None]:
    def edit(file: Edited) -> None:
        if array is None:
            del file.tensors[name]
        else:
            file.tensors[name] = array

    return edit


def every_tensor(change: Callable[[str, Array], tuple[str, Array] | None]) -> Callable[..., None]:
    def edit(file: Edited) -> None:
        changed = [change(name, array) for name, array in file.tensors.items()]
        file.tensors = dict(pair for pair in changed if pair is not None)

    return edit


def edited(path: Path, edit: Callable[[Edited], None]) -> None:
    file = Edited(path)
    edit(file)
    file.write(path)


def with_header(header: str, data: bytes = b"") -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


def entry(begin: int, end: int | str, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'
