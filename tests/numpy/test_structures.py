# SPDX-License-Identifier: MIT
"""Nested parameters: one order, every method takes them, every error names a path."""

from __future__ import annotations

import collections
import copy
import pickle
import re
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from forms import Tagged
from fusedadam import Adam
from fusedadam.structures import flatten, flatten_like, named, require_same
from helpers import Array, assert_all_same_bits
from training import FEW, Training


class Linear(NamedTuple):
    """Parameters of a layer."""

    weight: Any
    bias: Any


class Other(NamedTuple):
    """A layer with other names."""

    weight: Any
    offset: Any


class Attributes(dict[str, Any]):
    """A dict whose entries are attributes, a common user class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


# A nesting of a flat list, and the paths of its arrays.
Nest: TypeAlias = Callable[[Sequence[Any]], Any]


def by_name(kind: Callable[[Any], Any]) -> tuple[Nest, list[str]]:
    return lambda a: kind(zip("wxyz", a, strict=True)), ["['w']", "['x']", "['y']", "['z']"]


NESTS: dict[str, tuple[Nest, list[str]]] = {
    "list": (list, ["[0]", "[1]", "[2]", "[3]"]),
    "tuple": (tuple, ["[0]", "[1]", "[2]", "[3]"]),
    "dict": (lambda a: dict(zip("zyba", a, strict=True)), ["['z']", "['y']", "['b']", "['a']"]),
    "dict of numbers": (
        lambda a: {9: a[0], 3: a[1], (1, 2): a[2], None: a[3]},
        ["[9]", "[3]", "[(1, 2)]", "[None]"],
    ),
    "defaultdict": by_name(partial(collections.defaultdict, list)),
    "user's dict": by_name(Attributes),
    "OrderedDict": by_name(collections.OrderedDict),
    "layers": (
        lambda a: {"layer1": {"w": a[0], "b": a[1]}, "layer0": {"w": a[2], "b": a[3]}},
        ["['layer1']['w']", "['layer1']['b']", "['layer0']['w']", "['layer0']['b']"],
    ),
    "namedtuples": (
        lambda a: [Linear(a[0], a[1]), Linear(a[2], a[3])],
        ["[0].weight", "[0].bias", "[1].weight", "[1].bias"],
    ),
    "everything": (
        lambda a: {"x": [a[0], (a[1],)], "none": {}, "y": Linear([], {"p": (a[2], [a[3]])})},
        ["['x'][0]", "['x'][1][0]", "['y'].bias['p'][0]", "['y'].bias['p'][1][0]"],
    ),
}
nests = pytest.mark.parametrize(("nest", "where"), NESTS.values(), ids=NESTS)


# -- what holds parameters --------------------------------------------------------------------

A = np.ones(2)
W, V, WB, BW = {"w": A}, {"v": A}, {"w": A, "b": A}, {"b": A, "w": A}
LAYER = Linear(A, A)


@pytest.mark.parametrize(
    ("tree", "path", "received"),
    [
        (None, "", "NoneType"),
        ("weights", "", "str"),
        (types.MappingProxyType({}), "", "mappingproxy"),
        ([A, np.float64(3)], "[1]", "float64"),
        ({"a": {"b": [A, iter(())]}}, "['a']['b'][1]", "tuple_iterator"),
        (Linear(A, 1), ".bias", "int"),
        ([object], "[0]", "type"),
    ],
    ids=repr,
)
def test_what_holds_no_arrays_is_refused(tree: Any, path: str, received: str) -> None:
    message = (
        f"params{path} must be a numpy.ndarray or a torch.Tensor, or a list, tuple or dict of "
        f"them. Received: {received}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Adam().step(tree, tree)


def test_nesting_has_a_limit() -> None:
    tree: Any = np.ones(2)
    for _ in range(100):
        tree = [tree]
    assert Adam().step(tree, tree) == 1
    with pytest.raises(ValueError, match=r"^params.* must be nested at most 100 deep"):
        Adam().step([tree], [tree])


def test_list_that_contains_itself() -> None:
    tree: list[Any] = [np.ones(2)]
    tree += [tree, tree]
    with pytest.raises(ValueError, match=r"no list can contain itself\. Received: list$"):
        Adam().step(tree, tree)
    # Gradients are only traversed as deep as the parameters are.
    _, structure = flatten([A, [A, A]], "params")
    assert flatten_like([tree[0], [tree[0], tree]], structure, "grads")[2] is tree


# -- gradients --------------------------------------------------------------------------------


KEYS, NUMBER = "the keys that the parameters have", "as many elements as the parameters have"
KIND = "as there is among the parameters. Received:"
# Parameters, gradients, and what the message says after "grads".
MISFITS: list[tuple[Any, Any, str]] = [
    ({"a": WB}, {"a": W}, f"['a']['b'] is missing: grads['a'] must have {KEYS}. Received: ['w']"),
    (
        [W],
        [{"w": 0, "v": 1}],
        f"[0]['v'] belongs to no parameter: grads[0] must have {KEYS}, ['w']. Received: ['w', 'v']",
    ),
    ({"a": [A, A]}, {"a": [0]}, f"['a'] must have {NUMBER}, 2. Received: 1"),
    (Linear(A, [A]), (0, [1, 2]), f".bias must have {NUMBER}, 1. Received: 2"),
    (
        LAYER,
        Other(0, 1),
        " must have the fields that the parameters have, weight, bias. Received: weight, offset",
    ),
    (W, [0], f" must be a dict, {KIND} list"),
    ([[A]], [A], f"[0] must be a list or tuple, {KIND} ndarray"),
    ({"a": [A]}, {"a": iter(())}, f"['a'] must be a list or tuple, {KIND} tuple_iterator"),
    (LAYER, None, f" must be a namedtuple, {KIND} NoneType"),
    ([[]], [{}], f"[0] must be a list or tuple, {KIND} dict"),
]


@pytest.mark.parametrize(("params", "grads", "said"), MISFITS, ids=range(10))
def test_gradients_that_do_not_fit(params: Any, grads: Any, said: str) -> None:
    error = TypeError if KIND in said else ValueError
    with pytest.raises(error, match=f"^{re.escape(f'grads{said}')}$"):
        Adam().step(params, grads)


# -- the same structure at each step ----------------------------------------------------------


ORDER, ITEMS = "in this order", "a list or tuple of"
PAIRS: list[tuple[Any, Any, str, str, str]] = [
    (WB, BW, "", f"a dict of 'w', 'b' {ORDER}", f"a dict of 'b', 'w' {ORDER}"),
    ([A, [A, W]], [A, [A, V]], "[1][1]", f"a dict of 'w' {ORDER}", f"a dict of 'v' {ORDER}"),
    ({"x": (A, A)}, {"x": [A]}, "['x']", f"{ITEMS} 2", f"{ITEMS} 1"),
    ([A], A, "", f"{ITEMS} 1", "an array"),
    (LAYER, Linear(A, [A]), ".bias", "an array", f"{ITEMS} 1"),
    (LAYER, W, "", f"a namedtuple of 'weight', 'bias' {ORDER}", f"a dict of 'w' {ORDER}"),
]


@pytest.mark.parametrize(("old", "new", "path", "expected", "received"), PAIRS, ids=range(6))
def test_parameters_of_another_structure(
    old: Any, new: Any, path: str, expected: str, received: str
) -> None:
    known, structure = flatten(old, "params")[1], flatten(new, "params")[1]
    assert structure != known
    message = (
        f"params{path} must be {expected}, as when the state was made; call build(params) for "
        f"other parameters, whose moments start at zero. Received: {received}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_same(structure, known, "params")


PAIR = {"w": np.ones(3), "b": np.ones(3)}


@pytest.mark.parametrize("method", ["step", "minimize"])
@pytest.mark.parametrize("copier", [None, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_parameters_nested_otherwise_than_before(method: str, copier: Any) -> None:
    other, adam = {"b": np.ones(3), "w": np.ones(3)}, Adam()
    adam.step(copy.deepcopy(PAIR), PAIR)
    kept = adam.get_weights()
    adam = adam if copier is None else copier(adam)
    call: Any = {
        "step": lambda: adam.step(other, other),
        "minimize": lambda: adam.minimize(lambda p: sum(map(anp.sum, leaves_of(p))), other),
    }[method]
    said = r"^params must be a dict of 'w', 'b' in this order.*build\(params\).*Received: "
    with pytest.raises(ValueError, match=said):
        call()
    assert_all_same_bits([*leaves_of(other), *adam.weights], [*leaves_of(PAIR), *kept])
    adam.step(copy.deepcopy(PAIR), PAIR)
    adam.build(other)
    call()


def leaves_of(tree: Any) -> list[Any]:
    """The arrays of a tree, or autograd's boxes of them."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for each in tree for leaf in leaves_of(each)]
    return [tree]


def test_refused_first_step_does_not_settle_the_nesting() -> None:
    adam = Adam()
    with pytest.raises(ValueError, match="shape"):
        adam.step({"b": np.ones(3), "w": np.ones(3)}, {"b": np.ones(2), "w": np.ones(3)})
    assert adam.step(copy.deepcopy(PAIR), PAIR) == 1


def test_nesting_is_kept_apart_from_the_state(path: Path) -> None:
    adam, params = Adam(), copy.deepcopy(PAIR)
    adam.build(params)
    adam.save(path)
    for loaded in (adam, Adam.load(path, params), Adam.load(path, list(params.values()))):
        assert loaded.step(copy.deepcopy(params), PAIR) == 1


# -- errors of the core -----------------------------------------------------------------------


LAYERS = {"layer1": W, "layer2": [A, LAYER]}
POSITIONS: list[tuple[Any, str, str]] = [
    (LAYERS, "params[0], params[3].", "params['layer1']['w'], params['layer2'][1].bias."),
    (LAYERS, "grads[2]: grads[1]", "grads['layer2'][1].weight: grads['layer2'][0]"),
    (A, "params[0] must be, grads[0].copy()", "params must be, grads.copy()"),
    (W, "params[7], weights[0], grads_and_vars[0]", "params[7], weights[0], grads_and_vars[0]"),
]


@pytest.mark.parametrize(("tree", "message", "expected"), POSITIONS, ids=range(4))
def test_positions_become_paths(tree: Any, message: str, expected: str) -> None:
    assert named(message, flatten(tree, "params")[1]) == expected


class Nested(Training):
    """A training whose optimizer is called by `step`. The oracle sees the flat list."""

    def __init__(self, nest: Nest, **options: Any) -> None:
        super().__init__(FEW, **options)
        self.nest = nest

    def call(self, grads: Sequence[Array | None]) -> None:
        left = self.reference.step(grads)
        count = self.optimizer.step(self.nest(self.params), self.nest(grads))
        assert count == self.reference.iterations
        there = [g for g in grads if g is not None]
        assert_all_same_bits(there, [g for g in left if g is not None], "grads after the call")
        self.check()


# What replaces a parameter or a gradient, and the error.
FAULTS: list[tuple[str, Callable[[Array], Any], type[Exception], str]] = [
    ("grads", lambda _: np.ones((7, 7)), ValueError, "grads{0} must have the shape of params{0},"),
    ("grads", lambda p: p * 1j, TypeError, "grads{0} must be of numbers"),
    ("params", lambda p: p.astype("int64"), TypeError, "params{0} must be float32"),
    ("params", lambda _: 5, TypeError, "params{0} must be "),
]


@nests
@pytest.mark.parametrize("fresh", [True, False])
def test_error_names_the_path(nest: Nest, where: list[str], fresh: bool) -> None:
    training = Nested(nest)
    if not fresh:
        training.step()
    for i, path in enumerate(where):
        for of, changed, error, message in FAULTS:
            lists: dict[str, list[Any]] = {"params": [*training.params], "grads": training.grads()}
            lists[of][i] = changed(training.params[i])
            params, grads = nest(lists["params"]), nest(lists["grads"])
            calls: list[Any] = [partial(training.optimizer.step, params, grads)]
            if of == "params":
                calls.append(partial(training.optimizer.build, params))
            for call in calls:
                with pytest.raises(error, match=f"^{re.escape(message.format(path))}"):
                    call()
    training.step(2)


# -- step -------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"clipnorm": 0.5, "weight_decay": 0.1, "amsgrad": True},
    {"gradient_accumulation_steps": 2, "use_ema": True, "zero_grad": True},
    {"loss_scale": "dynamic"},
]
# Every nesting, and every set of options.
NESTED = [*((name, {}) for name in NESTS), *(("everything", each) for each in OPTIONS[1:])]
nested = pytest.mark.parametrize(("name", "options"), NESTED, ids=str)


@nested
def test_step_equals_oracle(name: str, options: dict[str, Any]) -> None:
    training = Nested(NESTS[name][0], **options)
    training.optimizer.build(training.nest(training.params))
    assert len(training.optimizer.weights) == 1 + len(FEW) * (3 if "amsgrad" in options else 2)
    training.step(2)
    for present in ([0, 1, 2, 3], [1], [0, 3], [2]):
        training.call([g if i in present else None for i, g in enumerate(training.grads())])
    # Both ways of calling can alternate: they share one state.
    Training.call(training, training.grads())
    training.step()
    with pytest.raises(ValueError, match=r"^grads must not all be None"):
        training.optimizer.step(training.nest(training.params), training.nest([None] * 4))
    training.step(2)


@pytest.mark.parametrize("kind", [np.ndarray, Tagged])
def test_step_of_a_bare_array(kind: Any) -> None:
    training = Training([((3, 4), "float32")])
    for _ in range(3):
        (g,) = training.grads()
        training.reference.step([g])
        training.optimizer.step(training.params[0].view(kind), g)
        training.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda g: dict(reversed(g.items())),
        lambda g: collections.OrderedDict(g),
        lambda g: g | {"w": g["w"].tolist()},
        lambda g: g | {"w": g["w"].astype("float64")},
        lambda g: g | {"pair": list(g["pair"])},
        lambda g: g | {"b": Other(*g["b"])},
    ],
    ids=["other order", "OrderedDict", "numbers", "float64", "list for fields", "fields for list"],
)
def test_gradients_nested_almost_alike(change: Callable[[Any], Any]) -> None:
    def nest(w: float, x: float, y: float, b: float) -> dict[str, Any]:
        pair = Linear(np.full(3, x), np.full((), y))
        return {"w": np.full((2, 2), w, "float32"), "pair": pair, "b": [np.full(2, b), np.ones(1)]}

    (params, twin), grads = (nest(1.0, 1.0, 1.0, 1.0) for _ in "12"), nest(0.5, -1.0, 2.0, 3.0)
    adam = Adam()
    assert adam.step(params, change(grads)) == 1
    Adam().step(twin, grads)
    assert_all_same_bits(leaves_of(params), leaves_of(twin))
    assert adam.step(params | {"b": tuple(params["b"])}, grads) == 2


@nests
@pytest.mark.parametrize("method", ["override", "exclude_from_weight_decay"])
def test_nested_parameters_are_found(nest: Nest, where: list[str], method: str) -> None:
    training = Nested(nest, weight_decay=0.5, l2=0.25)
    settings = {"weight_decay": None, "l2": 0.0} if method == "override" else {}
    getattr(training.optimizer, method)(nest(training.params), **settings)
    training.reference.excluded = set(range(len(where)))
    training.step(3)


# -- minimize ---------------------------------------------------------------------------------

INPUTS = np.linspace(-1, 1, 20).reshape(4, 5)


def loss_of(leaves: Sequence[Any]) -> Any:
    w, b, scale, _ = leaves
    return anp.sum((anp.dot(INPUTS, w.T).sum() * scale - b) ** 2)


def kinds_of(tree: Any) -> Any:
    """The nesting without the arrays."""
    if isinstance(tree, dict):
        return type(tree), {key: kinds_of(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree), [kinds_of(value) for value in tree]
    return None


@nested
def test_minimize_equals_oracle(name: str, options: dict[str, Any]) -> None:
    training = Nested(NESTS[name][0], **options)
    seen: list[Any] = []

    def loss(tree: Any) -> Any:
        seen.append(kinds_of(tree))
        return loss_of(leaves_of(tree))

    for _ in range(4):
        at = [p.copy() for p in training.params]
        scale = training.optimizer.current_loss_scale
        exact = autograd.grad(lambda a, scale=scale: scale * loss_of(a))(at)
        training.reference.step([np.asarray(g, p.dtype) for g, p in zip(exact, at, strict=True)])
        returned = training.optimizer.minimize(loss, training.nest(training.params))
        assert type(returned) is float
        assert returned == float(loss_of(at))
        training.check()
    # Called once per step, with the same nesting.
    assert seen == [kinds_of(training.nest(training.params))] * 4


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda x: x, lambda p: anp.sum(p**2)),
        (lambda x: Attributes(x=x), lambda p: anp.sum(p.x**2)),
    ],
    ids=["bare array", "attributes of a user's dict"],
)
def test_loss_is_called_with_what_the_user_has(make: Callable[[Any], Any], loss: Any) -> None:
    x = np.array([3.0, -4.0])
    assert Adam(lr=0.5).minimize(loss, make(x)) == 25.0
    np.testing.assert_allclose(x, [2.5, -3.5], rtol=1e-6)


@pytest.mark.parametrize("scale", [3.0, 2.0**-100])
def test_returned_loss_is_not_scaled(scale: float) -> None:
    # Dividing the scaled loss would round it, or overflow in float32.
    small, params = np.float32(1e-30), {"x": np.array([0.1, 0.7], "float32")}
    expected = float(np.sum(params["x"] ** 3) * small)
    adam = Adam(loss_scale=scale)
    assert adam.minimize(lambda p: anp.sum(p["x"] ** 3) * small, params) == expected


BAD_LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "gradients": ([np.ones(3), np.ones(3)], TypeError, "^loss must be .*call step.*Received: list"),
    "a dict of gradients": (PAIR, TypeError, "^loss must be .*call step.*Received: dict"),
    "None": (None, TypeError, "^loss must be .*call step.*Received: NoneType"),
    "no scalar": (lambda p: p["w"] * 2.0, TypeError, "scalar"),
    "a wrong name": (lambda p: anp.sum(p["v"]), KeyError, "v"),
}


@pytest.mark.parametrize(("loss", "error", "said"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_loss_that_is_refused(loss: Any, error: type[Exception], said: str) -> None:
    params, adam = copy.deepcopy(PAIR), Adam()
    with pytest.raises(error, match=f"(?s){said}"):
        adam.minimize(loss, params)
    assert_all_same_bits(leaves_of(params), leaves_of(PAIR))
    assert adam.step(params, PAIR) == 1


def test_parameter_that_cannot_be_stepped_is_named_by_minimize() -> None:
    params = {"layer": {"w": np.ones((4, 4))[:, ::2]}}
    with pytest.raises(ValueError, match=r"^params\['layer'\]\['w'\] must fill its memory"):
        Adam().minimize(lambda p: anp.sum(p["layer"]["w"]), params)


# -- tensors ----------------------------------------------------------------------------------


def test_tensors() -> None:
    nest, where = NESTS["everything"]
    torch: Any = pytest.importorskip("torch", reason="what is said of tensors needs torch")
    training = Nested(nest)
    tensors = [torch.tensor(p, requires_grad=True) for p in training.params]
    training.params = [t.detach().numpy() for t in tensors]  # share memory
    for _ in range(3):
        grads = training.grads()
        versions = [t._version for t in tensors]
        training.optimizer.step(nest(tensors), nest([torch.tensor(g) for g in grads]))
        training.reference.step(grads)
        training.check()
        assert all(t._version > old for t, old in zip(tensors, versions, strict=True))
    # If the loss is computed from tensors, it is a tensor.
    loss = sum((t.double() ** 2).sum() for t in tensors)
    exact = zip(tensors, training.params, strict=True)
    training.reference.step([np.asarray((2 * t.double()).detach(), p.dtype) for t, p in exact])
    assert training.optimizer.minimize(loss, nest(tensors)) == loss.item()
    training.check()
    # If the loss does not depend on a parameter, the error names the parameter.
    loss = sum((t**2).sum() for t in tensors[:2] + tensors[3:])
    message = rf"(?s)None.*Received: {re.escape(f'grads{where[2]}')}=None"
    with pytest.raises(ValueError, match=message):
        training.optimizer.minimize(loss, nest(tensors))
    training.check()


def test_loss_of_tensors_that_is_refused() -> None:
    torch: Any = pytest.importorskip("torch", reason="what is said of tensors needs torch")
    w, b = torch.ones(3, requires_grad=True), torch.ones(3)
    for loss, params, error, said in [
        (w * 2, {"w": w}, ValueError, "loss must be a scalar"),
        (w.sum(), {"w": w, "b": b}, ValueError, r"^params\['b'\] must require a gradient"),
        (w.sum(), {"w": w, "b": np.ones(3)}, TypeError, r"^params\['b'\] must be a torch.Tensor"),
        (lambda p: p["w"].sum(), {"w": w}, TypeError, r"^params\['w'\] must be a numpy.ndarray"),
    ]:
        with pytest.raises(error, match=said):
            Adam().minimize(loss, params)
    assert w.tolist() == [1, 1, 1]


def test_returned_loss_of_tensors_is_not_scaled() -> None:
    torch: Any = pytest.importorskip("torch", reason="what is said of tensors needs torch")
    w = torch.tensor([0.1, 0.7], requires_grad=True)
    loss = (w**3).sum()
    assert Adam(loss_scale=3.0).minimize(loss, w) == loss.item()
