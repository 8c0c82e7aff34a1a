# SPDX-License-Identifier: MIT
"""Forked children step serially, never hang, and give the same bits as any other process."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from fresh_python import output_of
from fusedadam import Adam, locks
from step_scripts import FORK, QUIET, SETUP

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@needs_fork
@on_linux
@pytest.mark.parametrize(
    ("parent", "child_threads"), [("stepped(LARGE)", 3), ("stepped(SMALL)", None), ("pass", 3)]
)
def test_forked_child_steps_serially_with_the_same_bits(
    parent: str, child_threads: int | None
) -> None:
    code = f"""{SETUP}{FORK}
    {parent}
    expected = stepped(LARGE), stepped(SMALL)

    def work():
        with running(threads={child_threads}):
            alone = threads_of_this_process()
            assert_all_same_bits(stepped(LARGE), expected[0])
            assert_all_same_bits(stepped(SMALL), expected[1])
            assert threads_of_this_process() == alone == 1

    print(in_child(work), in_child(lambda: work() or in_child(work) == 0 or 1 / 0))
    assert_all_same_bits(stepped(LARGE), expected[0])
    """
    assert output_of(code, environment={**QUIET, "OMP_NUM_THREADS": "3"}) == "0 0"


@needs_fork
def test_fork_waits_for_a_step_of_the_same_optimizer() -> None:
    # Otherwise the child could inherit the lock of a missing thread, or half-stepped moments. A
    # lock that another thread holds at the fork is never released in the child.
    code = f"""{SETUP}{FORK}
    import threading

    def forked_while_it_steps():
        p, g = arrays(LARGE)
        optimizer, stop = Adam(), threading.Event()

        def keep_stepping():
            while not stop.is_set():
                optimizer.apply_gradients([(g, p)])

        def work():
            twin, q = Adam(), arrays(LARGE)[0]
            for _ in range(optimizer.apply_gradients([(g, p)])):
                twin.apply_gradients([(g, q)])
            assert_all_same_bits([p, *optimizer.weights], [q, *twin.weights])

        thread = threading.Thread(target=keep_stepping)
        thread.start()
        try:
            while not optimizer.iterations:
                time.sleep(0.001)
            return in_child(work)
        finally:
            stop.set()
            thread.join()

    # An optimizer each, so that none has taken more steps than its child can soon repeat.
    print(*(forked_while_it_steps() for _ in range(5)))
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "2"}) == " ".join("0" * 5)


@needs_fork
def test_fork_while_the_step_of_one_optimizer_needs_another() -> None:
    # Holding one optimizer's lock while waiting for the other's would be a deadlock.
    code = f"""{SETUP}{FORK}
    import itertools, threading
    p, g = arrays(SMALL)
    inner, stop = Adam(), threading.Event()

    def schedule(step):
        # What another thread does meanwhile, if the fork holds what it needs.
        time.sleep(0.001)
        inner.apply_gradients([(g, p.copy())])
        Adam()  # makes a new lock
        return 0.001

    outer = Adam(lr=schedule)

    def keep_stepping():
        while not stop.is_set():
            outer.apply_gradients([(g, p)])

    thread = threading.Thread(target=keep_stepping)
    thread.start()

    def work():
        q = p.copy()
        inner.apply_gradients([(g, q)])
        outer.apply_gradients([(g, q)])

    print(*(in_child(work, limit_s=10) for _ in range(8)))
    stop.set()
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "2"}) == " ".join("0" * 8)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str) -> None:
    code = f"""{SETUP}
    import concurrent.futures, multiprocessing, operator
    if {method!r} not in multiprocessing.get_all_start_methods():
        raise SystemExit(print("same"))
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
    p, g = arrays(LARGE)
    optimizer = Adam(clipnorm=1.0)
    optimizer.apply_gradients([(g, p)])
    context = multiprocessing.get_context({method!r})
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        step = operator.methodcaller("get_updates", [g], [p])
        theirs = [pool.submit(step, optimizer) for _ in range(4)]
        theirs = [future.result(timeout=60) for future in theirs]
    assert optimizer.iterations == 1
    ours = optimizer.get_updates([g], [p])
    for updates in theirs:
        assert_all_same_bits(updates, ours)
    print("same")
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "same"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork")
def test_interrupt_while_a_fork_waits_comes_when_it_has_all_locks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = Adam()
    waits = iter([KeyboardInterrupt()])
    acquire = locks._acquire_or_give_up

    def interrupted(first: Any, patience_s: float) -> Any:
        for interrupt in waits:
            raise interrupt
        return acquire(first, patience_s)

    monkeypatch.setattr(locks, "_acquire_or_give_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locks._acquire_all()
    assert any(lock is optimizer._lock for lock in locks._held.locks)
    locks._acquire_all()  # the second call of a hook has nothing left to do
    locks._release_all()
    assert locks._held.locks == []
