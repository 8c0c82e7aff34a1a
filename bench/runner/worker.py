# SPDX-License-Identifier: MIT
"""Processes that call functions of the benchmark.

Some conditions are fixed when a process starts or first imports a library: environment variables,
the order of imports, the OpenMP runtime, the state of memory. So each contender, and each such
condition, has its own process. Nothing that one leaves behind affects the next.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from typing_extensions import Self

# Seconds between the turns of two processes. The threads of GCC's OpenMP runtime spin for 9 ms
# after a parallel region (measured at 2.6 GHz) before they sleep; the pause is longer than that.
PAUSE = 0.020
# A call that takes longer than this has hung, and its process is killed.
REPLY_SECONDS = 600.0
# The number of threads, under each library's own name.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS",
)  # fmt: skip

# A process starts with the variables of this one, which are changed for that moment.
_starting = threading.Lock()


class WorkerError(RuntimeError):
    """An exception in a process, or its unexpected end."""


class Worker:
    """A fresh process that calls functions by name. As a context manager, it ends the process.

    It is pinned to as many CPUs as it has threads, from `first_cpu` on, and all libraries are told
    that number of threads. `environment` sets variables, and removes those with the value None.
    """

    def __init__(
        self,
        threads: int,
        *,
        first_cpu: int = 0,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - closed by close()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, cpus[first_cpu : first_cpu + threads] or cpus, self._log.name)
        self._process = context.Process(target=serve, args=arguments)
        with _starting, mock.patch.dict(os.environ):
            # Some peers compile code with programs installed beside the interpreter (ninja).
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            for name, value in {**variables, **(environment or {})}.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            self._process.start()
        theirs.close()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.is_alive()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of a module in the process, and return its result."""
        self.send(function, *arguments)
        return self.receive()

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call. `receive` returns its result."""
        with contextlib.suppress(BrokenPipeError):  # receive() says why
            self._pipe.send((function, arguments))

    def receive(self) -> Any:
        """Return the result of the oldest pending call, or raise `WorkerError`."""
        try:
            if not self._pipe.poll(REPLY_SECONDS):
                self._process.kill()
            succeeded, result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            said = Path(self._log.name).read_text(errors="replace").strip().splitlines()
            why = f": {said[-1]}" if said else ""
            raise WorkerError(
                f"Error: its process ended with code {self._process.exitcode}{why}"
            ) from None
        if not succeeded:
            raise WorkerError(result)
        return result

    def close(self) -> None:
        """Kill the process, which frees its memory."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._log.close()


def serve(pipe: Connection, cpus: list[int], log: str) -> None:
    """Answer calls until the other end is closed. Runs in the process."""
    if cpus:
        os.sched_setaffinity(0, cpus)  # before any thread starts
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)  # whatever libraries print
    os.dup2(file, 2)
    with contextlib.suppress(EOFError):
        while True:
            call = pipe.recv_bytes()
            try:
                function, arguments = pickle.loads(call)
                reply = (True, function(*arguments))
            except Exception as error:  # noqa: BLE001 - the report shows whatever a peer raises
                reply = (False, f"{type(error).__name__}: {error}".split("\n", 1)[0])
            pipe.send(reply)


def call(
    function: Callable[..., Any],
    *arguments: Any,
    threads: int,
    environment: Mapping[str, str | None] | None = None,
) -> Any:
    """Call a function of a module in a fresh process, and return its result."""
    with Worker(threads, environment=environment) as worker:
        return worker.call(function, *arguments)


def absence(*modules: str) -> str:
    """Return why the modules cannot all be imported, or "". Does not import them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""
