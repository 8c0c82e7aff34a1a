# SPDX-License-Identifier: MIT
"""The length, the seed and the counters of the fuzz tests.

Without environment variables, every run is the same short one. FUSEDADAM_FUZZ_EXAMPLES sets the
number of programs per test and draws a fresh seed, which is printed before the tests start.
FUSEDADAM_FUZZ_SEED repeats such a run, even one that ended the process at a guard page. There is no
example database.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from typing import Any, Final

import hypothesis
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

_EXAMPLES: Final = os.environ.get("FUSEDADAM_FUZZ_EXAMPLES")
_SEED: Final = os.environ.get("FUSEDADAM_FUZZ_SEED")

CALLS_PER_PROGRAM: Final = 50
SEED: Final = int(_SEED) if _SEED else 0 if _EXAMPLES is None else secrets.randbits(32)

# What each test did, by name.
TALLIES: Final[dict[str, Counter[str]]] = {}


def tally(name: str) -> Counter[str]:
    """The counters of this test: "programs", "calls", "refused calls", ..."""
    return TALLIES.setdefault(name, Counter())


def examples(default: int) -> int:
    return default if _EXAMPLES is None else int(_EXAMPLES)


def settings(default: int) -> hypothesis.settings:
    """Settings of a test that tries `default` programs unless another number is requested."""
    return hypothesis.settings(
        max_examples=examples(default),
        stateful_step_count=CALLS_PER_PROGRAM,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def run_programs(machine: type[RuleBasedStateMachine], default: int) -> None:
    """Run programs made of this machine's rules."""
    seeded: Any = hypothesis.seed(SEED)(machine)
    run_state_machine_as_test(seeded, settings=settings(default))
