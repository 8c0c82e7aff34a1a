# SPDX-License-Identifier: MIT
"""Every kind of call, for tests that interrupt it, refuse it memory, or count what it leaves."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import autograd.numpy as anp
import fusedadam
import numpy as np
from fusedadam import Adam
from helpers import Array, values
from interrupts import Case
from training import FEW, ShapesAndDtypes

TABLE: ShapesAndDtypes = [((8, 3), "float32")]


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Values that repeat in large arrays, where drawing them would take long."""
    return np.resize(values(rng, min(997, int(np.prod(shape))), dtype), shape)


class Call(NamedTuple):
    """A call of an optimizer with these options after some steps, and what follows it."""

    act: Callable[[Any], object]
    steps: int = 0
    options: Mapping[str, Any] = {}
    go_on: Callable[[Any], object] | None = None
    see: Callable[[Any], object] = lambda _: None
    shapes: ShapesAndDtypes = FEW
    # How many arrays it allocates: each is missing once where memory is short. None: not tested.
    least: int | None = None


class Scene(Case):
    """The objects of a call, the same each time."""

    def __init__(self, call: Call, shapes: ShapesAndDtypes | None = None) -> None:
        self._call = call
        rng = np.random.default_rng(5)
        shapes = call.shapes if shapes is None else shapes
        self.params, self.grads, self.next_grads = ([drawn(rng, *s) for s in shapes] for _ in "pgn")
        self.indices = np.resize(np.arange(len(self.params[0]), dtype=np.intp), len(self.grads[0]))
        self.indices[-1:] = 0  # named twice
        self.moments = [np.zeros_like(self.params[0]) for _ in "mv"]
        options = dict(call.options)
        excluded, own = options.pop("excluded", ()), options.pop("own", {})
        self.optimizer = Adam(**options)
        if excluded:
            self.optimizer.exclude_from_weight_decay([self.params[i] for i in excluded])
        for position, settings in own.items():
            self.optimizer.override([self.params[position]], **settings)
        for _ in range(call.steps):
            self.step()
        self.path = Path()
        if call.act in (save, load, load_in_place):
            folder = tempfile.mkdtemp() if call.act is save else tempfile.gettempdir()
            self.path = Path(folder) / "state"
            if not self.path.exists():
                self.optimizer.save(self.path)
            self.step()

    def call(self) -> object:
        return self._call.act(self)

    def go_on(self) -> object:
        if self._call.go_on is not None:
            self._call.go_on(self)
        pairs = list(zip(self.next_grads, self.params, strict=True))
        return self.optimizer.apply_gradients(pairs)

    def step(self) -> object:
        return self.optimizer.apply_gradients(list(zip(self.grads, self.params, strict=True)))

    def observe(self) -> object:
        # Accumulated gradients are left out. They show in what follows.
        optimizer = self.optimizer
        kept = [*self.params, *self.moments, *optimizer.weights, *optimizer.ema]
        contents = [hashlib.sha1(a.tobytes()).hexdigest() for a in kept]
        state = optimizer._state
        lr = None if callable(optimizer.lr) else optimizer.lr
        settings = lr, state.is_swapped, len(state.pending[1])
        return contents, settings, state.progress.as_dict(), self._call.see(self)


def nested(arrays: list[Any]) -> Any:
    return {"first": arrays[0], "rest": [*arrays[1:]]}


def frozen(s: Scene) -> object:
    grads = [None if i % 2 else g for i, g in enumerate(s.grads)]
    return s.optimizer.apply_gradients(list(zip(grads, s.params, strict=True)))


def minimize(s: Scene) -> object:
    return s.optimizer.minimize(
        lambda p: anp.sum(p["first"] ** 2) + sum(anp.sum(x) for x in p["rest"]), nested(s.params)
    )


def relaid(s: Scene) -> object:
    """Gradients of other dtypes; parameters in another layout, to which moments are converted."""
    s.params = [np.array(p, order="F") for p in s.params]
    return s.optimizer.apply_gradients(
        [(g.astype("float16"), p) for g, p in zip(s.grads, s.params, strict=True)]
    )


def with_grad(change: Callable[[Array], Array]) -> Call:
    """A step of a table with its gradient in another form, which is copied."""

    def act(s: Scene) -> object:
        return s.optimizer.apply_gradients([(change(s.grads[0]), s.params[0])])

    return Call(act, 1, shapes=TABLE, least=1)


def sparse(s: Scene, *, lazy: bool = True) -> object:
    return s.optimizer.apply_sparse(s.indices, s.grads[0], s.params[0], lazy=lazy)


def set_weights(s: Scene) -> object:
    """Take a state over from another dtype."""
    new = [np.array(7), *(np.full(w.shape, 0.5) for w in s.optimizer.weights[1:])]
    s.optimizer.set_weights(new)
    return None


def swap_back(s: Scene) -> object:
    if s.optimizer._state.is_swapped:
        s.optimizer.swap_ema()
    return None


def stateless(s: Scene) -> object:
    fusedadam.adam_step(s.params[0], s.grads[0], *s.moments, step=1, lr=0.1)
    return None


def save(s: Scene) -> object:
    s.optimizer.save(s.path)
    return None


def saved(s: Scene) -> object:
    save(s)
    # An interrupt can arrive before Python has the descriptor of a file that it has just opened.
    # That file is empty and stays until another process saves.
    left = [file for file in s.path.parent.iterdir() if file != s.path]
    assert len(left) <= 1
    assert all(file.stat().st_size == 0 for file in left)
    return None


def load(s: Scene) -> object:
    return Adam.load(s.path, s.params)


def reload(s: Scene) -> object:
    s.optimizer = Adam.load(s.path, s.params)
    return None


def load_in_place(s: Scene) -> object:
    return s.optimizer.load(s.path, s.params)


def updates(s: Scene) -> object:
    return s.optimizer.get_updates(s.grads, s.params)


def loss(s: Scene) -> object:
    return s.optimizer.get_updates(lambda p: sum(anp.sum(x**2) for x in p), s.params)


def step_nested(s: Scene) -> object:
    return s.optimizer.step(nested(s.params), nested(s.grads))


MANY = {"amsgrad": True, "use_ema": True, "clipnorm": 1.0, "loss_scale": "dynamic"}
MEANS = {"gradient_accumulation_steps": 2, "use_ema": True}
DECAY = {"weight_decay": 0.1, "excluded": [1]}
OWN = {"own": {1: {"lr": 0.5, "weight_decay": 0.1}}}
AVERAGES = {"use_ema": True}

CALLS: dict[str, Call] = {
    "first step": Call(Scene.step, least=2),
    "step": Call(Scene.step, 1, {"clipnorm": 1.0}, least=0),
    "first step, many options": Call(Scene.step, 0, MANY),
    "first step, most state": Call(Scene.step, 0, {"amsgrad": True} | MEANS, least=5),
    "step, many options": Call(Scene.step, 1, MANY),
    "step, accumulates": Call(Scene.step, 1, MEANS),
    "first step, excluded": Call(Scene.step, 0, DECAY),
    "step, excluded": Call(Scene.step, 1, DECAY),
    "step, schedule": Call(Scene.step, 1, {"lr": lambda iterations: 0.1 / (1 + iterations)}),
    "first step, frozen": Call(frozen, least=2),
    "frozen": Call(frozen, 1, least=0),
    "frozen while accumulating": Call(frozen, 1, {"gradient_accumulation_steps": 2}),
    "first nested step": Call(step_nested, 0, OWN),
    "nested step": Call(step_nested, 1, OWN | AVERAGES),
    "minimize": Call(minimize, 0, OWN, shapes=FEW[:2]),
    "override": Call(lambda s: s.optimizer.override(s.params[:2], lr=0.25, maximize=True), 1),
    "another layout": Call(relaid, 1, AVERAGES, least=4),
    "gradient that is copied": with_grad(np.asfortranarray),
    "gradient that is cast": with_grad(lambda g: g.astype("float64")),
    "first get_updates": Call(updates),
    "get_updates": Call(updates, 1, {"zero_grad": True}),
    "get_updates with a loss": Call(loss, shapes=FEW[:2]),
    "get_gradients": Call(
        lambda s: s.optimizer.get_gradients(s.grads, s.params), 1, {"clipnorm": 0.5}, least=1
    ),
    "get_weights": Call(lambda s: s.optimizer.get_weights(), 1, least=2),
    "first apply_sparse": Call(sparse, shapes=TABLE, least=3),
    "apply_sparse": Call(sparse, 1, AVERAGES, shapes=TABLE, least=1),
    "apply_sparse, excluded": Call(sparse, 0, DECAY | {"excluded": [0]}, shapes=TABLE),
    "apply_sparse, dense": Call(lambda s: sparse(s, lazy=False), 1, shapes=TABLE, least=1),
    "set_weights": Call(set_weights, 1, least=2),
    "first build": Call(lambda s: s.optimizer.build(s.params), least=2),
    "build": Call(lambda s: s.optimizer.build(s.params), 1),
    "build while accumulating": Call(
        lambda s: s.optimizer.build(s.params), 1, {"gradient_accumulation_steps": 3}
    ),
    "swap_ema": Call(lambda s: s.optimizer.swap_ema(), 2, AVERAGES, swap_back, least=0),
    "pickle": Call(lambda s: pickle.loads(pickle.dumps(s.optimizer)), 1, AVERAGES, least=2),
    "stateless": Call(stateless),
    "save": Call(save, 1, {}, saved, lambda s: s.path.read_bytes(), least=0),
    "load": Call(load, 1, {}, reload, least=2),
    "load in place": Call(load_in_place, 1, least=2),
}
