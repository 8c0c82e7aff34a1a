# SPDX-License-Identifier: MIT
"""How long these tests run, from which seed, and what they count.

Without an environment variable each run is the same short one. FUSEDADAM_FUZZ_EXAMPLES sets how many
programs each test tries, from a fresh seed that is printed before they start. FUSEDADAM_FUZZ_SEED
repeats such a run, also one that ended the process at a guard page. No database of examples is kept.
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

# What each test did, by its name.
TALLIES: Final[dict[str, Counter[str]]] = {}


def tally(name: str) -> Counter[str]:
    """The counts of this test: "programs", "calls", "refused calls", ..."""
    return TALLIES.setdefault(name, Counter())


def examples(default: int) -> int:
    return default if _EXAMPLES is None else int(_EXAMPLES)


def settings(default: int) -> hypothesis.settings:
    """Settings of a test that tries `default` programs where nothing else is asked for."""
    return hypothesis.settings(
        max_examples=examples(default),
        stateful_step_count=CALLS_PER_PROGRAM,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def run_programs(machine: type[RuleBasedStateMachine], default: int) -> None:
    """Run programs of this machine's rules."""
    seeded: Any = hypothesis.seed(SEED)(machine)
    run_state_machine_as_test(seeded, settings=settings(default))
