# SPDX-License-Identifier: MIT
"""The stateless functions, with everything that they read and write between guard pages.

That includes moments, vhat and averages, which `Adam` keeps in its own memory.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Final

import fuzz_runs
import fuzz_values as fuzz
import hypothesis
import numpy as np
import oracle
import pytest
import storage_oracle as storage
from faults import UNLIKE, WRITTEN, DoesNotApplyError
from fusedadam import Adam, adam_step, global_norm
from guarded import PLACES, Guarded
from helpers import assert_all_same_bits, assert_same_bits, running
from hypothesis import given
from hypothesis import strategies as st

STEPS = fuzz_runs.tally("adam_step")
NORMS = fuzz_runs.tally("global_norm and get_gradients")

KINDS: Final = ("params", "grads", "m", "v", "packed", "low_bits", "vhat", "ema")
NAMES = (
    *("lr", "beta_1", "beta_2", "epsilon", "decay", "bias_corrected_epsilon", "ema_momentum"),
    *("weight_decay", "l2", "clipnorm", "clipvalue", "zero_grad", "maximize", "flush_denormals"),
    *("rounding", "seed"),
)
step_options = st.fixed_dictionaries(
    {},
    optional={
        name: fuzz.SETTINGS[name].filter(lambda value: not callable(value)) for name in NAMES
    },
)
formats = st.fixed_dictionaries(
    {
        "moments": fuzz.SETTINGS["moments"].filter("auto".__ne__),
        "low_bits": fuzz.SETTINGS["low_bits"],
    }
)
BAD = WRITTEN | UNLIKE
# These change which state the arguments ask for, or nothing.
NO_FAULTS: Final = {
    "packed": ("int16",),
    "low_bits": ("int16", "None", "swapped bytes", "misaligned"),
}


def dtypes_of(dtype: str, formats: dict[str, Any]) -> dict[str, Any]:
    """The dtypes of all arrays of one parameter that have a fixed one."""
    param = np.dtype(dtype)
    moment = storage.moment_dtype(param, formats["moments"])
    dtypes = {"params": param, "ema": storage.compute_dtype(param), "vhat": moment}
    is_packed = formats["moments"] == "packed"
    dtypes |= {"packed": np.dtype("int16")} if is_packed else {"m": moment, "v": moment}
    if param == storage.BFLOAT16 and formats["low_bits"]:
        dtypes["low_bits"] = np.dtype(formats["low_bits"])
    return dtypes


def draw(
    rng: np.random.Generator,
    name: str,
    specs: list[fuzz.TensorSpec],
    kind: str,
    formats: dict[str, Any],
) -> list[Guarded | None]:
    """The arrays of this name, each at its own end of the accessible pages."""
    held: list[Guarded | None] = []
    for shape, dtype, _ in specs:
        dtypes = dtypes_of(dtype, formats) | {"grads": fuzz.gradient_dtype(rng, dtype)}
        if name not in dtypes:
            held.append(None)
            continue
        drawn = fuzz.numbers(rng, shape, str(dtypes[name]), kind)
        if name in ("v", "vhat") and kind in fuzz.TAME:
            drawn = np.asarray(np.abs(drawn))
        held.append(Guarded(drawn, PLACES[int(rng.integers(2))]))
    return held


def expected_of(
    before: dict[str, list[Any]], step: int, chosen: dict[str, Any]
) -> dict[str, list[Any]]:
    """The arrays of each kind after a step, None where a parameter has none."""
    clips = {name: chosen.get(name) for name in ("clipnorm", "clipvalue")}
    sign = -1.0 if chosen.get("maximize") else 1.0
    clipped = oracle.clip(list(map(storage.widen, before["grads"])), sign=sign, **clips)
    others = (*clips, "maximize", "zero_grad", "rounding", "seed")
    formula = {k: x for k, x in chosen.items() if k not in others}
    after = {name: list(arrays) for name, arrays in before.items()}
    for i, g in enumerate(clipped):
        stored = {n: a[i] for n, a in before.items() if n != "grads" and a[i] is not None}
        index = np.arange(g.size).reshape(g.shape)
        dither = storage.dither(chosen.get("seed", 0), step, index)
        is_nearest = chosen.get("rounding") == "nearest"
        news = oracle.stored_step(stored, g, None if is_nearest else dither, step=step, **formula)
        if chosen.get("zero_grad"):
            news["grads"] = np.zeros_like(before["grads"][i])
        for name, new in news.items():
            after[name][i] = new
    return after


def check(lists: dict[str, list[Guarded | None]], expected: dict[str, list[Any]]) -> None:
    for name, arrays in expected.items():
        for held, array in zip(lists[name], arrays, strict=True):
            if held is not None:
                assert_same_bits(held.array, array, name)
    for held in itertools.chain(*lists.values()):
        if held is not None:
            held.assert_canaries_alive()


def refused_arguments(
    arrays: dict[str, list[Any]], rng: np.random.Generator, fault: str
) -> dict[str, Any] | None:
    """The arguments of a step with one fault, or None if these arrays cannot have it."""
    name = str(rng.choice([n for n in arrays if n != "grads"]))
    fits = BAD[fault].fits if fault in BAD else lambda a: a.size > 1
    filled = [i for i, a in enumerate(arrays[name]) if a is not None and fits(a)]
    if not filled or fault in NO_FAULTS.get(name, ()):
        return None
    i = int(rng.choice(filled))
    spoilt = {n: list(a) for n, a in arrays.items()}
    if fault == "overlap":
        there = [n for n, a in arrays.items() if n not in (name, "grads") and a[i] is not None]
        spoilt[name][i] = spoilt[str(rng.choice(there))][i]
    elif fault == "one missing":
        spoilt[name].pop()
    else:
        try:
            spoilt[name][i] = BAD[fault].of(spoilt[name][i])
        except DoesNotApplyError:
            return None
    return spoilt


@hypothesis.seed(fuzz_runs.SEED)
@fuzz_runs.settings(40)
@given(
    specs=st.lists(fuzz.tensors, max_size=5),
    chosen=step_options,
    kept=st.sets(st.sampled_from(["vhat", "ema"])),
    formats=formats,
    calls=st.lists(
        st.tuples(fuzz.kinds, st.integers(1, 200) | st.integers(1, 2**53 + 1)),
        min_size=1,
        max_size=6,
    ),
    process=fuzz.processes,
)
def test_steps_of_guarded_arrays_equal_oracle(
    specs: list[fuzz.TensorSpec],
    chosen: dict[str, Any],
    kept: set[str],
    formats: dict[str, Any],
    calls: list[tuple[str, int]],
    process: dict[str, Any],
) -> None:
    STEPS["programs"] += 1
    rng = np.random.default_rng(process["seed"])
    if "ema" not in kept:
        chosen.pop("ema_momentum", None)  # refused without averages
    if fuzz.conflict({"rounding": chosen.get("rounding"), **formats}):
        del chosen["rounding"]
    without = {"m", "v", "vhat"} if formats["moments"] == "packed" else {"packed"}
    names = [name for name in KINDS if name not in without | ({"vhat", "ema"} - kept)]
    specs = [(shape, fuzz.fitting(dtype, formats), place) for shape, dtype, place in specs]
    lists = {name: draw(rng, name, specs, calls[0][0], formats) for name in KINDS}
    for kind, step in calls:
        lists["grads"] = draw(rng, "grads", specs, kind, formats)
        arrays: dict[str, Any] = {n: [held and held.array for held in lists[n]] for n in names}
        before = copy.deepcopy(arrays)
        with running(isa=process["isa"], threads=process["threads"]):
            for fault in rng.choice(["overlap", "one missing", *BAD], 2):
                spoilt = refused_arguments(arrays, rng, fault)
                if spoilt is not None:
                    STEPS["refused calls"] += 1
                    hypothesis.note(f"fault: {fault}")
                    with pytest.raises((TypeError, ValueError)):
                        adam_step(**spoilt, step=step, **chosen)
                    check(lists, before)
            if len(specs) == 1:
                # A single tensor may also be given without a list.
                arrays = {n: a[0] for n, a in arrays.items()}
            adam_step(**arrays, step=step, **chosen)
        STEPS["calls"] += 1
        check(lists, expected_of(before, step, chosen))


@hypothesis.seed(fuzz_runs.SEED)
@fuzz_runs.settings(40)
@given(
    specs=st.lists(fuzz.tensors, max_size=5),
    kind=fuzz.kinds,
    is_strided=st.booleans(),
    clips=st.fixed_dictionaries(
        {"clipvalue": fuzz.SETTINGS["clipvalue"], "clipnorm": fuzz.SETTINGS["clipnorm"]}
    )
    | st.fixed_dictionaries({n: fuzz.SETTINGS[n] for n in ("clipvalue", "clipnorm_per_tensor")}),
    process=fuzz.processes,
)
def test_norms_and_clipping_of_guarded_arrays_equal_oracle(
    specs: list[fuzz.TensorSpec],
    kind: str,
    is_strided: bool,
    clips: dict[str, Any],
    process: dict[str, Any],
) -> None:
    NORMS["calls"] += 2
    rng = np.random.default_rng(process["seed"])
    specs = [(shape, fuzz.gradient_dtype(rng, dtype), place) for shape, dtype, place in specs]
    drawn = [fuzz.numbers(rng, shape, dtype, kind) for shape, dtype, _ in specs]
    wide = list(map(storage.widen, drawn))
    held = [Guarded(x, place) for x, (_, _, place) in zip(drawn, specs, strict=True)]
    arrays = [guarded.array for guarded in held]
    if is_strided:
        pairs = [fuzz.strided(x, place) for x, (_, _, place) in zip(drawn, specs, strict=True)]
        held, arrays = [guarded for guarded, _ in pairs], [array for _, array in pairs]
    with running(isa=process["isa"], threads=process["threads"]):
        norm = global_norm(arrays)
        clipped = Adam(**clips).get_gradients(arrays, drawn if is_strided else arrays)
    assert_same_bits(np.array(norm), np.array(oracle.global_norm(wide)), "norm")
    assert_all_same_bits(clipped, oracle.clip(wide, **clips), "clipped")
    assert_all_same_bits(arrays, drawn, "what was read")
    for guarded in held:
        guarded.assert_canaries_alive()
