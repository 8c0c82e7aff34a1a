# SPDX-License-Identifier: MIT
"""Lists of weights as Keras 3 saves them, and the adapter on backends that it does not support.

These tests, and those of the adapter, run on every backend that is installed, one of them in this
process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_python import run_python
from fusedadam import Adam
from helpers import Array, assert_all_same_bits
from keras_backend import BACKEND, INSTALLED, keras

# Raised by Keras itself on its torch backend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Set in the processes of other backends.
NESTED_NAME = "FUSEDADAM_OTHER_BACKEND"
NESTED = NESTED_NAME in os.environ

SHAPES: list[tuple[int, ...]] = [(6, 4), (4,), ()]
# Parameters of one shape, where the shape does not tell m from v.
ALIKE: list[tuple[int, ...]] = [(5,)] * 3


def saved(shapes: list[tuple[int, ...]], **options: Any) -> Any:
    """A Keras optimizer after three steps with gradients below zero."""
    variables = [keras.Variable(np.ones(shape), dtype="float32") for shape in shapes]
    theirs = keras.optimizers.Adam(**options)
    theirs.build(variables)
    for step in range(1, 4):
        grads = [np.full(v.shape, -(step + i), "float32") for i, v in enumerate(variables)]
        theirs.apply([keras.ops.convert_to_tensor(g) for g in grads], variables)
    return theirs


def built(shapes: list[tuple[int, ...]], **options: Any) -> Adam:
    adam = Adam(**options)
    adam.build([np.ones(shape, "float32") for shape in shapes])
    return adam


def as_array(variable: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(variable))


def kind_of(theirs: Any, name: str) -> list[Array]:
    return [as_array(v) for v in theirs.variables if v.path.endswith(name)]


@pytest.mark.parametrize("shapes", [SHAPES, ALIKE], ids=str)
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("use_ema", [False, True])
def test_list_is_read_in_the_order_of_keras(
    shapes: list[tuple[int, ...]], schedule: bool, amsgrad: bool, use_ema: bool
) -> None:
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5) if schedule else 0.25
    options = {"amsgrad": amsgrad, "use_ema": use_ema}
    theirs = saved(shapes, learning_rate=rate, **options)
    adam = built(shapes, **options)
    adam.set_weights([as_array(v) for v in theirs.variables])
    kinds = ("_momentum", "_velocity", "_velocity_hat")
    moments = [array for kind in kinds for array in kind_of(theirs, kind)]
    assert_all_same_bits(adam.weights, [np.array(3, np.int64), *moments])
    assert_all_same_bits(adam.ema, kind_of(theirs, "_average"))
    assert adam.lr == (0.001 if schedule else 0.25)


@pytest.mark.parametrize(
    "options", [{"use_ema": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_list_with_more_than_moments_is_refused(options: dict[str, Any]) -> None:
    weights = [as_array(v) for v in saved(SHAPES, **options).variables]
    with pytest.raises(ValueError, match="averages or accumulated gradients of Keras"):
        built(SHAPES).set_weights(weights)


# -- other backends ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adapter_refuses_other_backends(name: str) -> None:
    def loaded() -> set[str]:
        return {"torch", "jax", "tensorflow"} & {module.partition(".")[0] for module in sys.modules}

    before = loaded()
    import fusedadam.keras as adapter

    assert loaded() == before
    ours, theirs = (getattr(module, name) for module in (adapter, keras.optimizers))
    if BACKEND in ("torch", "jax"):
        assert isinstance(ours(0.01), theirs)
        return
    with pytest.raises(ValueError, match=f"slower than keras.optimizers.{name}") as caught:
        ours(0.01)
    message = str(caught.value)
    assert message.startswith(f"fusedadam.keras.{name} must run on the torch or JAX backend of Ker")
    assert message.endswith(f"Received: backend={BACKEND!r}")


@pytest.mark.parametrize("backend", [b for b in INSTALLED if b != BACKEND and not NESTED])
def test_other_backends(backend: str) -> None:
    """Run the tests of other backends, each in a process of its own."""
    files = [str(path) for path in Path(__file__).parent.glob("test_keras*.py")]
    code = f"""
        import pytest
        raise SystemExit(pytest.main(["-p", "no:cacheprovider", "-q", *{files}]))
    """
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    done = run_python(code, environment={**quiet, NESTED_NAME: "1"}, time_limit=600)
    assert done.returncode == 0, done.stdout + done.stderr
