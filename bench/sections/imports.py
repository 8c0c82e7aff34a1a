# SPDX-License-Identifier: MIT
"""The time of `import fusedadam` beyond `import numpy` in fresh processes, and by module."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any, NamedTuple

from child import run_python
from settings import Results, Settings, Tick

TITLE = "Imports"

# A fresh interpreter has only its own modules. Anything else that the benchmark imports would make
# these imports look cheaper.
CODE = """\
from time import perf_counter
begin = perf_counter()
import numpy
middle = perf_counter()
import fusedadam
end = perf_counter()
import json
print(json.dumps([middle - begin, end - middle]))
"""
LARGEST = 12

# import time: self [us] | cumulative | imported package
TRACE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)")


class Import(NamedTuple):
    """A module, and the time of its import without and with the modules that it imports."""

    module: str
    own_us: float
    all_us: float


def ticks(settings: Settings) -> int:
    """One per process."""
    return settings.rounds + trace_rounds(settings)


def trace_rounds(settings: Settings) -> int:
    """Return the number of traced processes. Tracing slows imports, so it only ranks modules."""
    return min(settings.rounds, 5)


def run(settings: Settings, tick: Tick) -> Results:
    """Time both imports in one process per round."""
    run_python(["-c", CODE])  # warm-up: writes bytecode files and fills the page cache
    seconds: dict[str, list[float]] = {"numpy": [], "fusedadam": []}
    for _ in range(settings.rounds):
        numpy_seconds, beyond = json.loads(run_python(["-c", CODE]).stdout)
        seconds["numpy"].append(numpy_seconds)
        seconds["fusedadam"].append(beyond)
        tick("import")
    traces = []
    for _ in range(trace_rounds(settings)):
        traces.append(trace())
        tick("trace")
    return {
        "rows": [{"package": name, "seconds": values} for name, values in seconds.items()],
        "parts": largest_parts(traces),
    }


def trace() -> list[Import]:
    """Return the modules that `import fusedadam` imports after numpy, in one process."""
    done = run_python(["-X", "importtime", "-c", "import numpy\nimport fusedadam"])
    imports = [
        Import(module, int(own), int(cumulative))
        for own, cumulative, _, module in TRACE.findall(done.stderr)
    ]
    modules = [line.module for line in imports]
    # A module is listed when its import has ended.
    return imports[modules.index("numpy") + 1 : modules.index("fusedadam") + 1]


def largest_parts(traces: list[list[Import]]) -> list[dict[str, Any]]:
    """Return the modules with the largest times of their own: medians over processes, sorted."""
    by_module: dict[str, list[Import]] = {}
    for imports in traces:
        for line in imports:
            by_module.setdefault(line.module, []).append(line)
    medians = [
        Import(
            module,
            statistics.median(line.own_us for line in lines),
            statistics.median(line.all_us for line in lines),
        )
        for module, lines in by_module.items()
    ]
    medians.sort(key=lambda line: -line.own_us)
    return [
        {
            "module": line.module,
            "own_seconds": line.own_us / 1e6,
            "seconds_with_imports": line.all_us / 1e6,
        }
        for line in medians[:LARGEST]
    ]
