# SPDX-License-Identifier: MIT
"""The floating-point environment: no step on any thread depends on the caller's or changes it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from fresh_python import output_of
from fusedadam import Adam, adam_step
from helpers import Array, assert_all_same_bits, state
from step_scripts import LARGE, SMALL

# fenv.h of glibc: the words of fenv_t with the control bits and the flags, and the relevant bits.
FENV = {
    # 28 bytes of x87 state, then MXCSR: flags 0-5, DAZ 6, masks 7-12, rounding 13-14, FTZ 15.
    "x86_64": {
        "words": 8,
        "control": 7,
        "upward": 2 << 13,
        "downward": 1 << 13,
        "to zero": 3 << 13,
        "flush": 1 << 15 | 1 << 6,
        "flags": 7,
        "all flags": 0x3D,
    },
    # FPCR: rounding 22-23, FZ 24. FPSR: flags 0-4.
    "aarch64": {
        "words": 2,
        "control": 0,
        "upward": 1 << 22,
        "downward": 2 << 22,
        "to zero": 3 << 22,
        "flush": 1 << 24,
        "flags": 1,
        "all flags": 0x1F,
    },
}.get(platform.machine(), {})
needs_fenv = pytest.mark.skipif(
    not FENV or platform.libc_ver()[0] != "glibc", reason="knows the layout of glibc's fenv_t only"
)


class FloatEnvironment:
    """The control bits (rounding, flushing) and exception flags of the calling thread."""

    def __init__(self) -> None:
        self._libm = ctypes.CDLL("libm.so.6")
        self._words = ctypes.c_uint32 * FENV["words"]
        self._saved = self._get()

    def _get(self) -> list[int]:
        words = self._words()
        assert self._libm.fegetenv(words) == 0
        return list(words)

    def set(self, *names: str, flags: int = 0) -> None:
        words = list(self._saved)
        words[FENV["control"]] |= sum(FENV[name] for name in names)
        words[FENV["flags"]] &= ~FENV["all flags"]
        words[FENV["flags"]] |= flags
        assert self._libm.fesetenv(self._words(*words)) == 0

    def control(self) -> int:
        return self._get()[FENV["control"]] & ~(
            FENV["all flags"] if FENV["control"] == FENV["flags"] else 0
        )

    def flags(self) -> int:
        return self._get()[FENV["flags"]] & FENV["all flags"]

    def restore(self) -> None:
        assert self._libm.fesetenv(self._words(*self._saved)) == 0


@pytest.fixture
def environment() -> Iterator[FloatEnvironment]:
    environment = FloatEnvironment()
    try:
        yield environment
    finally:
        environment.restore()


def with_subnormals(rng: np.random.Generator, size: int, dtype: str) -> tuple[Array, ...]:
    """Tensors whose results would differ with any other rounding mode, with FTZ and with DAZ."""
    p, g, m, v = state(rng, size, dtype)
    tiny = np.finfo(p.dtype).smallest_normal
    g[::3] *= tiny  # subnormal gradients and moments, and squares that underflow
    m[::3] *= tiny
    v[::3] *= tiny
    p[::5] *= tiny
    return p, g, m, v


MODES = [("upward",), ("downward",), ("to zero",), ("flush",), ("upward", "flush")]


@needs_fenv
@pytest.mark.parametrize("modes", MODES, ids="+".join)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_environment_of_the_caller_is_not_used(
    rng: np.random.Generator,
    environment: FloatEnvironment,
    threads: int,
    dtype: str,
    size: int,
    modes: tuple[str, ...],
) -> None:
    p, g, m, v = with_subnormals(rng, size, dtype)
    expected = oracle.adam_step(p, g, m, v, step=3, lr=0.7, flush_denormals=False)
    environment.set(*modes)
    adam_step(p, g, m, v, step=3, lr=0.7, flush_denormals=False)
    environment.restore()
    assert_all_same_bits([p, m, v], expected, f"threads={threads}")


@needs_fenv
@pytest.mark.parametrize("modes", MODES, ids="+".join)
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_environment_of_the_caller_is_not_used_by_an_optimizer(
    rng: np.random.Generator, environment: FloatEnvironment, size: int, modes: tuple[str, ...]
) -> None:
    # Decay, the powers of beta, the norm and the clip scale are scalars, which are rounded as well.
    p, g, _, _ = with_subnormals(rng, size, "float32")
    q, h, _, _ = state(rng, size, "float64")
    options: dict[str, Any] = {
        "lr": 0.7,
        "decay": 0.3,
        "clipnorm": 0.9,
        "clipvalue": 0.1,
        "flush_denormals": False,
    }
    reference = oracle.OracleAdam([p, q], **options)
    clipped = oracle.clip([g, h], clipnorm=0.9, clipvalue=0.1)
    for _ in range(3):
        reference.step([g, h])
    environment.set(*modes)
    optimizer = Adam(**options)
    returned = optimizer.get_gradients([g, h], [p, q])
    for _ in range(3):
        optimizer.apply_gradients([(g, p), (h, q)])
    environment.restore()
    assert_all_same_bits(returned, clipped)
    assert_all_same_bits([p, q], reference.params)
    assert_all_same_bits(optimizer.weights, reference.weights())


@needs_fenv
@pytest.mark.parametrize("modes", [(), *MODES], ids="+".join)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("flags", ["clear", "set"])
def test_environment_of_the_caller_is_not_changed(
    rng: np.random.Generator,
    environment: FloatEnvironment,
    threads: int,
    size: int,
    modes: tuple[str, ...],
    flags: str,
) -> None:
    p, g, m, v = with_subnormals(rng, size, "float32")
    g[:3] = np.nan, np.inf, 1e30  # invalid, overflow; with epsilon 0 also a division by zero
    g[3] = m[3] = v[3] = 0
    optimizer = Adam(epsilon=0.0, decay=0.1, clipnorm=1e30)
    q = p.copy()
    optimizer.apply_gradients([(g, q)])
    raised = 0 if flags == "clear" else FENV["all flags"]
    environment.set(*modes, flags=raised)
    control = environment.control()
    adam_step(p, g, m, v, step=3, epsilon=0.0)
    after_function = environment.control(), environment.flags()
    environment.set(*modes, flags=raised)
    optimizer.apply_gradients([(g, q)])
    after_method = environment.control(), environment.flags()
    environment.restore()
    assert np.isnan(p[:4]).any(), f"the step raises every flag, threads={threads}"
    assert after_function == (control, raised)
    assert after_method == (control, raised)


@needs_fenv
@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_threads_started_under_another_environment(modes: tuple[str, ...]) -> None:
    # A new thread inherits the environment of its creator, and OpenMP threads persist.
    code = f"""
        import numpy as np, oracle
        from helpers import assert_all_same_bits
        from step_scripts import LARGE
        from test_float_environment import FloatEnvironment, with_subnormals
        from fusedadam import adam_step
        cases = [with_subnormals(np.random.default_rng(i), LARGE, "float32") for i in range(2)]
        options = dict(step=3, lr=0.7, flush_denormals=False)
        expected = [oracle.adam_step(*case, **options) for case in cases]
        environment = FloatEnvironment()
        environment.set(*{modes!r})
        adam_step(*cases[0], **options)  # starts the threads
        environment.restore()
        adam_step(*cases[1], **options)
        for (p, _, m, v), arrays in zip(cases, expected):
            assert_all_same_bits([p, m, v], arrays)
        print("same")
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "same"


@needs_fenv
def test_import_changes_no_floating_point_setting() -> None:
    # A library linked with -ffast-math sets FTZ and DAZ for the process that loads it.
    code = """
        import ctypes
        import numpy as np
        libm, words = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()

        def control():
            # The x87 control word and MXCSR without its exception flags. The rest holds pointers
            # to the last x87 instruction, which a context switch clears.
            libm.fegetenv(words)
            return words[0] & 0xFFFF, words[7] & ~0x3F

        before = control()
        import fusedadam
        fusedadam.Adam().get_updates([np.ones(100_000)], [np.ones(100_000)])
        after = control()
        tiny = np.array([5e-324]), np.array([1e-45], "float32")
        print(before == after, *(float((t * 1)[0]) > 0 for t in tiny), 5e-324 * 1.0 > 0)
    """
    assert output_of(code) == "True True True True"
