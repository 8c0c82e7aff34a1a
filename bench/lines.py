# SPDX-License-Identifier: MIT
"""Python child processes that exchange lines of JSON with the parent."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

# Seconds between the turns of two processes. The threads of GCC's OpenMP runtime spin for 9 ms
# after a parallel region (measured at 2.6 GHz) before they sleep; the pause is longer than that.
PAUSE = 0.020
# A command that takes longer than this has hung, and its process is killed.
REPLY_SECONDS = 600.0


class WorkerError(RuntimeError):
    """An exception in a child process, or its unexpected end."""


class Process:
    """A child process that runs this interpreter. As a context manager, it kills the process.

    `environment` maps variables to their values; None removes a variable.
    """

    def __init__(
        self, arguments: Sequence[str], *, environment: Mapping[str, str | None] | None = None
    ) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment_with(environment),
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

    def write(self, command: Any) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._end()) from None

    def read(self) -> Any:
        """Return the next answer, or raise if the process has ended."""
        assert self._process.stdout is not None
        watch = threading.Timer(REPLY_SECONDS, self._process.kill)
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        if not line:
            raise WorkerError(self._end())
        return json.loads(line)

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """Kill the process, which frees its memory."""
        atexit.unregister(self.close)
        if self.alive:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # an unread command is still buffered
                    stream.close()

    def _end(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        return f"its process ended with code {code}" + (f": {said[-1]}" if said else "")


def environment_with(variables: Mapping[str, str | None] | None) -> dict[str, str]:
    """Return this process's environment with variables set, or removed if the value is None."""
    variables = variables or {}
    removed = {name for name, value in variables.items() if value is None}
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return kept | {name: value for name, value in variables.items() if value is not None}
