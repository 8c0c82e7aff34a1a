# SPDX-License-Identifier: MIT
"""The processes that hold the peers: how they are started, asked and ended."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers import ADAPTERS, PEERS, twin

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

# Every library's own name for it.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
# No command takes longer unless something hangs.
REPLY_SECONDS = 600.0


class WorkerError(RuntimeError):
    """What a peer raised in its process, or how that process ended."""


class Worker:
    """A process of `worker.py`. It is ready when `receive` has returned its first answer.

    It runs on as many CPUs as it has threads; `first_cpu` counts from 0 among those of this process.
    """

    def __init__(self, module: str, threads: int, first_cpu: int = 0) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        own = cpus[first_cpu : first_cpu + threads]
        script = Path(__file__).with_name("worker.py")
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, str(script), module, str(threads), json.dumps(own or cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ
            | dict.fromkeys(THREAD_VARIABLES, str(threads))
            # Compilers of peers look for programs that were installed beside this interpreter (ninja).
            | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
            | {twin.LIBRARY_VARIABLE: twin.library_path()},
        )
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return the answer."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command, whose answer `receive` returns."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._end()) from None

    def receive(self) -> Any:
        """Return the answer to the oldest command, or raise what its execution raised."""
        assert self._process.stdout is not None
        watch = threading.Timer(REPLY_SECONDS, self._process.kill)
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        if not line:
            raise WorkerError(self._end())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, and with it all memory that it holds."""
        atexit.unregister(self.close)
        if self.alive:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a command that nobody will read
                    stream.close()

    def _end(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")


def probe(names: Iterable[str], threads: int) -> tuple[dict[str, str], dict[str, str]]:
    """Start each peer once: return the versions of what is there, and why contenders are absent."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault((PEERS | ADAPTERS)[name], []).append(name)
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
