# SPDX-License-Identifier: MIT
"""The calls below `fusedadam.jax`: the ABI, and calls that no program of this package makes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from fresh_python import run_python
from fusedadam import xla

SOURCES = Path(__file__).parents[2]


def test_the_abi_is_that_of_this_jaxlib() -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++20", "-fsyntax-only", "-I", str(SOURCES / "src/cpp")]
    command += [
        "-isystem",
        jax.ffi.include_dir(),
        str(SOURCES / "tests/cpp/bindings/test_xla_ffi.cpp"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_jax_without_the_interface_is_refused() -> None:
    done = run_python("import jax; del jax.ffi; import fusedadam.jax")
    said = rf"upgrade jax\. Received: jax {re.escape(jax.__version__)}$"
    assert re.search(
        f"^ImportError: steps in JAX need jax.ffi, .*{said}", done.stderr, re.MULTILINE
    )


COUNT = jnp.int32(0)
LR = jnp.float32(0.1)
X = jnp.ones(3)

MALFORMED: dict[str, tuple[list[Any], list[Any], dict[str, Any], str]] = {
    "another count": ([jnp.uint8(0), LR], [jnp.uint8(0)], {}, "count must be int32"),
    "another rate": ([COUNT, COUNT], [COUNT], {}, "lr must be float32 or float64, or the bits"),
    "no rate": ([COUNT], [COUNT], {}, "a call needs more arguments. Received: 1"),
    "no moments": ([COUNT, LR, X, X], [COUNT, X], {}, "a call needs more arguments. Received: 4"),
    "no result": (
        [COUNT, LR, X, X, X, X],
        [COUNT, X],
        {},
        "a call needs more results. Received: 2",
    ),
    "another result": (
        [COUNT, LR, X, X, X, X],
        [COUNT, jnp.ones(4), X, X],
        {},
        "a result must have the type and size of its argument",
    ),
    "another size": (
        [COUNT, LR, X, jnp.ones(4), X, X],
        [COUNT, X, X, X],
        {},
        r"tensors\[0\].grad must have the size of its parameter, 3. Received: 4",
    ),
    "another type": (
        [COUNT, LR, jnp.arange(3), X, X, X],
        [COUNT, jnp.arange(3), X, X],
        {},
        "a tensor must be float32, .* Received: XLA's type 4",
    ),
    "moments of another type": (
        [COUNT, LR, X, X, jnp.ones(3, jnp.float16), X],
        [COUNT, X, jnp.ones(3, jnp.float16), X],
        {},
        r"tensors\[0\].m must be float32 .* Received: float16",
    ),
    "no tensor of that index": (
        [COUNT, LR],
        [COUNT],
        {"undecayed": np.asarray([0], np.int64)},
        "INVALID_ARGUMENT",
    ),
    "a scalar for an array": (
        [COUNT, LR],
        [COUNT],
        {"undecayed": np.int64(0)},
        "attribute undecayed must be an array of int64",
    ),
    "an integer for a switch": (
        [COUNT, LR],
        [COUNT],
        {"amsgrad": np.int64(1)},
        "attribute amsgrad must be a scalar of XLA's type 1",
    ),
    "an unknown name": (
        [COUNT, LR],
        [COUNT],
        {"moments": "tiny"},
        "attribute moments must be the name of a value. Received: tiny",
    ),
    "a number for a name": (
        [COUNT, LR],
        [COUNT],
        {"rounding": np.int64(1)},
        "attribute rounding must be the name of a value",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_calls_are_refused(name: str) -> None:
    arguments, results, attributes, message = MALFORMED[name]
    shapes = [jax.ShapeDtypeStruct(jnp.shape(a), a.dtype) for a in results]
    with pytest.raises(Exception, match=re.compile(message, re.DOTALL)):
        jax.block_until_ready(jax.ffi.ffi_call(xla.NAMES["step"], shapes)(*arguments, **attributes))
