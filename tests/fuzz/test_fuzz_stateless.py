# SPDX-License-Identifier: MIT
"""The stateless functions, with everything that they read and write between guard pages.

That includes moments, vhat and averages, which `Adam` keeps in its own memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import fusedadam
import fuzz_runs
import hypothesis
import numpy as np
import oracle
import pytest
import storage_oracle as storage
from fusedadam import Adam, adam_step, global_norm
from fuzz_faults import BAD_PARAMS
from fuzz_values import (
    SETTINGS,
    TAME,
    WILD,
    TensorSpec,
    conflict,
    fitting,
    gradient_dtype,
    numbers,
    seeds,
    strided,
    tensors,
)
from guarded import PLACES, Guarded
from helpers import Array, assert_all_same_bits, assert_same_bits, running
from hypothesis import given
from hypothesis import strategies as st

STEPS = fuzz_runs.tally("adam_step")
NORMS = fuzz_runs.tally("global_norm and get_gradients")

KINDS: Final = ("params", "grads", "m", "v", "packed", "low_bits", "vhat", "ema")
Lists: TypeAlias = dict[str, list[Guarded | None]]

_NAMES = (
    *("lr", "beta_1", "beta_2", "epsilon", "decay", "bias_corrected_epsilon", "ema_momentum"),
    *("weight_decay", "l2", "clipnorm", "clipvalue", "zero_grad", "maximize", "flush_denormals"),
    *("rounding", "seed"),
)
step_options = st.fixed_dictionaries(
    {}, optional={name: SETTINGS[name].filter(lambda value: not callable(value)) for name in _NAMES}
)
isas = st.sampled_from(fusedadam.supported_isas())
kinds = st.sampled_from(WILD)


def formats_of(dtype: str, formats: dict[str, Any]) -> dict[str, Any]:
    """The dtypes of all arrays of one parameter that have a fixed one."""
    param = np.dtype(dtype)
    moment = storage.moment_dtype(param, formats["moments"])
    dtypes = {"params": param, "ema": storage.compute_dtype(param), "vhat": moment}
    if formats["moments"] == "packed":
        dtypes["packed"] = np.dtype("int16")
    else:
        dtypes |= {"m": moment, "v": moment}
    if param == storage.BFLOAT16 and formats["low_bits"]:
        dtypes["low_bits"] = np.dtype(formats["low_bits"])
    return dtypes


def draw_lists(
    rng: np.random.Generator, specs: list[TensorSpec], kind: str, formats: dict[str, Any]
) -> Lists:
    """Arrays of each kind, each at its own end of the accessible pages."""
    lists: Lists = {}
    for name in KINDS:
        lists[name] = []
        for shape, dtype, _ in specs:
            named = formats_of(dtype, formats) | {"grads": gradient_dtype(rng, dtype)}
            if name not in named:
                lists[name].append(None)
                continue
            drawn = numbers(rng, shape, str(named[name]), kind)
            if name in ("v", "vhat") and kind in TAME:
                drawn = np.asarray(np.abs(drawn))
            lists[name].append(Guarded(drawn, PLACES[int(rng.integers(2))]))
    return lists


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


def check(lists: Lists, expected: dict[str, list[Any]]) -> None:
    for name, arrays in expected.items():
        for held, array in zip(lists[name], arrays, strict=True):
            if held is not None:
                assert_same_bits(held.array, array, name)
    for held in itertools.chain(*lists.values()):
        if held is not None:
            held.assert_canaries_alive()


# These change which state the arguments ask for, or nothing.
NO_FAULTS: Final = {
    "packed": ("int16",),
    "low_bits": ("int16", "None", "swapped bytes", "misaligned"),
}


def refused_arguments(
    arrays: dict[str, list[Any]], rng: np.random.Generator, fault: str
) -> dict[str, Any] | None:
    """The arguments of a step with one fault, or None if these arrays cannot have it."""
    name = str(rng.choice([n for n in arrays if n != "grads"]))
    filled = [i for i, a in enumerate(arrays[name]) if a is not None and a.size > 1]
    if not filled or fault in NO_FAULTS.get(name, ()):
        return None
    i = int(rng.choice(filled))
    spoilt = {n: list(a) for n, a in arrays.items()}
    if fault == "overlap":
        there = [n for n, a in arrays.items() if n not in (name, "grads") and a[i] is not None]
        other = str(rng.choice(there))
        spoilt[name][i] = spoilt[other][i]
    elif fault == "one missing":
        spoilt[name].pop()
    else:
        spoilt[name][i] = BAD_PARAMS[fault](spoilt[name][i])
    return spoilt


@hypothesis.seed(fuzz_runs.SEED)
@fuzz_runs.settings(40)
@given(
    specs=st.lists(tensors, max_size=5),
    chosen=step_options,
    kept=st.sets(st.sampled_from(["vhat", "ema"])),
    formats=st.fixed_dictionaries(
        {
            "moments": SETTINGS["moments"].filter(lambda moments: moments != "auto"),
            "low_bits": SETTINGS["low_bits"],
        }
    ),
    calls=st.lists(
        st.tuples(
            kinds,
            st.one_of(st.integers(1, 200), st.integers(1, 2**53 + 1)),
            st.sampled_from(["overlap", "one missing", *BAD_PARAMS]),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=seeds,
    isa=isas,
    threads=st.integers(1, 4),
)
def test_steps_of_guarded_arrays_equal_oracle(
    specs: list[TensorSpec],
    chosen: dict[str, Any],
    kept: set[str],
    formats: dict[str, Any],
    calls: list[tuple[str, int, str]],
    seed: int,
    isa: str,
    threads: int,
) -> None:
    STEPS["programs"] += 1
    rng = np.random.default_rng(seed)
    if "ema" not in kept:
        chosen.pop("ema_momentum", None)  # refused without averages
    if conflict({"rounding": chosen.get("rounding"), **formats}):
        del chosen["rounding"]
    is_packed = formats["moments"] == "packed"
    without = {"m", "v", "vhat"} if is_packed else {"packed"}
    without |= {"vhat", "ema"} - kept
    names = [name for name in KINDS if name not in without]
    specs = [(shape, fitting(dtype, formats), place) for shape, dtype, place in specs]
    lists = draw_lists(rng, specs, calls[0][0], formats)
    for kind, step, fault in calls:
        lists["grads"] = draw_lists(rng, specs, kind, formats)["grads"]
        arrays: dict[str, Any] = {n: [held and held.array for held in lists[n]] for n in names}
        before = copy.deepcopy(arrays)
        with running(isa=isa, threads=threads):
            spoilt = refused_arguments(arrays, rng, fault)
            if spoilt is not None:
                STEPS["refused calls"] += 1
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
    specs=st.lists(tensors, max_size=5),
    kind=kinds,
    is_strided=st.booleans(),
    by_tensor=st.booleans(),
    bound=SETTINGS["clipnorm"],
    clipvalue=SETTINGS["clipvalue"],
    seed=seeds,
    isa=isas,
    threads=st.integers(1, 4),
)
def test_norms_and_clipping_of_guarded_arrays_equal_oracle(
    specs: list[TensorSpec],
    kind: str,
    is_strided: bool,
    by_tensor: bool,
    bound: float | None,
    clipvalue: float | None,
    seed: int,
    isa: str,
    threads: int,
) -> None:
    NORMS["calls"] += 2
    rng = np.random.default_rng(seed)
    specs = [(shape, gradient_dtype(rng, dtype), place) for shape, dtype, place in specs]
    drawn = [numbers(rng, shape, dtype, kind) for shape, dtype, _ in specs]
    wide = list(map(storage.widen, drawn))
    make: Callable[[Array, Any], tuple[Guarded, Array]] = strided if is_strided else _contiguous
    pairs = [make(x, place) for x, (_, _, place) in zip(drawn, specs, strict=True)]
    arrays = [array for _, array in pairs]
    clips: dict[str, Any] = {
        "clipnorm_per_tensor" if by_tensor else "clipnorm": bound,
        "clipvalue": clipvalue,
    }
    with running(isa=isa, threads=threads):
        norm = global_norm(arrays)
        clipped = Adam(**clips).get_gradients(arrays, arrays if not is_strided else drawn)
    assert_same_bits(np.array(norm), np.array(oracle.global_norm(wide)), "norm")
    assert_all_same_bits(clipped, oracle.clip(wide, **clips), "clipped")
    assert_all_same_bits(arrays, drawn, "what was read")
    for held, _ in pairs:
        held.assert_canaries_alive()


def _contiguous(array: Array, place: Any) -> tuple[Guarded, Array]:
    held = Guarded(array, place)
    return held, held.array
