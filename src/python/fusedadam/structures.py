# SPDX-License-Identifier: MIT
"""Nested parameters: an array, or lists, tuples and dicts of arrays."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fusedadam.arrays import is_tensor, listed

# Far deeper than any model, and well below Python's recursion limit.
_DEEPEST = 100

_PLAIN = {np.ndarray}
_CONTAINERS = (list, tuple, dict)

# A name, then the kind and the key of each level; formatted only for an error message.
_Path: TypeAlias = tuple[Any, ...]


class Node(NamedTuple):
    """A list, tuple or dict: the keys of its children, and their structures."""

    kind: str
    keys: Sequence[Any]
    children: tuple[Structure, ...]


# None stands for an array. Hashable; equal if keys, nesting and the order of dicts are equal.
Structure: TypeAlias = Node | None

_LIST, _NAMED, _DICT = "list or tuple", "namedtuple", "dict"


def flatten(tree: Any, name: str) -> tuple[list[Any], Structure]:
    """Return the arrays of nested parameters, dicts in insertion order, and their structure.

    Error messages call the tree `name`.
    """
    if _are_arrays({type(tree)}):
        return [tree], None
    leaves: list[Any] = []
    return leaves, _flatten(tree, (name,), leaves)


def leaves_of(params: Any) -> tuple[list[Any], Structure]:
    """Flatten parameters; an iterable of them counts as a list."""
    if not isinstance(params, (*_CONTAINERS, np.ndarray)) and not is_tensor(params):
        params = listed(params, "params")
    return flatten(params, "params")


def _flatten(tree: Any, path: _Path, leaves: list[Any]) -> Node:
    keys: Sequence[Any]
    values: Sequence[Any]
    if isinstance(tree, dict):
        kind, keys, values = _DICT, tuple(tree), tuple(tree.values())
    elif isinstance(tree, (list, tuple)):
        fields = _fields(tree)
        kind, keys, values = (_NAMED, fields, tree) if fields else (_LIST, range(len(tree)), tree)
    else:
        raise TypeError(
            f"{_text(path)} must be a numpy.ndarray or a torch.Tensor, or a list, tuple or dict of "
            f"them. Received: {type(tree).__name__}"
        )
    if len(path) > 2 * _DEEPEST:
        raise ValueError(
            f"{_text(path)} must be nested at most {_DEEPEST} deep, and no list can contain "
            f"itself. Received: {type(tree).__name__}"
        )
    # The common case, without a loop over the values.
    if _are_arrays(set(map(type, values))):
        leaves.extend(values)
        return Node(kind, keys, (None,) * len(values))
    children: list[Structure] = []
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, _CONTAINERS) and _are_arrays({type(value)}):
            leaves.append(value)
            children.append(None)
        else:
            children.append(_flatten(value, (*path, kind, key), leaves))
    return Node(kind, keys, tuple(children))


def flatten_like(tree: Any, structure: Structure, name: str) -> list[Any]:
    """Return the gradients of nested parameters, in the order of the parameters.

    The gradients are nested like the parameters, but the order of dicts does not matter, and lists
    and tuples are interchangeable. Whatever stands in the place of an array is its gradient, even
    None or a list. Error messages call the tree `name`.
    """
    if structure is None:
        return [tree]
    leaves: list[Any] = []
    _flatten_like(tree, structure, (name,), leaves)
    return leaves


def _flatten_like(tree: Any, node: Node, path: _Path, leaves: list[Any]) -> None:
    values = _dict_values(tree, node, path) if node.kind == _DICT else _items(tree, node, path)
    if not any(node.children):
        leaves.extend(values)
        return
    for key, child, value in zip(node.keys, node.children, values, strict=True):
        if child is None:
            leaves.append(value)
        else:
            _flatten_like(value, child, (*path, node.kind, key), leaves)


def _dict_values(tree: Any, node: Node, path: _Path) -> list[Any]:
    _require_type(tree, dict, node, path)
    if tuple(tree) == node.keys:
        return list(tree.values())
    for key in node.keys:
        if key not in tree:
            raise ValueError(
                f"{_text((*path, _DICT, key))} is missing: {_text(path)} must have the keys that "
                f"the parameters have. Received: {list(tree)}"
            )
    for key in tree if len(tree) > len(node.keys) else ():
        if key not in node.keys:
            raise ValueError(
                f"{_text((*path, _DICT, key))} belongs to no parameter: {_text(path)} must have "
                f"the keys that the parameters have, {list(node.keys)}. Received: {list(tree)}"
            )
    return [tree[key] for key in node.keys]


def _items(tree: Any, node: Node, path: _Path) -> Sequence[Any]:
    _require_type(tree, (list, tuple), node, path)
    items: Sequence[Any] = tree
    fields = _fields(items)
    if fields and node.kind == _NAMED and fields != node.keys:
        raise ValueError(
            f"{_text(path)} must have the fields that the parameters have, {', '.join(node.keys)}. "
            f"Received: {', '.join(fields)}"
        )
    if len(items) != len(node.keys):
        raise ValueError(
            f"{_text(path)} must have as many elements as the parameters have, {len(node.keys)}. "
            f"Received: {len(items)}"
        )
    return items


def _require_type(tree: Any, types: Any, node: Node, path: _Path) -> None:
    if not isinstance(tree, types):
        raise TypeError(
            f"{_text(path)} must be a {node.kind}, as there is among the parameters. "
            f"Received: {type(tree).__name__}"
        )


def require_same(structure: Structure, known: Structure, name: str) -> None:
    """Raise, naming the first difference, unless parameters are nested as those of the state."""
    if structure != known:
        path, expected, received = _difference(structure, known, name)
        raise ValueError(
            f"{path} must be {expected}, as when the state was made; call build(params) for other "
            f"parameters, whose moments start at zero. Received: {received}"
        )


def _difference(new: Structure, old: Structure, path: str) -> tuple[str, str, str]:
    if new is None or old is None or (new.kind, new.keys) != (old.kind, old.keys):
        return path, _described(old), _described(new)
    key, a, b = next(
        (key, a, b)
        for key, a, b in zip(new.keys, new.children, old.children, strict=True)
        if a != b
    )
    return _difference(a, b, path + _step(new.kind, key))


def _described(structure: Structure) -> str:
    if structure is None:
        return "an array"
    if structure.kind == _LIST:
        return f"a list or tuple of {len(structure.keys)}"
    return f"a {structure.kind} of {', '.join(map(repr, structure.keys))} in this order"


def paths(structure: Structure, name: str) -> list[str]:
    """Return the path of each array: `params['layer1']['w']`, `params[0][1]`, `params.bias`."""
    if structure is None:
        return [name]
    return [
        path
        for key, child in zip(structure.keys, structure.children, strict=True)
        for path in paths(child, name + _step(structure.kind, key))
    ]


def named(message: str, structure: Structure) -> str:
    """Replace positions such as `params[3]` and `grads[3]` in a message by paths in the tree."""
    known: dict[str, list[str]] = {}

    def path(match: re.Match[str]) -> str:
        name, index = match[1], int(match[2])
        if name not in known:
            known[name] = paths(structure, name)
        return known[name][index] if index < len(known[name]) else match[0]

    return re.sub(r"\b(params|grads)\[(\d+)\]", path, message)


class Naming:
    """Context manager: TypeError and ValueError name arrays by their paths in the tree."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (TypeError, ValueError)):
            error.args = tuple(
                named(arg, self._structure) if isinstance(arg, str) else arg for arg in error.args
            )


def rebuilt(tree: Any, arrays: Iterator[Any]) -> Any:
    """Return the same nesting of other arrays, which are in the order of `flatten`."""
    if isinstance(tree, dict):
        items = {key: rebuilt(value, arrays) for key, value in tree.items()}
        if isinstance(tree, defaultdict):
            return type(tree)(tree.default_factory, items)
        return type(tree)(items)
    if isinstance(tree, (list, tuple)):
        values = [rebuilt(value, arrays) for value in tree]
        return type(tree)(*values) if _fields(tree) else type(tree)(values)
    return next(arrays)


def _fields(tree: object) -> tuple[str, ...]:
    return getattr(tree, "_fields", ()) if isinstance(tree, tuple) else ()


def _step(kind: str, key: Any) -> str:
    return f".{key}" if kind == _NAMED else f"[{key!r}]"


def _text(path: _Path) -> str:
    return "".join([path[0], *map(_step, path[1::2], path[2::2])])


def _are_arrays(types: set[type]) -> bool:
    """Whether all of these are types of arrays or tensors; does not import torch."""
    if types <= _PLAIN:
        return True
    torch = sys.modules.get("torch")
    leaf = (np.ndarray,) if torch is None else (np.ndarray, torch.Tensor)
    return all(issubclass(kind, leaf) for kind in types)
