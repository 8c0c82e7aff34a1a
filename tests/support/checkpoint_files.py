# SPDX-License-Identifier: MIT
"""Checkpoints that are edited by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from helpers import Array
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

# Changes the file at a path.
Edit: TypeAlias = Callable[[Path], object]


def names_beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


def metadata(**parts: str | None) -> Edit:
    """Set parts of the metadata. None removes one."""

    def edit(path: Path) -> None:
        changed = {**metadata_of(path), **parts}
        save_file(load_file(path), path, {k: v for k, v in changed.items() if v is not None})

    return edit


def rejson(part: str, **changes: Any) -> Edit:
    """Change entries of a JSON part. `...` removes one."""

    def edit(path: Path) -> None:
        entries = json.loads(metadata_of(path)[part]) | changes
        entries = {k: v for k, v in entries.items() if v is not ...}
        metadata(**{part: json.dumps(entries)})(path)

    return edit


def own(text: str) -> Edit:
    """Give the file counts and settings of single parameters."""
    return metadata(version="2", own=text)


def every_tensor(change: Callable[[str, Array], tuple[str, Array] | None]) -> Edit:
    """Replace each tensor and its name by what `change` returns. None removes it."""

    def edit(path: Path) -> None:
        changed = [change(name, array) for name, array in load_file(path).items()]
        save_file(dict(pair for pair in changed if pair is not None), path, metadata_of(path))

    return edit


def tensor(name: str, array: Array | None) -> Edit:
    """Set or remove a tensor."""

    def edit(path: Path) -> None:
        tensors = {k: v for k, v in load_file(path).items() if k != name}
        added = {} if array is None else {name: array}
        save_file(tensors | added, path, metadata_of(path))

    return edit


def content(data: bytes) -> Edit:
    return lambda path: path.write_bytes(data)


def with_header(header: str, data: bytes = b"") -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


def entry(begin: int, end: int | str, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'
