# SPDX-License-Identifier: MIT
"""`step` and `minimize`: nested parameters, and the value of the loss."""

from __future__ import annotations

import collections
import copy
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from fusedadam import Adam
from fusedadam.structures import flatten
from helpers import Array, assert_all_same_bits, values
from training import Training

SHAPES_AND_DTYPES = [((2, 3), "float32"), ((5,), "float64"), ((), "float32"), ((0, 2), "float64")]


class Layer(NamedTuple):
    """Parameters of a layer."""

    weight: Any
    bias: Any


class Attributes(dict[str, Any]):
    """A dict whose entries are attributes, a common user class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


# For a flat list of four: the nesting, and the paths of the arrays in flat order.
NESTS: dict[str, tuple[Callable[[Sequence[Any]], Any], list[str]]] = {
    "list": (list, ["[0]", "[1]", "[2]", "[3]"]),
    "tuple": (tuple, ["[0]", "[1]", "[2]", "[3]"]),
    "dict": (
        lambda a: {"z": a[0], "y": a[1], "b": a[2], "a": a[3]},
        ["['z']", "['y']", "['b']", "['a']"],
    ),
    "dict of numbers": (
        lambda a: {9: a[0], 3: a[1], (1, 2): a[2], None: a[3]},
        ["[9]", "[3]", "[(1, 2)]", "[None]"],
    ),
    "defaultdict": (
        lambda a: collections.defaultdict(list, zip("wxyz", a, strict=True)),
        ["['w']", "['x']", "['y']", "['z']"],
    ),
    "dict of a user's class": (
        lambda a: Attributes(zip("wxyz", a, strict=True)),
        ["['w']", "['x']", "['y']", "['z']"],
    ),
    "OrderedDict": (
        lambda a: collections.OrderedDict(zip("wxyz", a, strict=True)),
        ["['w']", "['x']", "['y']", "['z']"],
    ),
    "layers": (
        lambda a: {"layer1": {"w": a[0], "b": a[1]}, "layer0": {"w": a[2], "b": a[3]}},
        ["['layer1']['w']", "['layer1']['b']", "['layer0']['w']", "['layer0']['b']"],
    ),
    "namedtuples": (
        lambda a: [Layer(a[0], a[1]), Layer(a[2], a[3])],
        ["[0].weight", "[0].bias", "[1].weight", "[1].bias"],
    ),
    "everything": (
        lambda a: {"x": [a[0], (a[1],)], "none": {}, "y": Layer([], {"p": (a[2], [a[3]])})},
        ["['x'][0]", "['x'][1][0]", "['y'].bias['p'][0]", "['y'].bias['p'][1][0]"],
    ),
}
nests = pytest.mark.parametrize(("nest", "paths"), NESTS.values(), ids=NESTS)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"clipnorm": 0.5, "weight_decay": 0.1, "amsgrad": True},
    {"gradient_accumulation_steps": 2, "use_ema": True, "zero_grad": True},
    {"loss_scale": "dynamic"},
]


class Nested(Training):
    """A training whose optimizer is called by `step`. The oracle sees the flat list."""

    def __init__(self, nest: Callable[[Sequence[Any]], Any], **options: Any) -> None:
        super().__init__(SHAPES_AND_DTYPES, **options)
        self.nest = nest

    def call(self, grads: Sequence[Array | None]) -> None:
        left = self.reference.step(grads)
        count = self.optimizer.step(self.nest(self.params), self.nest(grads))
        assert count == self.reference.iterations
        there = [(a, b) for a, b in zip(grads, left, strict=True) if a is not None]
        assert_all_same_bits([a for a, _ in there], [b for _, b in there], "grads after the call")
        self.check()


# -- step -------------------------------------------------------------------------------------


@nests
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_step_equals_oracle(
    nest: Callable[[Sequence[Any]], Any], paths: list[str], options: dict[str, Any]
) -> None:
    assert len(paths) == len(SHAPES_AND_DTYPES)
    Nested(nest, **options).step(5)


@nests
def test_step_is_apply_gradients(nest: Callable[[Sequence[Any]], Any], paths: list[str]) -> None:
    ours, theirs = Nested(nest), Training(SHAPES_AND_DTYPES)
    for present in ([0, 1, 2, 3], [1], [0, 3], [2]):
        grads = [g if i in present else None for i, g in enumerate(ours.grads())]
        ours.call(grads)
        theirs.call(grads)
        assert_all_same_bits(ours.params, theirs.params, str(paths))
    # Both ways of calling can alternate: they share one state.
    for training in (ours, theirs):
        training.optimizer.apply_gradients(
            list(zip(training.reference.params, training.params, strict=True))
        )
    assert_all_same_bits(ours.params, theirs.params)
    assert_all_same_bits(ours.optimizer.weights, theirs.optimizer.weights)


def test_step_of_a_bare_array(rng: np.random.Generator) -> None:
    ours, theirs = (Training([((3, 4), "float32")]) for _ in range(2))
    for _ in range(3):
        g = values(rng, (3, 4), "float32")
        assert ours.optimizer.step(ours.params[0], g) == ours.optimizer.iterations
        theirs.call([g])
        assert_all_same_bits(ours.params, theirs.params)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: dict(reversed(g.items())),
        lambda g: collections.OrderedDict(g),
        lambda g: g | {"w": g["w"].tolist()},
        lambda g: g | {"w": g["w"].astype("float64")},
        lambda g: g | {"pair": list(g["pair"])},
    ],
    ids=["other order", "OrderedDict", "lists of numbers", "float64", "list for a tuple"],
)
def test_gradients_nested_almost_alike(change: Callable[[Any], Any]) -> None:
    params, twin = (
        {"w": np.ones((2, 2), "float32"), "pair": (np.ones(3), np.ones(())), "b": np.ones(2)}
        for _ in range(2)
    )
    grads = {
        "w": np.full((2, 2), 0.5, "float32"),
        "pair": (np.full(3, -1.0), np.full((), 2.0)),
        "b": np.full(2, 3.0),
    }
    assert Adam().step(params, change(grads)) == 1
    Adam().step(twin, grads)
    assert_all_same_bits(flatten(params, "")[0], flatten(twin, "")[0])


@nests
def test_error_names_the_path(nest: Callable[[Sequence[Any]], Any], paths: list[str]) -> None:
    for fresh in (True, False):
        training = Nested(nest)
        if not fresh:
            training.step(2)
        for i, path in enumerate(paths):
            grads: list[Any] = training.grads()
            grads[i] = np.ones((7, 7))
            with pytest.raises(
                ValueError,
                match=f"^{re.escape(f'grads{path} must have the shape of params{path},')}",
            ):
                training.optimizer.step(nest(training.params), nest(grads))
            grads[i] = training.params[i] * 1j
            with pytest.raises(TypeError, match=f"^{re.escape(f'grads{path} must be of numbers')}"):
                training.optimizer.step(nest(training.params), nest(grads))
            params = list(training.params)
            params[i] = training.params[i].astype("int16")
            with pytest.raises(
                (TypeError, ValueError), match=f"^{re.escape(f'params{path} must ')}"
            ):
                training.optimizer.step(nest(params), nest(training.grads()))
            params[i] = 5  # type: ignore[call-overload]
            with pytest.raises(TypeError, match=f"^{re.escape(f'params{path} must be ')}"):
                training.optimizer.step(nest(params), nest(training.grads()))
        training.step(2)


def test_all_gradients_none_is_an_error() -> None:
    training = Nested(NESTS["layers"][0])
    training.step(1)
    with pytest.raises(ValueError, match=r"^grads must not all be None"):
        training.optimizer.step(training.nest(training.params), training.nest([None] * 4))
    training.step(2)


# -- the same nesting at each step ------------------------------------------------------------

PAIR = {"w": np.ones(3), "b": np.ones(3)}
OTHER_NESTS: dict[str, tuple[Any, str]] = {
    "another order": (
        {"b": np.ones(3), "w": np.ones(3)},
        "params must be a dict of 'w', 'b' in this order",
    ),
    "another name": (
        {"w": np.ones(3), "c": np.ones(3)},
        "params must be a dict of 'w', 'b' in this order",
    ),
    "a list": ([np.ones(3), np.ones(3)], "params must be a dict of 'w', 'b' in this order"),
    "deeper": ({"w": np.ones(3), "b": [np.ones(3)]}, "params['b'] must be an array"),
}


@pytest.mark.parametrize(("other", "said"), OTHER_NESTS.values(), ids=OTHER_NESTS)
@pytest.mark.parametrize("method", ["step", "minimize"])
@pytest.mark.parametrize("copier", [None, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_parameters_nested_otherwise_than_before(
    method: str, other: Any, said: str, copier: Any
) -> None:
    params = copy.deepcopy(PAIR)
    adam, twin = Adam(), Adam()
    for each in (adam, twin):
        each.step(copy.deepcopy(PAIR), PAIR)
    if copier is not None:
        adam = copier(adam)
    other = copy.deepcopy(other)
    kept = [a.copy() for a in flatten(other, "")[0]]
    call: Any = {
        "step": lambda: adam.step(other, other),
        "minimize": lambda: adam.minimize(
            lambda p: sum(anp.sum(a) for a in flatten_boxes(p)), other
        ),
    }[method]
    with pytest.raises(ValueError, match=f"^{re.escape(said)}.*build\\(params\\).*Received: "):
        call()
    assert_all_same_bits(flatten(other, "")[0], kept)
    assert_all_same_bits(adam.weights, twin.weights)
    adam.step(params, PAIR)
    adam.build(other)
    call()


def flatten_boxes(tree: Any) -> list[Any]:
    """The arrays of a tree, or autograd's boxes of them."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for each in tree for leaf in flatten_boxes(each)]
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


# -- minimize ---------------------------------------------------------------------------------

INPUTS = np.linspace(-1, 1, 12).reshape(4, 3)


def loss_of(leaves: Sequence[Any]) -> Any:
    w, b, scale, _ = leaves
    return anp.sum((anp.dot(INPUTS, w.T).sum() * scale - b) ** 2)


@nests
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_minimize_equals_oracle(
    nest: Callable[[Sequence[Any]], Any], paths: list[str], options: dict[str, Any]
) -> None:
    training = Nested(nest, **options)
    seen: list[str] = []

    def loss(tree: Any) -> Any:
        seen.append(str(nest(paths)) if keys_of(tree) == keys_of(nest(paths)) else str(tree))
        return loss_of(flatten_boxes(tree))

    for _ in range(4):
        at = [p.copy() for p in training.params]
        scale = training.optimizer.current_loss_scale
        grads = [
            np.asarray(g, p.dtype)
            for g, p in zip(
                autograd.grad(lambda a, scale=scale: scale * loss_of(a))(at), at, strict=True
            )
        ]
        training.reference.step(grads)
        returned = training.optimizer.minimize(loss, nest(training.params))
        assert type(returned) is float
        assert returned == float(loss_of(at))
        training.check()
    assert seen == [str(nest(paths))] * 4  # called once per step, with the same nesting


def keys_of(tree: Any) -> Any:
    """The nesting without the arrays."""
    if isinstance(tree, dict):
        return type(tree), {key: keys_of(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree), [keys_of(value) for value in tree]
    return None


def test_loss_may_use_what_a_users_dict_has() -> None:
    params: Any = Attributes(x=np.array([3.0, -4.0]))
    adam = Adam(lr=0.5)
    assert adam.minimize(lambda p: anp.sum(p.x**2), params) == 25.0
    np.testing.assert_allclose(params.x, [2.5, -3.5], rtol=1e-6)


def test_minimize_of_a_bare_array() -> None:
    x = np.array([3.0, -4.0])
    adam = Adam(lr=0.5)
    assert adam.minimize(lambda p: anp.sum(p**2), x) == 25.0
    np.testing.assert_allclose(x, [2.5, -3.5], rtol=1e-6)


@pytest.mark.parametrize("scale", [2.0**20, 3.0, 2.0**-100, "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_returned_loss_is_not_scaled(scale: Any, dtype: str) -> None:
    # Dividing the scaled loss would round it, or overflow in float32.
    params = {"x": np.array([0.1, 0.7], dtype)}
    expected = [float(np.sum(params["x"] ** 3) * dtype_number(dtype, 1e-30))]
    adam = Adam(loss_scale=scale)
    assert (
        adam.minimize(lambda p: anp.sum(p["x"] ** 3) * dtype_number(dtype, 1e-30), params)
        == expected[0]
    )


def dtype_number(dtype: str, value: float) -> Any:
    number: Any = np.dtype(dtype).type(value)
    return number


def test_loss_of_parameters_that_are_subclasses() -> None:
    class Bounded(np.ndarray[Any, Any]):
        constraint = staticmethod(lambda p: np.clip(p, -0.5, 0.5))

    params = {"x": np.ones(3).view(Bounded)}
    assert Adam(lr=0.01).minimize(lambda p: anp.sum(p["x"] ** 2), params) == 3.0
    np.testing.assert_array_equal(params["x"], 0.5)


BAD_LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "gradients": ([np.ones(3), np.ones(3)], TypeError, "^loss must be .*call step.*Received: list"),
    "a dict of gradients": (PAIR, TypeError, "^loss must be .*call step.*Received: dict"),
    "an array": (np.ones(3), TypeError, "^loss must be .*call step.*Received: ndarray"),
    "a number": (0.5, TypeError, "^loss must be .*call step.*Received: float"),
    "None": (None, TypeError, "^loss must be .*call step.*Received: NoneType"),
    "no scalar": (lambda p: p["w"] * 2.0, TypeError, "scalar"),
    "a wrong name": (lambda p: anp.sum(p["v"]), KeyError, "v"),
}


@pytest.mark.parametrize(("loss", "error", "said"), BAD_LOSSES.values(), ids=BAD_LOSSES)
@pytest.mark.parametrize("fresh", [True, False])
def test_loss_that_is_refused(loss: Any, error: type[Exception], said: str, fresh: bool) -> None:
    params, adam = copy.deepcopy(PAIR), Adam()
    if not fresh:
        adam.step(params, PAIR)
    kept = copy.deepcopy(params)
    with pytest.raises(error, match=f"(?s){said}"):
        adam.minimize(loss, params)
    assert_all_same_bits(list(params.values()), list(kept.values()))
    assert adam.iterations == (not fresh)
    assert adam.step(params, PAIR) == 2 - fresh


def test_parameter_that_cannot_be_stepped_is_named_by_minimize() -> None:
    params = {"layer": {"w": np.ones((4, 4))[:, ::2]}}
    with pytest.raises(ValueError, match=r"^params\['layer'\]\['w'\] must fill its memory"):
        Adam().minimize(lambda p: anp.sum(p["layer"]["w"]), params)


# -- other methods that take nested parameters ------------------------------------------------


@nests
@pytest.mark.parametrize("method", ["override", "exclude_from_weight_decay"])
def test_nested_parameters_are_found(
    nest: Callable[[Sequence[Any]], Any], paths: list[str], method: str
) -> None:
    options: dict[str, Any] = {"weight_decay": 0.5, "l2": 0.25}
    everything = range(len(paths))
    if method == "override":
        training = Nested(nest, **options)
        training.optimizer.override(nest(training.params), weight_decay=None, l2=0.0)
    else:
        training = Nested(nest, **options)
        training.optimizer.exclude_from_weight_decay(nest(training.params))
    twin = Training(SHAPES_AND_DTYPES, excluded=everything, **options)
    for _ in range(3):
        grads = training.grads()
        training.optimizer.step(nest(training.params), nest(grads))
        twin.call(grads)
        assert_all_same_bits(training.params, twin.params)


@nests
def test_build_of_nested_parameters(nest: Callable[[Sequence[Any]], Any], paths: list[str]) -> None:
    training = Nested(nest)
    training.optimizer.build(nest(training.params))
    assert len(training.optimizer.weights) == 1 + 2 * len(paths)
    for i, path in enumerate(paths):
        bad: list[Any] = list(training.params)
        bad[i] = training.params[i].astype("int64")
        with pytest.raises(
            TypeError, match=f"^{re.escape(f'params{path} must be float32')}.*dtype=int64$"
        ):
            training.optimizer.build(nest(bad))
    training.step(3)


# -- tensors ----------------------------------------------------------------------------------


@nests
def test_tensors(nest: Callable[[Sequence[Any]], Any], paths: list[str]) -> None:
    torch: Any = pytest.importorskip("torch", reason="what is said of tensors needs torch")
    training = Nested(nest)
    tensors = [torch.tensor(p, requires_grad=True) for p in training.params]
    for _ in range(3):
        grads = training.grads()
        versions = [t._version for t in tensors]
        training.optimizer.step(nest(tensors), nest([torch.tensor(g) for g in grads]))
        training.reference.step(grads)
        assert_all_same_bits([t.detach().numpy() for t in tensors], training.reference.params)
        assert all(t._version > old for t, old in zip(tensors, versions, strict=True))
    # If the loss is computed from tensors, it is a tensor.
    loss = sum((t.double() ** 2).sum() for t in tensors)
    expected = [np.asarray((2 * t.double()).detach(), t.detach().numpy().dtype) for t in tensors]
    training.reference.step(expected)
    assert training.optimizer.minimize(loss, nest(tensors)) == loss.item()
    assert_all_same_bits([t.detach().numpy() for t in tensors], training.reference.params)
    # If the loss does not depend on a parameter, the error names the parameter.
    loss = sum((t**2).sum() for t in tensors[:2] + tensors[3:])
    kept = [t.detach().numpy().copy() for t in tensors]
    with pytest.raises(
        ValueError, match=rf"(?s)None.*Received: {re.escape(f'grads{paths[2]}')}=None"
    ):
        training.optimizer.minimize(loss, nest(tensors))
    assert_all_same_bits([t.detach().numpy() for t in tensors], kept)


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


@pytest.mark.parametrize("scale", [2.0**20, 3.0])
def test_returned_loss_of_tensors_is_not_scaled(scale: float) -> None:
    torch: Any = pytest.importorskip("torch", reason="what is said of tensors needs torch")
    w = torch.tensor([0.1, 0.7], requires_grad=True)
    loss = (w**3).sum()
    ours = Adam(loss_scale=scale)
    assert ours.minimize(loss, w) == loss.item()
