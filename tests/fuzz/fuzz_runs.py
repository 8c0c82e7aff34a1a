# SPDX-License-Identifier: MIT
"""The length, the seed and the counters of the fuzz tests, and what their programs share.

Without environment variables, every run is the same short one. FUSEDADAM_FUZZ_EXAMPLES sets the
number of programs per test and draws a fresh seed, which is printed before the tests start.
FUSEDADAM_FUZZ_SEED repeats such a run, even one that ended the process at a guard page. There is no
example database.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, TypeVar

import fusedadam
import hypothesis
import numpy as np
import pytest
from fuzz_values import TAME, numbers
from helpers import Array
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

_EXAMPLES: Final = os.environ.get("FUSEDADAM_FUZZ_EXAMPLES")
_SEED: Final = os.environ.get("FUSEDADAM_FUZZ_SEED")

T = TypeVar("T")

SEED: Final = int(_SEED) if _SEED else 0 if _EXAMPLES is None else secrets.randbits(32)

# What each test did, by name.
TALLIES: Final[dict[str, Counter[str]]] = {}


def tally(name: str) -> Counter[str]:
    """The counters of this test: "programs", "calls", "refused calls", ..."""
    return TALLIES.setdefault(name, Counter())


def examples(default: int) -> int:
    return default if _EXAMPLES is None else int(_EXAMPLES)


class Machine(RuleBasedStateMachine):
    """A program of calls.

    Hypothesis draws the order of the calls, the first parameters and the settings. The rest comes
    from a generator that it seeds, and is printed as notes.
    """

    tally: ClassVar[Counter[str]]
    rng: np.random.Generator
    is_wild = False  # whether numbers may be infinite or NaN

    def __init__(self) -> None:
        super().__init__()
        self._before = fusedadam.active_isa(), fusedadam.get_num_threads()

    def start(self, process: dict[str, Any]) -> None:
        self.tally["programs"] += 1
        self.rng, self.is_wild = np.random.default_rng(process["seed"]), process["is_wild"]
        fusedadam.set_isa(process["isa"])
        fusedadam.set_num_threads(process["threads"])

    def teardown(self) -> None:
        fusedadam.set_isa(self._before[0])
        fusedadam.set_num_threads(self._before[1])

    def one(self, values: Sequence[T]) -> T:
        """Draw one of these values."""
        value = values[int(self.rng.integers(len(values)))]
        hypothesis.note(f"    {value!r}")
        return value

    def some(self, count: int) -> set[int]:
        """Draw numbers below `count`, each with an even chance."""
        return {i for i in range(count) if self.one((False, True))}

    def numbers(self, shape: tuple[int, ...], dtype: Any, kind: str) -> Array:
        kind = kind if self.is_wild or kind in TAME else "plain"
        return numbers(self.rng, shape, str(dtype), kind)

    def refuses(
        self, is_refused: object, call: Callable[[], object], *errors: type[BaseException]
    ) -> bool:
        """Count a call. Make it if it must be refused, and return whether that is so."""
        self.tally["refused calls" if is_refused else "calls"] += 1
        if is_refused:
            with np.errstate(all="ignore"), pytest.raises(errors or ValueError):
                call()
        return bool(is_refused)

    @classmethod
    def run(cls, default: int, calls: int = 50) -> None:
        """Run `default` programs, or as many as are requested, of this many calls."""
        settings = hypothesis.settings(
            max_examples=examples(default),
            stateful_step_count=calls,
            deadline=None,
            derandomize=False,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        seeded: Any = hypothesis.seed(SEED)(cls)
        run_state_machine_as_test(seeded, settings=settings)
        assert cls.tally["refused calls"] > 0 < cls.tally["calls"]
