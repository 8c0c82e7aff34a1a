# SPDX-License-Identifier: MIT
"""The stateless functions, with everything that they read and write between guard pages.

That includes moments, vhat and averages, which `Adam` keeps in its own memory.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import fuzz_runs
import fuzz_values as fuzz
import numpy as np
import oracle
import storage_oracle as storage
from faults import UNLIKE, WRITTEN, DoesNotApplyError
from fusedadam import Adam, adam_step, global_norm
from fusedadam.arrays import dtype_named
from guarded import PLACES, Guarded
from helpers import assert_all_same_bits, assert_same_bits
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

NAMES = (
    *("lr", "beta_1", "beta_2", "epsilon", "decay", "bias_corrected_epsilon", "ema_momentum"),
    *("weight_decay", "l2", "clipnorm", "clipvalue", "zero_grad", "maximize", "flush_denormals"),
    *("rounding", "seed"),
)
settings = st.fixed_dictionaries(
    {}, optional={n: fuzz.SETTINGS[n].filter(lambda value: not callable(value)) for n in NAMES}
)
STATE = ("packed", "m", "v", "low_bits", "vhat", "ema")
BAD = WRITTEN | UNLIKE
# These change which state the arguments ask for, or nothing.
NO_FAULTS: Final = {
    "packed": ("int16",),
    "low_bits": ("int16", "None", "swapped bytes", "misaligned"),
}


class StatelessMachine(fuzz_runs.Machine):
    """Steps of the same tensors, whose state the caller keeps."""

    tally = fuzz_runs.tally("adam_step, global_norm and get_gradients")

    @initialize(
        specs=st.lists(fuzz.tensors, min_size=1, max_size=5),
        settings=settings,
        process=fuzz.processes,
    )
    def begin(self, specs: list[Any], settings: dict[str, Any], process: dict[str, Any]) -> None:
        self.start(process)
        formats: dict[str, Any] = {
            "moments": self.one(("float32", "bfloat16", "packed")),
            "low_bits": self.one((None, "int8", "int16")),
            "use_ema": self.one((False, True)),
        }
        formats["amsgrad"] = self.one((False, formats["moments"] != "packed"))
        if not formats["use_ema"]:
            settings.pop("ema_momentum", None)  # refused without averages
        if fuzz.conflict({**settings, **formats}):
            del settings["rounding"]
        self.formats, self.settings = formats, settings
        specs = [(shape, dtype_named(fuzz.fitting(dtype, formats))) for shape, dtype, _ in specs]
        fresh = oracle.OracleAdam([np.zeros(*spec) for spec in specs], **formats)
        kinds = {name: getattr(fresh, name) for name in ("params", *STATE)}
        self.held = {name: self._guarded(arrays, name) for name, arrays in kinds.items() if arrays}

    def _guarded(self, like: list[Any], name: str) -> list[Guarded | None]:
        """Arrays in these shapes and dtypes, each at its own end of the accessible pages."""
        kind = self.one(fuzz.WILD)
        drawn = [a if a is None else self.numbers(a.shape, a.dtype, kind) for a in like]
        if name in ("v", "vhat") and kind in fuzz.TAME:
            drawn = [None if a is None else np.asarray(np.abs(a)) for a in drawn]
        return [a if a is None else Guarded(a, self.one(PLACES)) for a in drawn]

    def _new_gradients(self) -> list[Guarded]:
        like = [held.array for held in self.held["params"] if held is not None]
        dtypes = [dtype_named(fuzz.gradient_dtype(self.rng, str(a.dtype))) for a in like]
        grads: Any = self._guarded(list(map(np.zeros_like, like, dtypes)), "grads")
        return list(grads)

    def _check(self, expected: dict[str, list[Any]]) -> None:
        for name, arrays in expected.items():
            for held, array in zip(self.held[name], arrays, strict=True):
                if held is not None:
                    assert_same_bits(held.array, array, name)
                    held.assert_canaries_alive()

    @rule()
    def step(self) -> None:
        self.held["grads"] = [*self._new_gradients()]
        arrays: Any = {n: [h and h.array for h in held] for n, held in self.held.items()}
        before = copy.deepcopy(arrays)
        step = int(self.rng.integers(1, self.one((200, 2**53 + 1)), endpoint=True))
        for _ in range(2):
            spoilt = self._spoilt(arrays)
            if spoilt is not None:
                call = lambda given=spoilt: adam_step(**given, step=step, **self.settings)
                self.refuses(True, call, TypeError, ValueError)
                self._check(before)
        reference = oracle.OracleAdam(before["params"], **self.formats, **self.settings)
        reference.set_count(step - 1)
        for name in before.keys() - {"grads"}:
            setattr(reference, name, list(before[name]))
        left = reference.step(before["grads"])
        if len(left) == 1:
            # A single tensor may also be given without a list.
            arrays = {name: items[0] for name, items in arrays.items()}
        self.tally["calls"] += 1
        adam_step(**arrays, step=step, **self.settings)
        self._check({n: left if n == "grads" else getattr(reference, n) for n in self.held})

    def _spoilt(self, arrays: dict[str, list[Any]]) -> dict[str, Any] | None:
        """The arguments of a step with one fault, or None if these arrays cannot have it."""
        name = self.one([n for n in arrays if n != "grads"])
        fault = self.one(["overlap", "one missing", *BAD])
        fits = BAD[fault].fits if fault in BAD else lambda a: a.size > 1
        filled = [i for i, a in enumerate(arrays[name]) if a is not None and fits(a)]
        if not filled or fault in NO_FAULTS.get(name, ()):
            return None
        i = self.one(filled)
        spoilt = {n: list(a) for n, a in arrays.items()}
        if fault == "overlap":
            there = [n for n, a in arrays.items() if n not in (name, "grads") and a[i] is not None]
            spoilt[name][i] = spoilt[self.one(there)][i]
        elif fault == "one missing":
            spoilt[name].pop()
        else:
            try:
                spoilt[name][i] = BAD[fault].of(spoilt[name][i])
            except DoesNotApplyError:
                return None
        return spoilt

    @rule(clipvalue=fuzz.SETTINGS["clipvalue"], bound=fuzz.SETTINGS["clipnorm"])
    def norms(self, clipvalue: float | None, bound: float | None) -> None:
        name = self.one(("clipnorm", "clipnorm_per_tensor"))
        clips: dict[str, Any] = {"clipvalue": clipvalue, name: bound}
        held = self._new_gradients()
        drawn = [guarded.array.copy() for guarded in held]
        arrays, like = [guarded.array for guarded in held], [guarded.array for guarded in held]
        if self.one((False, True)):
            pairs = [fuzz.strided(a, self.one(PLACES)) for a in drawn]
            held, arrays = [guarded for guarded, _ in pairs], [array for _, array in pairs]
        self.tally["calls"] += 2
        norm = global_norm(arrays)
        clipped = Adam(**clips).get_gradients(arrays, like)
        wide = list(map(storage.widen, drawn))
        assert_same_bits(np.array(norm), np.array(oracle.global_norm(wide)), "norm")
        assert_all_same_bits(clipped, oracle.clip(wide, **clips), "clipped")
        assert_all_same_bits(arrays, drawn, "what was read")
        for guarded in held:
            guarded.assert_canaries_alive()


def test_programs_of_stateless_functions_equal_oracle() -> None:
    StatelessMachine.run(40, calls=6)
