# SPDX-License-Identifier: MIT
"""References and memory stay constant over many calls, and optimizers are freed."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import autograd.numpy as anp
import fusedadam
import numpy as np
import pytest
from calls import CALLS as KINDS_OF_CALLS
from calls import Scene
from fusedadam import Adam
from helpers import Array, misaligned, read_only
from leaks import CALLS, assert_flat, expect, resident_bytes

Call = Callable[[], object]


def arrays(count: int = 4) -> list[Array]:
    return [np.ones((3, 2), np.float32) for _ in range(count)]


P, G, M, V = arrays()
COMPLEX = G.astype(np.complex64)
PAIRS = [(G, P)]
SPARSE = np.array([1, 0, 1]), np.ones((3, 2), np.float32)


def trained(**options: Any) -> Adam:
    adam = Adam(**options)
    adam.apply_gradients(PAIRS)
    return adam


def _calls() -> dict[str, Call]:
    """The calls of `calls`, repeated on the same objects, and some that differ each time."""
    adam, mixed, sparse = trained(), trained(), trained()
    config = trained(amsgrad=True, use_ema=True, gradient_accumulation_steps=2).get_config()
    others, frozen = [arrays(1), arrays(1)], [(None, P), (G, V)]
    freezing = Adam()

    def rebinds() -> None:
        others.reverse()
        adam.apply_gradients([(G, others[0][0])])

    def freezes() -> None:
        frozen[0], frozen[1] = (frozen[1][0], P), (frozen[0][0], V)
        freezing.apply_gradients(frozen)

    def excludes() -> None:
        adam.exclude_from_weight_decay([P])
        adam.build([P])

    def overrides() -> None:
        mixed.override(P, lr=0.5, clipvalue=0.1)
        mixed.apply_gradients(PAIRS)
        mixed.override([P])
        mixed.apply_gradients(PAIRS)

    # Files are below. Overrides pile up until a step.
    others_do = ("save", "load", "load in place", "override")
    return {
        **{
            name: Scene(call).call for name, call in KINDS_OF_CALLS.items() if name not in others_do
        },
        "frozen in turn": freezes,
        "override and back": overrides,
        "cast rows": lambda: sparse.apply_sparse([1, 0, 1], SPARSE[1].astype(np.float16), P),
        "get_gradients, cast": lambda: mixed.get_gradients([[[1, 2]] * 3], [P]),
        "apply_gradients, lists": lambda: mixed.apply_gradients([[G, P]]),  # type: ignore[list-item]
        "other parameters": rebinds,
        "new": Adam,
        "new and stepped": lambda: Adam().apply_gradients(PAIRS),
        "build, excluded": excludes,
        "config": lambda: Adam.from_config(config),
    }


def _reads() -> dict[str, Call]:
    adam = trained(clipnorm=1.0, use_ema=True)
    weights = adam.get_weights()

    def sets_lr() -> None:
        adam.lr = 0.5

    return {
        "weights": lambda: adam.weights,
        "ema": lambda: adam.ema,
        "get_weights": adam.get_weights,
        "set_weights": lambda: adam.set_weights(weights),
        "get_gradients": lambda: adam.get_gradients([G], [P]),
        "global_norm": lambda: fusedadam.global_norm([G, P]),
        "lr": sets_lr,
        "repr": lambda: repr(adam),
        "get_config": adam.get_config,
        "threads": lambda: fusedadam.set_num_threads(fusedadam.get_num_threads()),
        "isa": lambda: fusedadam.set_isa(fusedadam.active_isa()),
    }


def _failures() -> dict[str, Call]:
    adam, swapped = trained(), trained(use_ema=True)
    swapped.swap_ema()
    tree = {"w": P, "b": [V]}
    nested = Adam()
    nested.step(tree, {"w": G, "b": [M]})
    masked = np.ma.array(G)
    big = np.ones(7, np.float32)

    def raises(_: Any) -> float:
        raise ArithmeticError

    def step(grad: Any, param: Any) -> Call:
        return lambda: adam.apply_gradients([(grad, param)])

    def first(param: Any) -> Call:
        return lambda: Adam().build([param])

    failures: dict[str, tuple[type[BaseException], Call]] = {
        "complex gradient": (TypeError, step(COMPLEX, P)),
        "gradient of objects": (TypeError, step(G.astype(object), P)),
        "masked gradient": (TypeError, step(masked, P)),
        "masked parameter": (TypeError, step(G, masked)),
        "ragged gradient": (TypeError, step([[1.0], [1.0, 2.0]], P)),
        "wrong way round": (ValueError, step(P, G)),
        "path in an error": (ValueError, lambda: nested.step(tree, {"w": big, "b": [M]})),
        "nested otherwise": (ValueError, lambda: nested.step([P, V], [G, M])),
        "gradients nested otherwise": (ValueError, lambda: nested.step(tree, {"w": G})),
        "no tree": (TypeError, lambda: nested.step({"w": "x"}, {"w": G})),
        "minimize": (ArithmeticError, lambda: nested.minimize(raises, tree)),
        "override": (TypeError, lambda: adam.override([P], momentum=1.0)),
        "override, range": (ValueError, lambda: adam.override([P], beta_1=1.0)),
        "layout of weights": (ValueError, lambda: adam.set_weights([1, P, P], layout="keras")),
        "shape of a gradient": (ValueError, step(big, P)),
        "no gradient": (ValueError, step(None, P)),
        "no array": (TypeError, step("x", P)),
        "no pair": (TypeError, lambda: adam.apply_gradients([(G, P, P)])),  # type: ignore[list-item]
        "no list": (TypeError, lambda: adam.apply_gradients(3)),  # type: ignore[arg-type]
        "too many": (ValueError, lambda: adam.apply_gradients([(G, P), (V, M)])),
        "other parameter": (ValueError, step(big, big)),
        "too few gradients": (ValueError, lambda: adam.get_updates([], [P])),
        "loss that raises": (ArithmeticError, lambda: adam.get_updates(raises, [P])),
        "loss that is none": (TypeError, lambda: adam.get_updates(object(), [P])),
        "read-only parameter": (ValueError, first(read_only(P))),
        "misaligned parameter": (ValueError, first(misaligned(P))),
        "integer parameter": (TypeError, first(np.ones(3, np.int64))),
        "parameter that is not contiguous": (ValueError, first(np.ones((3, 4))[:, ::2])),
        "parameters that overlap": (ValueError, lambda: Adam().build([P, P])),
        "first step": (TypeError, lambda: Adam().apply_gradients([(COMPLEX, P)])),
        "index out of range": (
            ValueError,
            lambda: adam.apply_sparse(np.array([7, 0, 1]), SPARSE[1], P),
        ),
        "rows that do not fit": (
            ValueError,
            lambda: adam.apply_sparse(SPARSE[0], np.ones((1, 2), np.float32), P),
        ),
        "first sparse step": (
            ValueError,
            lambda: Adam().apply_sparse(np.array([7, 0, 1]), SPARSE[1], P),
        ),
        "hyper-parameter": (ValueError, lambda: Adam(beta_1=2.0)),
        "unknown option": (TypeError, lambda: Adam(momentum=1.0)),  # type: ignore[arg-type]
        "set attribute": (ValueError, lambda: setattr(adam, "lr", -1.0)),
        "structure": (ValueError, lambda: setattr(adam, "amsgrad", True)),
        "set_weights": (ValueError, lambda: adam.set_weights([1, P])),
        "swapped": (ValueError, lambda: swapped.apply_gradients(PAIRS)),
        "swap without averages": (ValueError, adam.swap_ema),
        "stateless": (ValueError, lambda: fusedadam.adam_step(P, G, M, M, step=1)),
        "step number": (ValueError, lambda: fusedadam.adam_step(P, G, M, V, step=0)),
        "norm": (TypeError, lambda: fusedadam.global_norm([np.ones(2, np.int8)])),
        "threads": (ValueError, lambda: fusedadam.set_num_threads(0)),
        "isa": (ValueError, lambda: fusedadam.set_isa("mmx")),
    }
    return {name: expect(*failure) for name, failure in failures.items()}


GROUPS: dict[str, Callable[[], dict[str, Call]]] = {
    "calls": _calls,
    "reads": _reads,
    "failures": _failures,
}
KINDS = [(group, name) for group, make in GROUPS.items() for name in make()]


@pytest.mark.parametrize(("group", "name"), KINDS, ids=map(": ".join, KINDS))
def test_nothing_stays(group: str, name: str) -> None:
    assert_flat(GROUPS[group]()[name], [P, G, M, V, PAIRS, *SPARSE])


def test_many_steps() -> None:
    adam = trained()
    calls = 50 * CALLS
    assert_flat(lambda: adam.apply_gradients(PAIRS), [P, G, PAIRS], calls)
    logging.getLogger(__name__).info(
        "%d steps, %d calls of each of %d kinds", calls, CALLS, len(KINDS)
    )


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # do not wait for the disk
    adam = trained(use_ema=True)
    path, cut = tmp_path / "state", tmp_path / "cut"
    adam.save(path)
    cut.write_bytes(path.read_bytes()[:-4])
    calls = max(400, CALLS // 10)
    assert_flat(lambda: adam.save(path), [P, G], calls)
    assert_flat(lambda: Adam.load(path, [P]), [P, G], calls)
    assert_flat(lambda: adam.load(path, [P]), [P, G], calls)
    for load in (Adam.load, adam.load):
        assert_flat(expect(ValueError, partial(load, cut, [P])), [P, G], calls)


LEAKS: dict[str, tuple[Callable[[list[Any]], object], int]] = {
    "reference": (lambda kept: ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept)), 500),
    "malloc": (lambda _: ctypes.CDLL(None).malloc(1), 500),
    "object": (lambda kept: kept.append(object()), 500),
    "page": (lambda kept: kept.append(mmap.mmap(-1, 1)), 1000),
    "file": (lambda kept: kept.append(Path(os.devnull).open("rb")), 60),  # noqa: SIM115
}


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc and /proc")
@pytest.mark.parametrize(("leak", "calls"), LEAKS.values(), ids=LEAKS)
def test_a_leak_is_found(leak: Callable[[list[Any]], object], calls: int) -> None:
    kept: list[Any] = []
    with pytest.raises(AssertionError):
        assert_flat(lambda: leak(kept), [kept], calls)
    for one in kept:
        if hasattr(one, "close"):
            one.close()


# ---- freed at once: gigabytes of moments cannot wait for the cycle collector


class Owner:
    """An object with a method that is a schedule."""

    def __init__(self) -> None:
        self.first = 1.0

    def rate(self, iterations: int) -> float:
        return self.first / (1 + iterations)


def _after_an_error() -> Adam:
    adam = trained()
    with pytest.raises(TypeError):
        adam.apply_gradients([(COMPLEX, P)])
    return adam


def _scheduled() -> Adam:
    adam = Adam(lr=Owner().rate)
    adam.apply_gradients(PAIRS)
    return adam


def _read() -> Adam:
    adam = trained(use_ema=True)
    _ = adam.weights, adam.ema, adam.get_config(), adam.learning_rate
    adam.get_updates(lambda p: anp.sum(p[0] ** 2), [P])
    return adam


@pytest.mark.parametrize("make", [trained, _after_an_error, _scheduled, _read])
def test_an_optimizer_is_freed_at_once(make: Callable[[], Adam]) -> None:
    make()
    gc.collect()
    gc.disable()
    try:
        adam = make()
        died = weakref.ref(adam)
        del adam
        assert died() is None
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_moments_is_given_back() -> None:
    param = np.ones(4 << 20, np.float32)
    moments = 2 * param.nbytes
    adam = Adam()
    adam.build([param])
    held = resident_bytes()
    del adam
    # All of the moments, except for what other threads of this process allocate meanwhile.
    assert held - resident_bytes() > 0.9 * moments
