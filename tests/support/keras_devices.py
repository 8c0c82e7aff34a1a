# SPDX-License-Identifier: MIT
"""Training with Keras on two devices of a CPU, for a process of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from fusedadam.keras import Adam
from keras_backend import keras

OPTIONS: dict[str, Any] = {"moments": "packed", "global_clipnorm": 0.1, "use_ema": True}


def check() -> None:
    """Compare with training on one device."""
    distribution = keras.distribution
    devices = distribution.list_devices()
    layouts = distribution.LayoutMap(distribution.DeviceMesh((1, 2), ("batch", "model"), devices))
    layouts[".*/kernel"], layouts[".*/bias"] = (None, "model"), ("model",)
    by_parts = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    expected = _trained(None)
    for among in (distribution.DataParallel(devices=devices), by_parts):
        for a, b in zip(_trained(among), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def _trained(among: Any) -> list[Any]:
    keras.distribution.set_distribution(among)
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(6)])
    model.compile(optimizer=Adam(0.01, **OPTIONS), loss="mse")
    x = np.random.default_rng(1).standard_normal((24, 8)).astype("float32")
    model.fit(x, x[:, :6], batch_size=4, shuffle=False, verbose=0)
    return [np.asarray(v) for v in model.weights]
