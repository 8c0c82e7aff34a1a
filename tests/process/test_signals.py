# SPDX-License-Identifier: MIT
"""Ctrl-C at any time: a call takes effect or does not, and the next call finds all in order."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import autograd.numpy as anp
import fusedadam
import fusedadam.checkpoint
import numpy as np
import pytest
from fresh_python import output_of
from fusedadam import Adam, locks
from helpers import values
from interrupts import Case, interrupt_everywhere
from training import FEW, Training

# The number of real signals for each kind of call.
INTERRUPTS = int(os.environ.get("FUSEDADAM_INTERRUPTS", "8"))


def contents(*arrays: Any) -> list[bytes]:
    return [a.tobytes() for a in arrays]


# ---- at every instant of a call


class Steps(Case):
    """One call of an optimizer after earlier ones."""

    def __init__(self, calls: int, **options: Any) -> None:
        self.training = Training(**options)
        self.optimizer = self.training.optimizer
        self.params = self.training.params
        for _ in range(calls):
            self.optimizer.apply_gradients(
                list(zip(self.training.grads(), self.params, strict=True))
            )
        self.grads = self.training.grads()
        self.next_grads = self.training.grads()

    def call(self) -> object:
        return self.optimizer.apply_gradients(list(zip(self.grads, self.params, strict=True)))

    def go_on(self) -> object:
        return self.optimizer.apply_gradients(list(zip(self.next_grads, self.params, strict=True)))

    def observe(self) -> object:
        # Accumulated gradients are left out. They show in what follows.
        optimizer = self.optimizer
        return (
            contents(*self.params, *optimizer.weights, *optimizer.ema),
            optimizer.skipped_steps,
            optimizer._state.is_swapped,
            optimizer._state.progress.as_dict(),
        )


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "use_ema": True, "clipnorm": 1.0, "loss_scale": "dynamic"},
        {"gradient_accumulation_steps": 2, "use_ema": True},
        {"weight_decay": 0.1, "excluded": [1]},
        {"lr": lambda iterations: 0.1 / (1 + iterations)},
    ],
    ids=["plain", "many options", "accumulates", "excluded", "schedule"],
)
def test_a_step_is_whole(calls: int, options: dict[str, Any]) -> None:
    assert interrupt_everywhere(lambda: Steps(calls, **options)) > 5


def test_whole_steps_are_those_of_the_oracle() -> None:
    # The reference for interrupted calls, above.
    training = Training()
    training.step(3)
    training.check()


class Updates(Steps):
    """A step through `get_updates`."""

    def call(self) -> object:
        return self.optimizer.get_updates(self.grads, self.params)


class Frozen(Steps):
    """A step that freezes some parameters."""

    def call(self) -> object:
        grads = [None if i % 2 else g for i, g in enumerate(self.grads)]
        return self.optimizer.apply_gradients(list(zip(grads, self.params, strict=True)))


class Nested(Steps):
    """A step of nested parameters, one of which has its own settings."""

    def __init__(self, calls: int, **options: Any) -> None:
        super().__init__(calls, own={1: {"lr": 0.5, "weight_decay": 0.1}}, **options)

    def nested(self, arrays: list[Any]) -> Any:
        return {"first": arrays[0], "rest": [*arrays[1:]]}

    def call(self) -> object:
        return self.optimizer.step(self.nested(self.params), self.nested(self.grads))

    def go_on(self) -> object:
        return self.optimizer.step(self.nested(self.params), self.nested(self.next_grads))


class Minimize(Nested):
    """A step of `minimize` with nested parameters."""

    def call(self) -> object:
        return self.optimizer.minimize(
            lambda p: anp.sum(p["first"] ** 2) + sum(anp.sum(x) for x in p["rest"]),
            self.nested(self.params),
        )


class Override(Steps):
    """Settings of single parameters. They show in the following step."""

    def call(self) -> object:
        return self.optimizer.override(self.params[:2], lr=0.25, maximize=True)

    def observe(self) -> object:
        return super().observe(), len(self.optimizer._state.pending[1])


class Relaid(Steps):
    """Gradients of other dtypes. Parameters in another layout, to which moments are converted."""

    def __init__(self, calls: int, **options: Any) -> None:
        super().__init__(calls, **options)
        self.params = [np.array(p, order="F") for p in self.params]
        self.grads = [g.astype("float16") for g in self.grads]


class Loss(Steps):
    """A step with a loss that autograd differentiates."""

    def call(self) -> object:
        return self.optimizer.get_updates(lambda p: anp.sum(p[0] ** 2) + anp.sum(p[1]), self.params)


class Sparse(Steps):
    """A step of rows of a table, one of which is named twice."""

    def __init__(self, calls: int, **options: Any) -> None:
        super().__init__(calls, shapes_and_dtypes=[((8, 3), "float32")], **options)

    def call(self) -> object:
        indices = np.array([5, 1, 5])
        return self.optimizer.apply_sparse(indices, self.grads[0][:3], self.params[0])


class Weights(Steps):
    """A state taken over from another dtype."""

    def call(self) -> object:
        new = [np.array(7), *(np.full(w.shape, 0.5) for w in self.optimizer.weights[1:])]
        self.optimizer.set_weights(new)
        return None


class Build(Steps):
    """Fresh moments."""

    def call(self) -> object:
        self.optimizer.build(self.params)
        return None


class Swap(Steps):
    """A swap of averages and parameters. Afterwards they are swapped back."""

    def call(self) -> object:
        self.optimizer.swap_ema()
        return None

    def go_on(self) -> object:
        if self.optimizer._state.is_swapped:
            self.optimizer.swap_ema()
        return super().go_on()


class Pickle(Steps):
    """A copy. Afterwards the original takes a step."""

    def call(self) -> object:
        return pickle.loads(pickle.dumps(self.optimizer))


CALLS: dict[str, Callable[[], Case]] = {
    "frozen": lambda: Frozen(0),
    "frozen while accumulating": lambda: Frozen(1, gradient_accumulation_steps=2),
    "first step": lambda: Nested(0),
    "step": lambda: Nested(1, use_ema=True),
    "minimize": lambda: Minimize(0, shapes_and_dtypes=FEW[:2]),
    "override": lambda: Override(1),
    "another layout": lambda: Relaid(1),
    "first get_updates": lambda: Updates(0),
    "get_updates": lambda: Updates(1, zero_grad=True),
    "get_updates with a loss": lambda: Loss(0, shapes_and_dtypes=FEW[:2]),
    "first apply_sparse": lambda: Sparse(0),
    "apply_sparse": lambda: Sparse(1, use_ema=True),
    "apply_sparse, excluded": lambda: Sparse(0, weight_decay=0.1, excluded=[0]),
    "set_weights": lambda: Weights(1),
    "build": lambda: Build(1),
    "build while accumulating": lambda: Build(1, gradient_accumulation_steps=3),
    "swap_ema": lambda: Swap(2, use_ema=True),
    "pickle": lambda: Pickle(1, use_ema=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_whole(name: str) -> None:
    assert interrupt_everywhere(CALLS[name]) > 5


class Stateless(Case):
    """A step with the caller's own moments."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.arrays = [values(rng, 7, "float32") for _ in range(2)]
        self.arrays += [np.zeros(7, np.float32) for _ in range(2)]

    def call(self) -> object:
        fusedadam.adam_step(*self.arrays, step=1)
        return None

    def go_on(self) -> object:
        fusedadam.adam_step(*self.arrays, step=2)
        return None

    def observe(self) -> object:
        return contents(*self.arrays)


def test_a_stateless_step_is_whole() -> None:
    assert interrupt_everywhere(Stateless) > 2


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Saved(Steps):
    """A checkpoint that replaces an older one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(1)
        self.path = Path(tempfile.mkdtemp(dir=directory)) / "state"
        self.optimizer.save(self.path)
        super().call()

    def call(self) -> object:
        self.optimizer.save(self.path)
        return None

    def go_on(self) -> object:
        self.optimizer.save(self.path)
        # An interrupt can arrive before Python has the descriptor of a file that it has just
        # opened. That file is empty and stays until another process saves.
        left = [file for file in self.path.parent.iterdir() if file != self.path]
        assert len(left) <= 1
        assert all(file.stat().st_size == 0 for file in left)
        return None

    def observe(self) -> object:
        return super().observe(), self.path.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="files that are open cannot be replaced there")
def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda _: None
    )  # hundreds of files, which must not wait for the disk
    assert interrupt_everywhere(lambda: Saved(tmp_path), times=1) > 50


class Loaded(Steps):
    """An optimizer loaded from a file. Afterwards it is loaded and takes a step."""

    def __init__(self, directory: Path) -> None:
        super().__init__(1)
        self.path = directory / "state"
        if not self.path.exists():
            self.optimizer.save(self.path)

    def call(self) -> object:
        return Adam.load(self.path, self.params)

    def go_on(self) -> object:
        self.optimizer = Adam.load(self.path, self.params)
        return super().go_on()


class LoadedInPlace(Loaded):
    """An optimizer that loads a file in place, then takes a step."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        super(Loaded, self).call()
        self.optimizer.lr = 0.125

    def call(self) -> object:
        return self.optimizer.load(self.path, self.params)

    def go_on(self) -> object:
        return super(Loaded, self).go_on()

    def observe(self) -> object:
        return super().observe(), self.optimizer.lr


# Files that were not closed are closed when they are freed.
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("kind", [Loaded, LoadedInPlace])
def test_an_interrupted_load_leaves_nothing(kind: type[Loaded], tmp_path: Path) -> None:
    kind(tmp_path).go_on()
    before = open_files() if Path("/proc/self/fd").exists() else 0
    assert interrupt_everywhere(lambda: kind(tmp_path), times=1) > 50
    if Path("/proc/self/fd").exists():
        # At most one: an interrupt can arrive before Python has the descriptor of a file that it
        # has opened.
        assert open_files() <= before + 1


# ---- the hooks around a fork


class Fork(Case):
    """The hooks that lock around a fork, before it and after it in both processes."""

    def __init__(self) -> None:
        self.locks = [locks.new_lock() for _ in range(3)]

    def call(self) -> object:
        # Each hook runs twice, as registered. As Python does, this ignores an exception of a hook
        # until all hooks have run.
        interrupted = False
        for hook in (locks._acquire_all,) * 2 + (locks._release_all,) * 2:
            try:
                hook()
            except KeyboardInterrupt:
                interrupted = True
            if hook is locks._acquire_all:
                held = list(locks._held.locks)
        assert {id(lock) for lock in self.locks} <= {id(lock) for lock in held}
        if interrupted:
            raise KeyboardInterrupt
        return None

    def go_on(self) -> object:
        for lock in [*self.locks, locks._registry]:
            assert lock.acquire(timeout=5)
            lock.release()
        return None

    def observe(self) -> object:
        return list(locks._held.locks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork")
def test_an_interrupted_fork_holds_all_locks_and_lets_go_of_them() -> None:
    assert interrupt_everywhere(Fork) > 10


# ---- real signals


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
@pytest.mark.parametrize("kind", ["large", "many", "loss", "sparse", "stateless", "files"])
def test_ctrl_c(kind: str) -> None:
    code = f"""
        import json, ctrl_c
        print(json.dumps(ctrl_c.interrupt({kind!r}, {INTERRUPTS})))
    """
    seen = json.loads(output_of(code))
    logging.getLogger(__name__).info("%s: %s", kind, seen)
    assert seen["within a call"] >= INTERRUPTS
