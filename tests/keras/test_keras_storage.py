# SPDX-License-Identifier: MIT
"""16-bit variables and compressed state of the Keras optimizers, on the torch backend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import ml_dtypes
import numpy as np
import pytest

keras = pytest.importorskip("keras")
torch = pytest.importorskip("torch")
if keras.backend.backend() != "torch":
    pytest.skip("needs Keras with the torch backend", allow_module_level=True)

import fusedadam.keras
from helpers import Array, assert_all_same_bits
from oracle import OracleAdam

FORMATS = {
    "bf16": ("bfloat16", {}),
    "bf16, nearest": ("bfloat16", {"rounding": "nearest"}),
    "bf16, float32 moments": ("bfloat16", {"moments": "float32", "low_bits": "int16"}),
    "7 bytes": ("bfloat16", {"moments": "packed", "low_bits": "int8", "seed": 3}),
    "f16": ("float16", {"moments": "packed"}),
    "f32, packed": ("float32", {"moments": "packed"}),
}
OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "norm": {"global_clipnorm": 0.1},
    "average": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
}


def array_of(tensor: Any) -> Array:
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy().copy()  # type: ignore[no-any-return]
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dtype", "formats"), FORMATS.values(), ids=FORMATS)
def test_steps_equal_those_of_the_oracle(
    dtype: str, formats: dict[str, Any], options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype("float32") for shape in ((70,), (3, 5))]
    variables = [keras.Variable(x, dtype=dtype) for x in start]
    optimizer = fusedadam.keras.Adam(0.01, epsilon=1e-7, **formats, **options)
    ours = {**options, **({"moments": "bfloat16"} if dtype == "bfloat16" else {}), **formats}
    if "global_clipnorm" in ours:
        ours["clipnorm"] = ours.pop("global_clipnorm")
    params = [array_of(variable._value) for variable in variables]
    oracle = OracleAdam(params, lr=float(np.float32(0.01)), epsilon=1e-7, **ours)
    for _ in range(4):
        grads = [torch.tensor(rng.standard_normal(p.shape)).to(variables[0]._value) for p in params]
        optimizer.apply(grads, variables)
        oracle.step([array_of(grad) for grad in grads])
        assert_all_same_bits([array_of(v._value) for v in variables], oracle.params)
        for kind, name in (("packed", "_momentums"), ("m", "_momentums"), ("ema", "_averages")):
            expected = getattr(oracle, kind)
            own = getattr(
                optimizer, name.replace("_averages", "_model_variables_moving_average"), []
            )
            if expected:
                assert_all_same_bits([array_of(v._value) for v in own], expected, kind)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("dtype", "formats"), FORMATS.values(), ids=FORMATS)
def test_model_of_a_policy_trains_and_continues_from_a_file(
    dtype: str, formats: dict[str, Any], tmp_path: Path
) -> None:
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(1).standard_normal((256, 8)).astype("float32")
    y = x[:, :1] - x[:, 1:2]
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, "tanh", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )
    model.compile(fusedadam.keras.AdamW(0.02, weight_decay=0.0, **formats), loss="mse")
    losses = model.fit(x, y, epochs=8, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(x, y, epochs=1, verbose=0, shuffle=False)
    assert_all_same_bits(
        [array_of(v._value) for v in [*loaded.weights, *loaded.optimizer.variables]],
        [array_of(v._value) for v in [*model.weights, *model.optimizer.variables]],
    )


@pytest.mark.parametrize(("dtype", "formats"), FORMATS.values(), ids=FORMATS)
def test_norm_that_is_not_finite_clips_as_in_keras(dtype: str, formats: dict[str, Any]) -> None:
    variable = keras.Variable(np.ones(4), dtype=dtype)
    optimizer = fusedadam.keras.Adam(0.1, global_clipnorm=1.0, **formats)
    grad = torch.tensor([1.0, float("inf"), 1.0, 1.0]).to(variable._value)
    optimizer.apply([grad], [variable])
    # The other gradients become 0, and inf * 0 is NaN.
    assert array_of(variable._value).astype("float32").tolist()[::2] == [1, 1]
    assert np.isnan(array_of(variable._value).astype("float32")[1])
    assert int(optimizer.iterations) == 1
