# SPDX-License-Identifier: MIT
"""Run a function of the benchmark in a fresh Python process and return its result.

Some conditions are fixed when a process starts or first imports a library: environment variables,
the order of imports, the state of memory. A fresh process also isolates measurements: nothing that
one leaves behind, such as spinning threads, affects the next.
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
    """Call a module-level function in a fresh process and return its result.

    Arguments and result pass through JSON. `environment` maps variables to their values; None
    removes a variable.
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
    """Start a module-level generator function in a fresh process.

    Arguments and yielded values pass through JSON. `environment` is as in `call`.
    """
    generator = Generator([__file__], environment=environment)
    generator.write(request_for(function, arguments))
    return generator


class Generator(lines.Process):
    """A generator that runs in its own process and is idle between two calls of `next`.

    Several such processes can be interleaved. `next` first pauses, so that the threads of the
    process before have gone to sleep.
    """

    def __next__(self) -> Any:
        time.sleep(lines.PAUSE)
        self.write("next")
        return self.read()


def request_for(function: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, Any]:
    """Return the request that `serve` reads."""
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
    """Run this interpreter with these arguments and standard input. Raise if it fails."""
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
    """Return why the modules cannot all be imported, or None. Does not import them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"ModuleNotFoundError: No module named {module!r}"
    return None


def serve() -> None:
    """Answer one request from standard input.

    A generator yields one value for each further line of input.
    """
    # Libraries may print to standard output, so it is redirected and only answers use the original.
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
    # Modules are imported from this directory, whatever the caller's working directory is.
    sys.path[0] = str(Path(__file__).parent)
    serve()
