# SPDX-License-Identifier: MIT
"""Parts of scripts for `fresh_python`: count the threads of steps, fork children that may hang."""

from __future__ import annotations

SMALL = 1_000
LARGE = 100_000  # more than the 32,768 elements from which a step uses several threads

# A fixed gradient, so that the child processes do not need the oracle.
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
# Keeps NumPy's BLAS from creating threads, so that all threads seen belong to steps.
QUIET = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

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
