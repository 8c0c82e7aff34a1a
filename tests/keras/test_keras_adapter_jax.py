# SPDX-License-Identifier: MIT
"""The Keras 3 adapter on JAX: in place within the jitted training step, and its memory."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import numpy as np
import pytest
from fresh_python import output_of
from helpers import Array, assert_all_same_bits
from keras_adapter import (
    ON_JAX,
    SHAPES,
    Calls,
    Trained,
    adapter,
    array,
    floatx,
    keras,
    stored_variables,
    tensor,
    variable,
)

if not ON_JAX:
    pytest.skip("Keras runs on torch in this process", allow_module_level=True)

import jax
import jax.numpy as jnp
from fusedadam.keras import jax_step

# Raised by Keras itself when it converts a variable to an array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def model_of(optimizer: Any, width: int, **settings: Any) -> Any:
    """Two dense layers, the same each time."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(width) for _ in range(2)]
    model = keras.Sequential([keras.layers.Input((width,)), *layers])
    model.compile(optimizer=optimizer, loss="mse", **settings)
    model.optimizer.build(model.trainable_variables)
    return model


def data(width: int, rows: int) -> Array:
    return np.random.default_rng(1).standard_normal((rows, width)).astype("float32")


# -- in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True, "global_clipnorm": 1.0, "use_ema": True, "loss_scale_factor": 8.0},
        {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 2},
    ],
    ids=str,
)
def test_training_step_copies_nothing(options: dict[str, Any]) -> None:
    model = model_of(adapter.AdamW(**options), 128)
    if hasattr(model, "_record_training_state_sharding_spec"):  # before Keras 3.12
        model._record_training_state_sharding_spec()
    of_all = ("trainable", "non_trainable", "optimizer", "metrics")
    state = model._get_jax_state(**{f"{kind}_variables": True for kind in of_all})
    step = jax.jit(model.train_step, donate_argnums=0)
    program: Any = step.lower(state, (data(128, 2), data(128, 2), None)).compile()
    assert not re.search(r"\[128,128\]\S* copy\(", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 128 * 128 * 4


def test_fit_maps_no_memory() -> None:
    resource: Any = pytest.importorskip("resource")  # not on Windows
    # XLA allocates what is temporary anew at each step: without a memory, 34 MB for gradients. The
    # C library maps an array of more than 32 MB anew each time.
    steps, x = 8, data(2_048, 16)
    model = model_of(adapter.Adam(), 2_048)
    model.fit(x, x, batch_size=2, verbose=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model.fit(x, x, batch_size=2, verbose=0)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults / steps < 34e6 / resource.getpagesize() / 10


def test_steps_of_several_calls_accumulate() -> None:
    starts = [np.full(i % 3 + 1, float(i), "float32") for i in range(40)]
    trained = Trained(starts=starts, gradient_accumulation_steps=2, global_clipnorm=0.5)
    trained.train(4)


WAYS: list[dict[str, Any]] = [
    {"run_eagerly": True},
    {"jit_compile": False},
    {"steps_per_execution": 3},
    {},
]


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_other_ways_to_train(settings: dict[str, Any]) -> None:
    x = data(4, 10)
    models = [model_of(adapter.Adam(0.01), 4, **each) for each in ({}, settings)]
    models[0].fit(x, x, batch_size=2, shuffle=False, verbose=0)
    if settings:
        models[1].fit(x, x, batch_size=2, shuffle=False, verbose=0)
    else:
        for i in range(0, 10, 2):
            models[1].train_on_batch(x[i : i + 2], x[i : i + 2])
    for a, b in zip(*(stored_variables(m.optimizer) + m.weights for m in models), strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-6)


# -- the memory for gradients -----------------------------------------------------------------


def test_memory_is_last_and_has_the_gradients_of_programs() -> None:
    trained = Trained()
    trained.train(2)
    optimizer = trained.optimizer
    stored = stored_variables(optimizer)
    memory = optimizer.variables[len(stored) :]
    assert optimizer.variables[: len(stored)] == stored
    assert [v.shape for v in memory] == SHAPES
    grads = trained.gradients()
    trained.call(grads)
    assert_all_same_bits([array(v) for v in memory], grads)
    # Not in a call outside of programs, where another array would be that of the gradient,
    optimizer.apply([v.value for v in trained.variables], trained.variables)
    assert_all_same_bits([array(v) for v in memory], grads)
    # nor of another dtype.
    calls = Calls(optimizer, trained.variables, compiled=True)
    calls([tensor(np.ones(shape), "bfloat16") for shape in SHAPES])
    assert_all_same_bits([array(v) for v in memory], grads)


@pytest.mark.parametrize("built", [False, True])
def test_no_memory_within_another_optimizer(built: bool) -> None:
    inner, variables = adapter.Adam(), [variable(np.ones(3, "float32"))]
    if built:
        inner.build(variables)
    keras.optimizers.LossScaleOptimizer(inner).build(variables)
    assert inner.variables == stored_variables(inner)


def test_variable_overwritten_with_gradients_beside_averages() -> None:
    # Keras' own code fails, since the variable has no average.
    optimizer = adapter.Adam(use_ema=True, ema_overwrite_frequency=1, gradient_accumulation_steps=2)
    variables = [variable(np.ones(3, "float32")) for _ in range(2)]
    variables[1].overwrite_with_gradient = True
    for _ in range(2):
        optimizer.apply([tensor(np.full(3, 7.0))] * 2, variables)
    average = optimizer._model_variables_moving_average[0]
    assert_all_same_bits([array(variables[0])], [array(average)])
    np.testing.assert_array_equal(array(variables[1]), 7.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_gradients_of_other_dtypes(dtype: str) -> None:
    results = []
    with floatx("float64"):
        for of in (dtype, "float32"):
            variables = [variable(np.ones(3, "float32"))]
            adapter.Adam().apply([tensor([0.5, -3.0, 0.0], of)], variables)
            results.append(array(variables[0]))
    assert_all_same_bits(results[:1], results[1:])


def test_older_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_step, "KERAS_VERSION", (3, 9))
    with pytest.raises(ValueError, match=r"AdamW must run on Keras 3\.10 or later.* Received: "):
        adapter.AdamW()


# -- where variables are ----------------------------------------------------------------------


def test_two_devices() -> None:
    # JAX counts devices once, so in a process of its own.
    code = "import keras_devices; keras_devices.check()"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "KERAS_BACKEND": "jax"}
    output_of(code, environment=flags | {"PYTHONWARNINGS": "ignore"})


def test_variables_on_another_device() -> None:
    far = mock.Mock(path="far", dtype="float32", overwrite_with_gradient=False)
    far._value.devices.return_value = {mock.Mock(platform="gpu"), mock.Mock(platform="cpu")}
    message = r"'far' must be on the CPU: .*JAX_PLATFORMS=cpu.* Received: device='gpu'"
    with pytest.raises(ValueError, match=message):
        adapter.Adam().build([far])


def test_variables_without_values_yet() -> None:
    optimizer = adapter.Adam()
    with keras.StatelessScope():
        variables = [keras.Variable("ones", shape=(3,))]
        optimizer.build(variables)
    optimizer.apply([jnp.ones(3)], variables)
    np.testing.assert_allclose(array(variables[0]), 0.999)


@pytest.mark.parametrize(
    ("rate", "shape", "error", "reason"),
    [
        (0.1, (2,), ValueError, r"'b' must have the shape .* \(3,\)\. Received: shape=\(2,\)"),
        (float("nan"), (3,), RuntimeError, r"lr must be .* Received: lr=nan"),
    ],
)
def test_refused_call_changes_nothing(rate: float, shape: Any, error: Any, reason: str) -> None:
    variables = [variable(np.ones(n, "float32"), name=name) for name, n in (("a", 2), ("b", 3))]
    optimizer = adapter.Adam(rate)
    with pytest.raises(error, match=reason):
        optimizer.apply([jnp.ones(2), jnp.ones(shape)], variables)
    assert [np.unique(array(v)).tolist() for v in variables] == [[1], [1]]
    assert not any(np.any(array(v)) for v in optimizer.variables[2:])
    assert int(optimizer.iterations) == 0
