# SPDX-License-Identifier: MIT
"""The worker processes that run the peers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lines
from lines import WorkerError
from peers import MODULES, twin

# The number of threads, under each library's own name.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


class Worker(lines.Process):
    """A process that runs `worker.py`. It is ready once `receive` has returned its first answer.

    It is pinned to as many CPUs as it has threads. `first_cpu` is an index into the CPUs of this
    process.
    """

    def __init__(self, module: str, threads: int, first_cpu: int = 0) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        own = cpus[first_cpu : first_cpu + threads]
        script = Path(__file__).with_name("worker.py")
        super().__init__(
            [str(script), module, str(threads), json.dumps(own or cpus)],
            environment=dict.fromkeys(THREAD_VARIABLES, str(threads))
            # Some peers compile code with programs installed beside the interpreter (ninja).
            | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
            | {twin.LIBRARY_VARIABLE: twin.library_path()},
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return the answer."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command. `receive` returns its answer."""
        self.write({"command": command, **arguments})

    def receive(self) -> Any:
        """Return the answer to the oldest pending command. Raise `WorkerError` if it failed."""
        reply = self.read()
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]


def probe(names: Iterable[str], threads: int) -> tuple[dict[str, str], dict[str, str]]:
    """Start each peer once. Return the installed versions, and why contenders are absent."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(MODULES[name], []).append(name)
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    workers = {module: Worker(module, threads) for module in modules}
    for module, worker in workers.items():
        with worker:
            try:
                versions |= worker.receive()
            except WorkerError as error:
                absent |= dict.fromkeys(modules[module], str(error))
    return versions, absent
