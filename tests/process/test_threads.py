# SPDX-License-Identifier: MIT
"""Threads, processes and the processor's state: a step disturbs none of them, nor they a step."""

from __future__ import annotations

import concurrent.futures
import copy
import ctypes
import itertools
import os
import pickle
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
import threadpoolctl
from fresh_python import output_of
from fusedadam import Adam, adam_step
from helpers import Array, assert_all_same_bits, running, state, values

SMALL = 1_000
LARGE = 100_000  # more than the 32,768 elements from which a step is shared among threads

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")

# The parts of the scripts below. A fixed gradient keeps the oracle out of the child processes.
SETUP = f"""
    import os, warnings
    import numpy as np
    import fusedadam
    from fusedadam import Adam
    from helpers import assert_all_same_bits, running

    def threads_of_this_process():
        return len(os.listdir("/proc/self/task"))

    def arrays(n):
        rng = np.random.default_rng(2)
        return [rng.standard_normal(n).astype("float32") for _ in range(2)]

    def stepped(n, steps=3):
        p, g = arrays(n)
        optimizer = Adam(clipnorm=1.0)
        for _ in range(steps):
            optimizer.apply_gradients([(g, p)])
        return [p, *optimizer.weights]

    SMALL, LARGE = {SMALL}, {LARGE}
    before = threads_of_this_process()
"""
# Creates no thread in NumPy's BLAS, so that every thread seen is one of a step.
QUIET = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


# -- how many threads -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
def test_thread_count_that_is_set_is_the_one_got(n: int) -> None:
    with running():
        fusedadam.set_num_threads(n)
        assert fusedadam.get_num_threads() == n
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(fusedadam.get_num_threads).result() == n, "on another thread"


@pytest.mark.parametrize("n", [1, 3])
def test_omp_num_threads_is_the_default(n: int) -> None:
    code = "import fusedadam; print(fusedadam.get_num_threads())"
    assert output_of(code, environment={"OMP_NUM_THREADS": str(n)}) == str(n)


@on_linux
def test_default_is_the_cpus_of_this_process() -> None:
    code = "import fusedadam; print(fusedadam.get_num_threads())"
    assert output_of(code) == str(len(os.sched_getaffinity(0)))


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


def test_threadpoolctl_sees_the_openmp_runtime() -> None:
    assert "openmp" in {info["user_api"] for info in threadpoolctl.threadpool_info()}


@pytest.mark.parametrize("asked", [None, 2, 8])
def test_threadpool_limits_hold_while_they_last(asked: int | None) -> None:
    with running(threads=asked):
        before = fusedadam.get_num_threads()
        with threadpoolctl.threadpool_limits(1):
            assert fusedadam.get_num_threads() == 1
        assert fusedadam.get_num_threads() == before


# -- the GIL ----------------------------------------------------------------------------------


@pytest.fixture
def ticks() -> Iterator[list[int]]:
    """A counter that another thread advances whenever this one lets go of the GIL by itself."""
    count, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.0002):
            count[0] += 1

    interval = sys.getswitchinterval()
    # Nobody is asked to let go: between two bytecodes this thread keeps the GIL.
    sys.setswitchinterval(1000.0)
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("method", ["adam_step", "apply_gradients", "get_updates"])
def test_other_threads_run_during_a_step(ticks: list[int], method: str) -> None:
    p, g, m, v = np.ones((4, 4_000_000), "float32")
    optimizer = Adam()
    calls: dict[str, Callable[[], object]] = {
        "adam_step": lambda: adam_step(p, g, m, v, step=1),
        "apply_gradients": lambda: optimizer.apply_gradients([(g, p)]),
        "get_updates": lambda: optimizer.get_updates([g], [p]),
    }
    call = calls[method]
    call()
    with running(threads=1):
        for _ in range(100):
            before = ticks[0]
            call()
            if ticks[0] > before:
                return
    raise AssertionError("no other thread ran during 100 long steps")


# -- many threads of the caller's -------------------------------------------------------------


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """The results of `work(0)` ... `work(count - 1)`, started at one moment."""
    barrier = threading.Barrier(count)

    def run(i: int) -> Any:
        barrier.wait()
        return work(i)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("options", [{}, {"clipnorm": 1.0}], ids=["plain", "clipnorm"])
def test_different_optimizers_at_once(
    rng: np.random.Generator, size: int, options: dict[str, Any], threads: int
) -> None:
    count, steps = 6, 8
    params = [values(rng, size + i, "float32") for i in range(count)]
    grads = values(rng, size + count, "float32")  # all read the same memory
    references = [oracle.OracleAdam([p], **options) for p in params]
    optimizers = [Adam(**options) for _ in params]

    def work(i: int) -> None:
        for step in range(steps):
            optimizers[i].get_updates([grads[: size + i]], [params[i]])
            assert optimizers[i].iterations == step + 1

    together(count, work)
    for i, reference in enumerate(references):
        for _ in range(steps):
            reference.step([grads[: size + i]])
        assert_all_same_bits([params[i]], reference.params, f"threads={threads}, params")
        assert_all_same_bits(optimizers[i].weights, reference.weights())


def test_adam_step_on_different_arrays_at_once(rng: np.random.Generator) -> None:
    cases = [state(rng, LARGE, "float32") for _ in range(6)]
    expected = [oracle.adam_step(*case, step=5) for case in cases]
    together(6, lambda i: adam_step(*cases[i], step=5))
    for (p, _, m, v), arrays in zip(cases, expected, strict=True):
        assert_all_same_bits([p, m, v], arrays)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_one_optimizer_from_several_threads(rng: np.random.Generator, size: int) -> None:
    # The gradient is the same at every step, so the order in which the threads come is no matter.
    p, g = values(rng, size, "float32"), values(rng, size, "float32")
    reference = oracle.OracleAdam([p], decay=0.1, clipnorm=1.0)
    optimizer = Adam(decay=0.1, clipnorm=1.0)

    def work(_: int) -> list[int]:
        return [optimizer.apply_gradients([(g, p)]) for _ in range(10)]

    counts = list(itertools.chain.from_iterable(together(4, work)))
    for _ in range(40):
        reference.step([g])
    assert sorted(counts) == list(range(1, 41)), "each step gets a count of its own"
    assert optimizer.iterations == 40
    assert_all_same_bits([p], reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


SNAPSHOTS: dict[str, Callable[[Adam], list[Array]]] = {
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
    done = threading.Event()

    def step() -> None:
        try:
            for _ in range(60):
                optimizer.apply_gradients([(g, p)])
        finally:
            done.set()

    for _ in range(60):
        reference.step([np.ones(1, "float32")])
        states.append(reference.weights())
    thread = threading.Thread(target=step)
    thread.start()
    saved = []
    while not done.is_set():
        saved.append(snapshot(optimizer))
    thread.join()
    for iterations, m, v in saved:
        expected = states[int(iterations)]
        assert np.unique(m).tolist() == expected[1].tolist()
        assert np.unique(v).tolist() == expected[2].tolist()


# -- processes --------------------------------------------------------------------------------

FORK = """
    import signal, time

    def in_child(work, limit_s=60):
        # The exit status of a forked child that does `work`; a child that hangs is killed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 on warns of threads and fork: that is the test
            child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hung"
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@needs_fork
@on_linux
@pytest.mark.parametrize("parent", ["stepped(LARGE)", "stepped(SMALL)", "pass"])
@pytest.mark.parametrize("child_threads", [None, 3])
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
def test_forked_child_goes_on_with_its_parents_optimizer() -> None:
    code = f"""{SETUP}{FORK}
    p, g = arrays(LARGE)
    optimizer = Adam()
    for _ in range(2):
        optimizer.apply_gradients([(g, p)])
    twin, q = Adam(), arrays(LARGE)[0]
    for _ in range(4):
        twin.apply_gradients([(g, q)])

    def work():
        for _ in range(2):
            optimizer.apply_gradients([(g, p)])
        assert_all_same_bits([p, *optimizer.weights], [q, *twin.weights])

    print(in_child(work))
    assert optimizer.iterations == 2
    work()
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "0"


@needs_fork
def test_fork_while_other_threads_step() -> None:
    # A lock that another thread holds at the fork is never released in the child.
    code = f"""{SETUP}{FORK}
    import threading
    expected = stepped(LARGE)
    stop = threading.Event()
    optimizers = [Adam(clipnorm=1.0) for _ in range(2)]

    def keep_stepping(optimizer):
        p, g = arrays(2 * LARGE)
        while not stop.is_set():
            optimizer.apply_gradients([(g, p)])
            optimizer.build([p])

    threads = [threading.Thread(target=keep_stepping, args=(o,)) for o in optimizers]
    for thread in threads:
        thread.start()

    def work():
        assert_all_same_bits(stepped(LARGE), expected)

    print(*(in_child(work) for _ in range(20)))
    stop.set()
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "2"}) == " ".join("0" * 20)


@needs_fork
def test_fork_waits_for_a_step_of_the_same_optimizer() -> None:
    # Else the child would inherit the lock of a thread that it lacks, or moments half stepped.
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
    print(*(forked_while_it_steps() for _ in range(10)))
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "2"}) == " ".join("0" * 10)


@needs_fork
def test_fork_while_the_step_of_one_optimizer_needs_another() -> None:
    # To hold the lock of one and wait for the other's would be to wait for oneself.
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

    print(*(in_child(work, limit_s=10) for _ in range(20)))
    stop.set()
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "2"}) == " ".join("0" * 20)


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


# -- the floating-point environment -----------------------------------------------------------

# fenv.h of glibc: where the control and the flags are in a fenv_t, and the bits that do damage.
FENV = {
    # 28 bytes of x87, then MXCSR: flags 0-5, DAZ 6, masks 7-12, rounding 13-14, FTZ 15.
    "x86_64": {
        "words": 8,
        "control": 7,
        "upward": 2 << 13,
        "downward": 1 << 13,
        "to zero": 3 << 13,
        "flush": 1 << 15 | 1 << 6,
        "flags": 7,
        "all flags": 0x3D,
    },
    # FPCR: rounding 22-23, FZ 24; FPSR: flags 0-4.
    "aarch64": {
        "words": 2,
        "control": 0,
        "upward": 1 << 22,
        "downward": 2 << 22,
        "to zero": 3 << 22,
        "flush": 1 << 24,
        "flags": 1,
        "all flags": 0x1F,
    },
}.get(platform.machine(), {})
needs_fenv = pytest.mark.skipif(
    not FENV or platform.libc_ver()[0] != "glibc", reason="knows the layout of glibc's fenv_t only"
)


class FloatEnvironment:
    """The calling thread's control bits (rounding, flushing) and exception flags."""

    def __init__(self) -> None:
        self._libm = ctypes.CDLL("libm.so.6")
        self._words = ctypes.c_uint32 * FENV["words"]
        self._saved = self._get()

    def _get(self) -> list[int]:
        words = self._words()
        assert self._libm.fegetenv(words) == 0
        return list(words)

    def set(self, *names: str, flags: int = 0) -> None:
        words = list(self._saved)
        words[FENV["control"]] |= sum(FENV[name] for name in names)
        words[FENV["flags"]] &= ~FENV["all flags"]
        words[FENV["flags"]] |= flags
        assert self._libm.fesetenv(self._words(*words)) == 0

    def control(self) -> int:
        return self._get()[FENV["control"]] & ~(
            FENV["all flags"] if FENV["control"] == FENV["flags"] else 0
        )

    def flags(self) -> int:
        return self._get()[FENV["flags"]] & FENV["all flags"]

    def restore(self) -> None:
        assert self._libm.fesetenv(self._words(*self._saved)) == 0


@pytest.fixture
def environment() -> Iterator[FloatEnvironment]:
    environment = FloatEnvironment()
    try:
        yield environment
    finally:
        environment.restore()


def with_subnormals(rng: np.random.Generator, size: int, dtype: str) -> tuple[Array, ...]:
    """Tensors on which every rounding mode, FTZ and DAZ would each be seen."""
    p, g, m, v = state(rng, size, dtype)
    tiny = np.finfo(p.dtype).smallest_normal
    g[::3] *= tiny  # subnormal gradients and moments, and squares that underflow
    m[::3] *= tiny
    v[::3] *= tiny
    p[::5] *= tiny
    return p, g, m, v


MODES = [("upward",), ("downward",), ("to zero",), ("flush",), ("upward", "flush")]


@needs_fenv
@pytest.mark.parametrize("modes", MODES, ids="+".join)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_environment_of_the_caller_is_not_used(
    rng: np.random.Generator,
    environment: FloatEnvironment,
    threads: int,
    dtype: str,
    size: int,
    modes: tuple[str, ...],
) -> None:
    p, g, m, v = with_subnormals(rng, size, dtype)
    expected = oracle.adam_step(p, g, m, v, step=3, lr=0.7, flush_denormals=False)
    environment.set(*modes)
    adam_step(p, g, m, v, step=3, lr=0.7, flush_denormals=False)
    environment.restore()
    assert_all_same_bits([p, m, v], expected, f"threads={threads}")


@needs_fenv
@pytest.mark.parametrize("modes", MODES, ids="+".join)
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_environment_of_the_caller_is_not_used_by_an_optimizer(
    rng: np.random.Generator, environment: FloatEnvironment, size: int, modes: tuple[str, ...]
) -> None:
    # Decay, the powers of beta, the norm and the clip scale are scalars that round as well.
    p, g, _, _ = with_subnormals(rng, size, "float32")
    q, h, _, _ = state(rng, size, "float64")
    options: dict[str, Any] = {
        "lr": 0.7,
        "decay": 0.3,
        "clipnorm": 0.9,
        "clipvalue": 0.1,
        "flush_denormals": False,
    }
    reference = oracle.OracleAdam([p, q], **options)
    clipped = oracle.clip([g, h], clipnorm=0.9, clipvalue=0.1)
    for _ in range(3):
        reference.step([g, h])
    environment.set(*modes)
    optimizer = Adam(**options)
    returned = optimizer.get_gradients([g, h], [p, q])
    for _ in range(3):
        optimizer.apply_gradients([(g, p), (h, q)])
    environment.restore()
    assert_all_same_bits(returned, clipped)
    assert_all_same_bits([p, q], reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


@needs_fenv
@pytest.mark.parametrize("modes", [(), *MODES], ids="+".join)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("flags", ["clear", "set"])
def test_environment_of_the_caller_is_not_changed(
    rng: np.random.Generator,
    environment: FloatEnvironment,
    threads: int,
    size: int,
    modes: tuple[str, ...],
    flags: str,
) -> None:
    p, g, m, v = with_subnormals(rng, size, "float32")
    g[:3] = np.nan, np.inf, 1e30  # invalid, overflow; with epsilon 0 also a division by zero
    g[3] = m[3] = v[3] = 0
    optimizer = Adam(epsilon=0.0, decay=0.1, clipnorm=1e30)
    q = p.copy()
    optimizer.apply_gradients([(g, q)])
    raised = 0 if flags == "clear" else FENV["all flags"]
    environment.set(*modes, flags=raised)
    control = environment.control()
    adam_step(p, g, m, v, step=3, epsilon=0.0)
    after_function = environment.control(), environment.flags()
    environment.set(*modes, flags=raised)
    optimizer.apply_gradients([(g, q)])
    after_method = environment.control(), environment.flags()
    environment.restore()
    assert np.isnan(p[:4]).any(), f"the step raises every flag, threads={threads}"
    assert after_function == (control, raised)
    assert after_method == (control, raised)


@needs_fenv
@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_threads_started_under_another_environment(modes: tuple[str, ...]) -> None:
    # A new thread inherits the environment of the one that starts it, and an OpenMP thread stays.
    code = f"""
        import numpy as np, oracle
        from helpers import assert_all_same_bits
        from test_threads import LARGE, FloatEnvironment, with_subnormals
        from fusedadam import adam_step
        cases = [with_subnormals(np.random.default_rng(i), LARGE, "float32") for i in range(2)]
        options = dict(step=3, lr=0.7, flush_denormals=False)
        expected = [oracle.adam_step(*case, **options) for case in cases]
        environment = FloatEnvironment()
        environment.set(*{modes!r})
        adam_step(*cases[0], **options)  # starts the threads
        environment.restore()
        adam_step(*cases[1], **options)
        for (p, _, m, v), arrays in zip(cases, expected):
            assert_all_same_bits([p, m, v], arrays)
        print("same")
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "same"


@needs_fenv
def test_import_changes_no_floating_point_setting() -> None:
    # A library linked with -ffast-math sets FTZ and DAZ for the process that loads it.
    code = """
        import ctypes
        import numpy as np
        libm, words = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()

        def control():
            # The x87 control word and MXCSR without its exception flags. The rest holds pointers
            # to the last x87 instruction, which a context switch clears.
            libm.fegetenv(words)
            return words[0] & 0xFFFF, words[7] & ~0x3F

        before = control()
        import fusedadam
        fusedadam.Adam().get_updates([np.ones(100_000)], [np.ones(100_000)])
        after = control()
        tiny = np.array([5e-324]), np.array([1e-45], "float32")
        print(before == after, *(float((t * 1)[0]) > 0 for t in tiny), 5e-324 * 1.0 > 0)
    """
    assert output_of(code) == "True True True True"


# -- imports ----------------------------------------------------------------------------------


def test_import_brings_in_no_framework() -> None:
    code = """
        import sys
        import numpy as np
        import fusedadam
        p, g = np.ones(3), np.ones(3)
        optimizer = fusedadam.Adam(clipnorm=1.0)
        optimizer.get_updates([g], [p])
        optimizer.apply_gradients([(g, p)])
        optimizer.get_gradients([g], [p])
        frameworks = {"torch", "autograd", "keras", "tf_keras", "jax", "tensorflow", "scipy"}
        print(sorted(frameworks & {name.partition(".")[0] for name in sys.modules}))
    """
    assert output_of(code) == "[]"
