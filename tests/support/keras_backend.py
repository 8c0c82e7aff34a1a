# SPDX-License-Identifier: MIT
"""Keras 3 for tests, on one backend. A test module that imports this is skipped without Keras.

Keras has one backend per process, chosen when it is first imported: that of KERAS_BACKEND, or else
the first one installed, with torch before all others.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Final

import pytest

INSTALLED: Final = [
    name for name in ("torch", "tensorflow", "jax") if importlib.util.find_spec(name) is not None
]
BACKEND: Final = os.environ.get("KERAS_BACKEND") or next(iter(INSTALLED), "")
# Not by trying: a failed import of Keras would leave half-loaded modules behind.
if importlib.util.find_spec("keras") is None or BACKEND not in INSTALLED:
    pytest.skip(f"needs Keras 3 and its backend {BACKEND or 'torch'}", allow_module_level=True)
os.environ["KERAS_BACKEND"] = BACKEND

import keras as _keras

keras: Any = _keras
