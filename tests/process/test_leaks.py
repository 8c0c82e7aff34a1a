# SPDX-License-Identifier: MIT
"""References and memory stay constant over many calls, and optimizers are freed."""

from __future__ import annotations

import contextlib
import gc
import logging
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
from faults import FAULTS, DoesNotApplyError, Program
from fusedadam import Adam
from helpers import Array
from leaks import CALLS, assert_flat, expect, resident_bytes
from training import ShapesAndDtypes, Training

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
    adam, mixed, sparse, averages = trained(), trained(), trained(), trained(use_ema=True)
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
        "reads": lambda: (averages.weights, averages.ema, averages.get_config(), repr(averages)),
        "global_norm": lambda: fusedadam.global_norm([G, P]),
        "lr": lambda: setattr(adam, "lr", 0.5),
        "threads": lambda: fusedadam.set_num_threads(fusedadam.get_num_threads()),
        "isa": lambda: fusedadam.set_isa(fusedadam.active_isa()),
        "new": Adam,
        "new and stepped": lambda: Adam().apply_gradients(PAIRS),
        "build, excluded": excludes,
        "config": lambda: Adam.from_config(config),
    }


def _failures() -> dict[str, Call]:
    """Those that are not in the table of faults."""
    adam = trained()
    tree = {"w": P, "b": [V]}
    nested = Adam()
    nested.step(tree, {"w": G, "b": [M]})
    big = np.ones(7, np.float32)

    def raises(_: Any) -> float:
        raise ArithmeticError

    failures: dict[str, tuple[type[BaseException], Call]] = {
        "path in an error": (ValueError, lambda: nested.step(tree, {"w": big, "b": [M]})),
        "nested otherwise": (ValueError, lambda: nested.step([P, V], [G, M])),
        "gradients nested otherwise": (ValueError, lambda: nested.step(tree, {"w": G})),
        "no tree": (TypeError, lambda: nested.step({"w": "x"}, {"w": G})),
        "minimize": (ArithmeticError, lambda: nested.minimize(raises, tree)),
        "layout of weights": (ValueError, lambda: adam.set_weights([1, P, P], layout="keras")),
        "hyper-parameter": (ValueError, lambda: Adam(beta_1=2.0)),
        "unknown option": (TypeError, lambda: Adam(momentum=1.0)),  # type: ignore[arg-type]
        "set attribute": (ValueError, lambda: setattr(adam, "lr", -1.0)),
        "structure": (ValueError, lambda: setattr(adam, "amsgrad", True)),
        "norm": (TypeError, lambda: fusedadam.global_norm([np.ones(2, np.int8)])),
    }
    return {name: expect(*failure) for name, failure in failures.items()}


GROUPS: dict[str, Callable[[], dict[str, Call]]] = {
    "calls": _calls,
    "failures": _failures,
}
KINDS = [(group, name) for group, make in GROUPS.items() for name in make()]


@pytest.mark.parametrize(("group", "name"), KINDS, ids=map(": ".join, KINDS))
def test_nothing_stays(group: str, name: str) -> None:
    assert_flat(GROUPS[group]()[name], [P, G, M, V, PAIRS, *SPARSE])


@pytest.mark.parametrize("prefix", list(dict.fromkeys(name.split(":")[0] for name in FAULTS)))
def test_nothing_of_a_refused_call_stays(prefix: str, tmp_path: Path) -> None:
    """Each fault of the table, by one of its routes, in the first program that can have it."""
    several: ShapesAndDtypes = [((3,), "float64"), *[((4, 3), "float32")] * 3]
    trainings = [
        Training(several),
        Training(several, zero_grad=True, amsgrad=True, use_ema=True),
        Training(several, gradient_accumulation_steps=2),
        Training(several[1:2]),
        Training(several[1:2], zero_grad=True),
        Training(several[1:2], gradient_accumulation_steps=2),
        Training(several, use_ema=True),
    ]
    programs = [Program(t.optimizer, t.params, t.grads(), t.rng, tmp_path) for t in trainings]
    for training in trainings:
        training.step()
    trainings[-1].optimizer.swap_ema()
    calls, kept = [], [a for program in programs for a in (*program.params, *program.grads)]
    for name, fault in FAULTS.items():
        # A generator raises once.
        if name.split(":")[0] != prefix or name == "pairs: what raises":
            continue
        for program in programs:
            with contextlib.suppress(DoesNotApplyError):
                refused = fault.make(program, (fault.tested or fault.routes)[0])
                calls.append(expect(refused.errors, refused.call))
                kept += refused.kept
                break

    assert calls

    def all_of_them() -> None:
        for call in calls:
            call()

    assert_flat(all_of_them, kept)


def test_many_steps() -> None:
    adam = trained()
    calls = 50 * CALLS
    assert_flat(lambda: adam.apply_gradients(PAIRS), [P, G, PAIRS], calls)
    logging.getLogger(__name__).info("%d steps, %d calls of %d kinds", calls, CALLS, len(KINDS))


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


# ---- freed at once: gigabytes of moments cannot wait for the cycle collector


def _after_an_error() -> Adam:
    adam = trained()
    with pytest.raises(TypeError):
        adam.apply_gradients([(COMPLEX, P)])
    return adam


def _scheduled() -> Adam:
    class Owner:
        def rate(self, iterations: int) -> float:
            return 1.0 / (1 + iterations)

    return trained(lr=Owner().rate)


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
