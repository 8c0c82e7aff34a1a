# SPDX-License-Identifier: MIT
"""Threads: how many a step uses, and optimizers stepped from several threads at once."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import itertools
import logging
import math
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
import threadpoolctl
from at_once import Ticks, together
from fresh_python import output_of
from fusedadam import Adam, _core, adam_step
from helpers import Array, assert_all_same_bits, running, state, values
from step_scripts import LARGE, QUIET, SETUP, SMALL
from training import ShapesAndDtypes, Training

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


# The steps of each optimizer in tests that step many at once.
STEPS_AT_ONCE = int(os.environ.get("FUSEDADAM_STEPS_AT_ONCE", "4"))


# -- the number of threads --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
def test_thread_count_that_is_set_is_the_one_got(n: int) -> None:
    with running():
        fusedadam.set_num_threads(n)
        assert fusedadam.get_num_threads() == n
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(fusedadam.get_num_threads).result() == n, "on another thread"


@pytest.mark.parametrize("asked", [pytest.param(None, marks=on_linux), 1, 3])
def test_default_is_omp_num_threads_or_the_cpus_of_this_process(asked: int | None) -> None:
    code = "import fusedadam; print(fusedadam.get_num_threads())"
    quota = _core.cpu_quota()
    most = sys.maxsize if quota is None else math.ceil(quota)
    expected = asked or min(len(os.sched_getaffinity(0)), most)
    environment = {} if asked is None else {"OMP_NUM_THREADS": str(asked)}
    assert output_of(code, environment=environment) == str(expected)


@on_linux
@pytest.mark.parametrize(
    ("quota", "asked", "threads"), [(50_000, None, 1), (100_000, "3", 3), (100_000, "three", 1)]
)
def test_default_is_at_most_the_quota_of_the_control_group(
    quota: int, asked: str | None, threads: int
) -> None:
    first = Path("/sys/fs/cgroup/cpu")  # cgroup v1
    parent = first if first.exists() else Path("/sys/fs/cgroup")
    group = parent / f"fusedadam_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        # This process may not create one, or there are none. tests/cpp tests quotas with files.
        if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT}:
            raise
        return
    code = f"""
        import os, pathlib
        group = pathlib.Path({str(group)!r})
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text("{quota} 100000")
        else:
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text("{quota}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        import fusedadam
        from fusedadam import _core, get_num_threads, set_num_threads
        print(_core.cpu_quota(), get_num_threads())
        set_num_threads(7)
        print(get_num_threads())
    """
    environment = {} if asked is None else {"OMP_NUM_THREADS": asked}
    try:
        if (group / "cpu.cfs_quota_us").exists() or (group / "cpu.max").exists():
            assert output_of(code, environment=environment) == f"{quota / 100_000} {threads}\n7"
        else:
            assert "cpu" not in (parent / "cgroup.subtree_control").read_text().split()
    finally:
        group.rmdir()


@on_linux
@pytest.mark.parametrize(
    ("act", "started"),
    [
        ("stepped(LARGE)", 2),
        ("stepped(SMALL)", 0),
        ("fusedadam.set_num_threads(1); stepped(LARGE)", 0),
        ("fusedadam.set_num_threads(2); stepped(LARGE)", 1),
        ("with limits(1, user_api='openmp'): stepped(LARGE)", 0),
        ("with limits(1): stepped(LARGE)", 0),
        ("with limits(2, user_api='openmp'): stepped(LARGE)", 1),
        ("fusedadam.set_num_threads(3)\nwith limits(1): stepped(LARGE)", 0),
        ("fusedadam.set_num_threads(3)\nwith limits(2, user_api='openmp'): stepped(LARGE)", 1),
        ("with limits(1): pass\nstepped(LARGE)", 2),
    ],
)
def test_threads_that_are_really_started(act: str, started: int) -> None:
    code = f"{SETUP}\n    from threadpoolctl import threadpool_limits as limits\n"
    code += "".join(f"    {line}\n" for line in act.splitlines())
    code += "    print(threads_of_this_process() - before)"
    assert output_of(code, environment={**QUIET, "OMP_NUM_THREADS": "3"}) == str(started)


@pytest.mark.parametrize("asked", [None, 2, 8])
def test_threadpool_limits_hold_while_they_last(asked: int | None) -> None:
    # Other tests may have lowered the number of an OpenMP runtime that is shared with torch.
    with threadpoolctl.threadpool_limits(2, user_api="openmp"), running(threads=asked):
        before = fusedadam.get_num_threads()
        with threadpoolctl.threadpool_limits(1):
            assert fusedadam.get_num_threads() == 1
        assert fusedadam.get_num_threads() == before


# -- the GIL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adam_step", "apply_gradients", "get_updates", "build"])
def test_other_threads_run_during_a_long_call(ticks: Ticks, method: str) -> None:
    p, g, m, v = np.ones((4, 4_000_000), "float32")
    optimizer = Adam()
    calls: dict[str, Callable[[], object]] = {
        "adam_step": lambda: adam_step(p, g, m, v, step=1),
        "apply_gradients": lambda: optimizer.apply_gradients([(g, p)]),
        "get_updates": lambda: optimizer.get_updates([g], [p]),
        "build": lambda: optimizer.build([p]),
    }
    with running(threads=1):
        ticks.assert_run_during(calls[method])


@pytest.mark.parametrize("size", [SMALL, 32_767])
def test_no_other_thread_runs_during_a_short_step(ticks: Ticks, size: int) -> None:
    # Releasing the GIL would take longer than the step, and threads that step at once would do
    # little else.
    p, g, rows = np.ones(size, "float32"), np.ones(size, "float32"), np.arange(size)
    optimizer, table = Adam(clipnorm=1.0), Adam()
    calls: list[Callable[[], object]] = [
        lambda: optimizer.apply_gradients([(g, p)]),
        lambda: table.apply_sparse(rows, g, p),
    ]
    for call in calls:
        call()
        before = len(ticks.times)
        for _ in range(200):
            call()
        assert len(ticks.times) == before


# -- several threads of the caller ------------------------------------------------------------


# Shapes and dtypes, options, and the rows of a table or None. Each kind has its own thread.
KINDS: dict[str, tuple[ShapesAndDtypes, dict[str, Any], int | None]] = {
    "tiny": ([((3,), "float32")], {}, None),
    "small": ([((SMALL,), "float64")], {"clipnorm": 1.0}, None),
    "largest on one thread": ([((32_767,), "float32")], {"decay": 0.1}, None),
    "smallest on several": ([((32_768,), "float32")], {"use_ema": True}, None),
    "large": ([((LARGE,), "float32")], {"amsgrad": True, "weight_decay": 0.1}, None),
    "large, float64": ([((LARGE,), "float64")], {"clipnorm_per_tensor": 1.0}, None),
    "many": ([((50 + i,), "float32") for i in range(300)], {"l2": 0.1}, None),
    "mixed": ([((40_000,), "float32"), ((5, 7), "float64"), ((), "float32")], {}, None),
    "accumulating": ([((LARGE,), "float32")], {"gradient_accumulation_steps": 2}, None),
    "scaled": ([((LARGE,), "float32")], {"loss_scale": "dynamic"}, None),
    "few rows": ([((500, 16), "float32")], {}, 20),
    "many rows": ([((5_000, 32), "float32")], {"clipnorm": 0.5}, 2_500),
}


class Kind:
    """An optimizer of one kind, with its expected state."""

    def __init__(self, name: str) -> None:
        self.name = name
        shapes, options, rows = KINDS[name]
        self._training = Training(shapes, seed=len(name), **options)
        self._grads = self._training.grads()
        self._rows = None
        if rows is not None:
            indices = self._training.rng.integers(0, shapes[0][0][0], rows)
            self._rows = indices, values(self._training.rng, (rows, shapes[0][0][1]), "float32")

    def step(self) -> int:
        optimizer, params = self._training.optimizer, self._training.params
        if self._rows is None:
            return optimizer.apply_gradients(list(zip(self._grads, params, strict=True)))
        return optimizer.apply_sparse(*self._rows, params[0])

    def check(self, steps: int) -> None:
        for _ in range(steps):
            if self._rows is None:
                self._training.reference.step(self._grads)
            else:
                self._training.reference.apply_sparse(*self._rows)
        self._training.check()


def test_optimizers_of_all_kinds_at_once(threads: int) -> None:
    kinds = [Kind(name) for name in KINDS]

    def work(i: int) -> None:
        for _ in range(STEPS_AT_ONCE):
            kinds[i].step()

    together(len(kinds), work)
    for kind in kinds:
        kind.check(STEPS_AT_ONCE)
    logging.getLogger(__name__).info(
        "%d threads of Python, %d steps each on %d threads", len(kinds), STEPS_AT_ONCE, threads
    )


@pytest.mark.parametrize("name", KINDS)
def test_one_optimizer_of_each_kind_from_several_threads(name: str) -> None:
    # Steps of one optimizer are serialized. The gradient is constant, so the order does not matter.
    kind = Kind(name)

    def work(_: int) -> list[int]:
        return [kind.step() for _ in range(STEPS_AT_ONCE)]

    with running(threads=2):
        counts = sorted(itertools.chain.from_iterable(together(4, work)))
    kind.check(4 * STEPS_AT_ONCE)
    if name != "accumulating":
        assert counts == list(range(1, len(counts) + 1)), "each step gets a count of its own"


def test_adam_step_on_different_arrays_at_once(rng: np.random.Generator) -> None:
    cases = [state(rng, LARGE, "float32") for _ in range(6)]
    expected = [oracle.adam_step(*case, step=5) for case in cases]
    together(6, lambda i: adam_step(*cases[i], step=5))
    for (p, _, m, v), arrays in zip(cases, expected, strict=True):
        assert_all_same_bits([p, m, v], arrays)


def saved_and_loaded(optimizer: Adam) -> list[Array]:
    """The weights of an optimizer of one parameter after a round trip through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adam.safetensors"
        optimizer.save(path)
        return Adam.load(path, [np.ones(4 * LARGE, "float32")]).get_weights()


SNAPSHOTS: dict[str, Callable[[Adam], list[Array]]] = {
    "save": saved_and_loaded,
    "get_weights": Adam.get_weights,
    "deepcopy": lambda o: copy.deepcopy(o).weights,
    "pickle": lambda o: list(pickle.loads(pickle.dumps(o)).weights),
}


@pytest.mark.parametrize("snapshot", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_state_saved_while_another_thread_steps_is_of_one_step(
    snapshot: Callable[[Adam], list[Array]],
) -> None:
    p, g = np.ones(4 * LARGE, "float32"), np.ones(4 * LARGE, "float32")
    optimizer, reference = Adam(), oracle.OracleAdam([np.ones(1, "float32")])
    optimizer.build([p])
    states = [reference.weights()]
    for _ in range(60):
        reference.step([np.ones(1, "float32")])
        states.append(reference.weights())

    def step() -> None:
        for _ in range(60):
            optimizer.apply_gradients([(g, p)])

    thread = threading.Thread(target=step)
    thread.start()
    saved = []
    while thread.is_alive():
        saved.append(snapshot(optimizer))
    for iterations, m, v in saved:
        expected = states[int(iterations)]
        assert np.unique(m).tolist() == expected[1].tolist()
        assert np.unique(v).tolist() == expected[2].tolist()
