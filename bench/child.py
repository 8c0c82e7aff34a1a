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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A child that hangs is killed.
TIME_LIMIT_S = 600


def call(
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str | None] | None = None,
) -> Any:
    """Return what a function of a module returns in a fresh process.

    Arguments and result pass through JSON. `environment` has the variables to set, or to remove where the value is None.
    """
    request = {
        "module": function.__module__,
        "function": function.__name__,
        "arguments": arguments,
    }
    done = run_python([__file__], text=json.dumps(request), environment=environment)
    return json.loads(done.stdout)


def run_python(
    arguments: Sequence[str],
    *,
    text: str = "",
    environment: Mapping[str, str | None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with these arguments and this standard input; raise if it ends badly."""
    variables = dict(os.environ)
    for name, value in (environment or {}).items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        env=variables,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
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
    """Answer the one request on standard input."""
    # Libraries may print: only the answer goes to standard output.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.load(sys.stdin)
    function = getattr(importlib.import_module(request["module"]), request["function"])
    with answer:
        json.dump(function(*request["arguments"]), answer)


if __name__ == "__main__":
    # Not where the caller happens to be: where the modules of the benchmark are.
    sys.path[0] = str(Path(__file__).parent)
    serve()
