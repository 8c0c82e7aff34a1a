# SPDX-License-Identifier: MIT
"""Trees of parameters: flattened in one order, and every error names a path."""

from __future__ import annotations

import collections
import re
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from fusedadam.structures import flatten, flatten_like, named, paths, require_same
from helpers import Array


class Linear(NamedTuple):
    """A layer."""

    weight: Any
    bias: Any


class Other(NamedTuple):
    """A layer with other names."""

    weight: Any
    offset: Any


class Vector(np.ndarray):
    """A user's subclass of ndarray."""


def a(number: float) -> Array:
    return np.full(2, number)


class Dict(dict):  # type: ignore[type-arg]
    """A user's subclass of dict."""


# A tree of a(0), a(1), ..., and their paths.
TREES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "array": (lambda: a(0), ["params"]),
    "subclass": (lambda: a(0).view(Vector), ["params"]),
    "list": (lambda: [a(0), a(1)], ["params[0]", "params[1]"]),
    "tuple": (lambda: (a(0),), ["params[0]"]),
    "namedtuple": (lambda: Linear(a(0), a(1)), ["params.weight", "params.bias"]),
    "dict": (lambda: {"w": a(0), "b": a(1)}, ["params['w']", "params['b']"]),
    "OrderedDict": (
        lambda: collections.OrderedDict(w=a(0), b=a(1)),
        ["params['w']", "params['b']"],
    ),
    "defaultdict": (lambda: collections.defaultdict(list, {3: a(0)}), ["params[3]"]),
    "subclass of dict": (lambda: Dict({("a", 1): a(0)}), ["params[('a', 1)]"]),
    "nested": (
        lambda: {
            "layer2": {"w": a(0), "b": a(1)},
            "layer1": [Linear([a(2), (a(3),)], a(4)), a(5)],
            "none": [],
            "last": a(6),
        },
        [
            "params['layer2']['w']",
            "params['layer2']['b']",
            "params['layer1'][0].weight[0]",
            "params['layer1'][0].weight[1][0]",
            "params['layer1'][0].bias",
            "params['layer1'][1]",
            "params['last']",
        ],
    ),
    "empty list": (list, []),
    "empty tuple": (tuple, []),
    "empty dict": (dict, []),
    "nothing but empty": (lambda: [[], {}, ((),)], []),
}
trees = pytest.mark.parametrize(("make", "expected"), TREES.values(), ids=TREES)


@trees
def test_arrays_in_order_and_their_paths(make: Callable[[], Any], expected: list[str]) -> None:
    tree = make()
    leaves, structure = flatten(tree, "params")
    assert [leaf[0] for leaf in leaves] == list(range(len(expected)))
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert paths(structure, "params") == expected
    # The same array objects, found by their paths.
    assert all(
        eval(path, {"params": tree}) is leaf for path, leaf in zip(expected, leaves, strict=True)
    )
    assert [id(g) for g in flatten_like(tree, structure, "grads")] == [id(p) for p in leaves]


@trees
def test_structures_of_equal_trees_are_equal(
    make: Callable[[], Any],
    expected: list[str],  # noqa: ARG001
) -> None:
    (_, one), (_, two) = flatten(make(), "params"), flatten(make(), "params")
    assert one == two
    assert hash(one) == hash(two)
    require_same(one, two, "params")


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [t], lambda t: [np.ones(2), {"a": t}]], ids=range(3)
)
def test_tensors_are_arrays(wrap: Callable[[Any], Any]) -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(3), torch.nn.Parameter(torch.ones(3))):
        assert flatten(wrap(tensor), "params")[0][-1] is tensor


@pytest.mark.parametrize(
    ("tree", "path", "received"),
    [
        (None, "params", "NoneType"),
        (3.0, "params", "float"),
        ("weights", "params", "str"),
        ({1.0}, "params", "set"),
        (iter([np.ones(2)]), "params", "list_iterator"),
        (types.MappingProxyType({}), "params", "mappingproxy"),
        ([np.ones(2), np.float64(3)], "params[1]", "float64"),
        ([np.ones(2), None], "params[1]", "NoneType"),
        ({"a": {"b": [np.ones(2), iter(())]}}, "params['a']['b'][1]", "tuple_iterator"),
        (Linear(np.ones(2), 1), "params.bias", "int"),
        ([object], "params[0]", "type"),
    ],
    ids=repr,
)
def test_what_holds_no_arrays_is_refused(tree: Any, path: str, received: str) -> None:
    message = (
        f"{path} must be a numpy.ndarray or a torch.Tensor, or a list, tuple or dict of them. "
        f"Received: {received}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        flatten(tree, "params")


@pytest.mark.parametrize(
    "make",
    [lambda x: [x], lambda x: {"a": x}, lambda x: (np.ones(1), x)],
    ids=["list", "dict", "tuple"],
)
def test_nesting_has_a_limit(make: Callable[[Any], Any]) -> None:
    tree: Any = np.ones(2)
    for _ in range(100):
        tree = make(tree)
    assert flatten(tree, "params")[0][-1] is not tree
    with pytest.raises(ValueError, match=r"^params.* must be nested at most 100 deep"):
        flatten(make(tree), "params")


def test_list_that_contains_itself() -> None:
    tree: list[Any] = [np.ones(2)]
    tree += [tree, tree]
    with pytest.raises(ValueError, match=r"no list can contain itself\. Received: list$"):
        flatten(tree, "params")
    # Gradients are only traversed as deep as the parameters are.
    grads = [tree[0], [tree[0], tree]]
    _, structure = flatten([np.ones(2), [np.ones(2), np.ones(2)]], "params")
    assert flatten_like(grads, structure, "grads")[2] is tree


# -- gradients --------------------------------------------------------------------------------


def params_and(make: Callable[[], Any]) -> Any:
    return flatten(make(), "params")[1]


def test_gradients_are_matched_by_key() -> None:
    structure = params_and(lambda: {"w": a(0), "b": a(1), "more": {"z": a(2), "y": a(3)}})
    grads = {"b": 1, "more": {"y": 3, "z": 2}, "w": 0}
    assert flatten_like(grads, structure, "grads") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "leaf", [None, 1.5, [1.0, 2.0], (1, 2), np.ones(2), {"any": "thing"}, "text"], ids=repr
)
@trees
def test_gradient_is_whatever_stands_where_a_parameter_does(
    make: Callable[[], Any], expected: list[str], leaf: Any
) -> None:
    def like(tree: Any) -> Any:
        if isinstance(tree, np.ndarray):
            return leaf
        if isinstance(tree, dict):
            return {key: like(value) for key, value in reversed(tree.items())}
        if hasattr(tree, "_fields"):
            return type(tree)(*map(like, tree))
        # Swaps lists and tuples.
        return list(map(like, tree)) if isinstance(tree, tuple) else tuple(map(like, tree))

    grads = flatten_like(like(make()), params_and(make), "grads")
    assert len(grads) == len(expected)
    assert all(grad is leaf for grad in grads)


def test_namedtuple_is_matched_by_position() -> None:
    structure = params_and(lambda: Linear(a(0), a(1)))
    assert flatten_like((0, 1), structure, "grads") == [0, 1]
    structure = params_and(lambda: [a(0), a(1)])
    assert flatten_like(Other(0, 1), structure, "grads") == [0, 1]


@pytest.mark.parametrize(
    ("make", "grads", "error", "message"),
    [
        (
            lambda: {"a": {"w": a(0), "b": a(1)}},
            {"a": {"w": 0}},
            ValueError,
            (
                "grads['a']['b'] is missing: grads['a'] must have the keys that the parameters have. "
                "Received: ['w']"
            ),
        ),
        (
            lambda: [{"w": a(0)}],
            [{"w": 0, "v": 1}],
            ValueError,
            (
                "grads[0]['v'] belongs to no parameter: grads[0] must have the keys that the "
                "parameters have, ['w']. Received: ['w', 'v']"
            ),
        ),
        (
            lambda: {"a": [a(0), a(1)]},
            {"a": [0]},
            ValueError,
            "grads['a'] must have as many elements as the parameters have, 2. Received: 1",
        ),
        (
            lambda: Linear(a(0), a(1)),
            Other(0, 1),
            ValueError,
            (
                "grads must have the fields that the parameters have, weight, bias. "
                "Received: weight, offset"
            ),
        ),
        (
            lambda: Linear(a(0), [a(1)]),
            (0, [1, 2]),
            ValueError,
            "grads.bias must have as many elements as the parameters have, 1. Received: 2",
        ),
        (
            lambda: {"a": a(0)},
            [0],
            TypeError,
            "grads must be a dict, as there is among the parameters. Received: list",
        ),
        (
            lambda: [[a(0)]],
            [np.ones(1)],
            TypeError,
            "grads[0] must be a list or tuple, as there is among the parameters. Received: ndarray",
        ),
        (
            lambda: [a(0)],
            iter(()),
            TypeError,
            "grads must be a list or tuple, as there is among the parameters. Received: tuple_iterator",
        ),
        (
            lambda: {"a": Linear(a(0), a(1))},
            {"a": None},
            TypeError,
            "grads['a'] must be a namedtuple, as there is among the parameters. Received: NoneType",
        ),
        (
            list,
            {},
            TypeError,
            "grads must be a list or tuple, as there is among the parameters. Received: dict",
        ),
    ],
    ids=range(10),
)
def test_gradients_of_another_structure(
    make: Callable[[], Any], grads: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        flatten_like(grads, params_and(make), "grads")


# -- the same structure at each step ----------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            {"w": a(0), "b": a(1)},
            {"b": a(1), "w": a(0)},
            (
                "params must be a dict of 'w', 'b' in this order, {}. Received: a dict of 'b', 'w' in "
                "this order"
            ),
        ),
        (
            {"x": [a(0), {"w": a(1)}]},
            {"x": [a(0), {"v": a(1)}]},
            (
                "params['x'][1] must be a dict of 'w' in this order, {}. Received: a dict of 'v' in "
                "this order"
            ),
        ),
        (
            [a(0), (a(1), a(2))],
            [a(0), [a(1)]],
            "params[1] must be a list or tuple of 2, {}. Received: a list or tuple of 1",
        ),
        ([a(0)], a(0), "params must be a list or tuple of 1, {}. Received: an array"),
        (
            Linear(a(0), a(1)),
            Linear(a(0), [a(1)]),
            "params.bias must be an array, {}. Received: a list or tuple of 1",
        ),
        (
            Linear(a(0), a(1)),
            Other(a(0), a(1)),
            (
                "params must be a namedtuple of 'weight', 'bias' in this order, {}. Received: a "
                "namedtuple of 'weight', 'offset' in this order"
            ),
        ),
    ],
    ids=range(6),
)
def test_parameters_of_another_structure(old: Any, new: Any, message: str) -> None:
    known, structure = flatten(old, "params")[1], flatten(new, "params")[1]
    assert structure != known
    remedy = (
        "as when the state was made; call build(params) for other parameters, whose moments start "
        "at zero"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(remedy))}$"):
        require_same(structure, known, "params")


def test_list_may_become_a_tuple() -> None:
    require_same(flatten([a(0)], "params")[1], flatten((a(0),), "params")[1], "params")


# -- errors of the core -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message", "expected"),
    [
        (
            {"layer1": {"w": a(0)}, "layer2": [a(1), Linear(a(2), a(3))]},
            "params[0] and params[3] must not share memory; grads[2]. Received: grads[1]",
            (
                "params['layer1']['w'] and params['layer2'][1].bias must not share memory; "
                "grads['layer2'][1].weight. Received: grads['layer2'][0]"
            ),
        ),
        (
            a(0),
            "params[0] must be writeable, grads[0].copy()",
            "params must be writeable, grads.copy()",
        ),
        ([a(0), a(1)], "params[1] must be", "params[1] must be"),
        (
            {"w": a(0)},
            "params[7], weights[0], grads_and_vars[0]",
            "params[7], weights[0], grads_and_vars[0]",
        ),
        ({"w": a(0)}, "no position", "no position"),
    ],
    ids=range(5),
)
def test_positions_become_paths(tree: Any, message: str, expected: str) -> None:
    assert named(message, flatten(tree, "params")[1]) == expected
