# SPDX-License-Identifier: MIT
"""Run a function of the benchmark in a Python process of its own, and get back what it returns.

For what is settled when a process starts or first imports a library: environment variables, the order of imports, the state of
memory. Nothing that one measurement leaves behind, threads that still spin among it, reaches the next.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lines


def call(
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str | None] | None = None,
) -> Any:
    """Return what a function of a module returns in a fresh process.

    Arguments and result pass through JSON. `environment` has the variables to set, or to remove where the value is None.
    """
    done = run_python(
        [__file__], text=json.dumps(request_for(function, arguments)), environment=environment
    )
    return json.loads(done.stdout)


def begin(
    function: Callable[..., Iterator[Any]],
    *arguments: Any,
    environment: Mapping[str, str | None] | None = None,
) -> Generator:
    """Return a generator function of a module, begun in a fresh process; what it yields passes through JSON."""
    generator = Generator([__file__], environment=environment)
    generator.write(request_for(function, arguments))
    return generator


class Generator(lines.Process):
    """A generator in a process of its own, which waits between one `next` and the other.

    So that processes of several kinds can take turns, with pauses in which the threads of the one before go to sleep.
    """

    def __next__(self) -> Any:
        time.sleep(lines.PAUSE)
        self.write("next")
        return self.read()


def request_for(function: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, Any]:
    """Return what `serve` reads."""
    return {
        "module": function.__module__,
        "function": function.__name__,
        "arguments": arguments,
    }


def run_python(
    arguments: Sequence[str],
    *,
    text: str = "",
    environment: Mapping[str, str | None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with these arguments and this standard input; raise if it ends badly."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        env=lines.environment_with(environment),
        capture_output=True,
        text=True,
        timeout=lines.REPLY_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"a process of the benchmark must end well. Received: exit status {done.returncode}"
            f"\n{done.stderr.strip()}"
        )
    return done


def absence(*modules: str) -> str | None:
    """Return why a process cannot import all of these, None where it can. Imports nothing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"ModuleNotFoundError: No module named {module!r}"
    return None


def serve() -> None:
    """Answer the one request on standard input; what a generator yields, one value for each further line."""
    # Libraries may print: only the answer goes to standard output.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.loads(sys.stdin.readline())
    function = getattr(importlib.import_module(request["module"]), request["function"])
    result = function(*request["arguments"])
    with answers:
        if not isinstance(result, Iterator):
            json.dump(result, answers)
            return
        for _, value in zip(sys.stdin, result, strict=False):
            answers.write(json.dumps(value) + "\n")
            answers.flush()


if __name__ == "__main__":
    # Not where the caller happens to be: where the modules of the benchmark are.
    sys.path[0] = str(Path(__file__).parent)
    serve()
