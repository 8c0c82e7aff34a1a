# SPDX-License-Identifier: MIT
"""The time of `import fusedadam`."""

from __future__ import annotations

import json
import subprocess
import sys

from runner import Bench, Row

# A fresh interpreter has only its own modules. Anything else that the benchmark imports would make
# these imports look cheaper.
IMPORTS = """\
from time import perf_counter
begin = perf_counter()
import numpy
middle = perf_counter()
import fusedadam
end = perf_counter()
import json
print(json.dumps({"import numpy": middle - begin, "import fusedadam": end - middle}))
"""


def imports(bench: Bench) -> list[Row]:
    """`import numpy`, and `import fusedadam` beyond that, in one fresh process a round."""
    seconds: dict[str, list[float]] = {}
    for i in range(bench.rounds + 1):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
        )
        # The first process writes bytecode files and fills the page cache.
        for name, value in json.loads(done.stdout).items() if i > 0 else ():
            seconds.setdefault(name, []).append(value)
    return [bench.row("imports", 0, seconds)]
