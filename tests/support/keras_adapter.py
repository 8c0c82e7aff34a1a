# SPDX-License-Identifier: MIT
"""`fusedadam.keras` for tests, with the oracle. Modules that import this are skipped without torch.

Keras keeps settings such as learning rates in float32, and counts its calls for all variables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import Array, assert_all_same_bits, values
from keras_backend import BACKEND, keras
from oracle import OracleAdam

if BACKEND != "torch":
    pytest.skip(f"Keras runs on {BACKEND}, and not on torch", allow_module_level=True)

import fusedadam.keras as adapter
import torch

__all__ = ["LR", "SHAPES", "Trained", "adapter", "array", "by_kind", "keras", "torch", "variable"]

SHAPES: list[tuple[int, ...]] = [(6, 4), (4,), (), (0, 3), (3, 5)]
LR = 2.0**-7  # exact in float32
KINDS = {
    "momentum": "_momentums",
    "velocity": "_velocities",
    "velocity_hat": "_velocity_hats",
    "average": "_model_variables_moving_average",
    "gradient_accumulator": "_accumulated_gradients",
}


def array(variable: Any) -> Array:
    """A copy of the value of a variable or tensor."""
    tensor = getattr(variable, "_value", variable).detach()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.array(tensor.numpy())


def variable(start: Array, dtype: str = "", **settings: Any) -> Any:
    """A variable with these values, of two dimensions in another memory layout.

    keras.initializers.Orthogonal makes such variables.
    """
    tensor = torch.empty(start.shape, dtype=getattr(torch, dtype or str(start.dtype)))
    if start.ndim == 2:
        tensor = tensor.t().contiguous().t()
    return keras.Variable(tensor.copy_(torch.from_numpy(start)), **settings)


def by_kind(optimizer: Any, variables: Sequence[Any]) -> dict[str, list[Array]]:
    """All variables. "v" holds those of the model."""
    found = {kind: getattr(optimizer, name, None) or [] for kind, name in KINDS.items()}
    arrays = {k: [array(v) for v in own if v is not None] for k, own in found.items()}
    others = {v.name for v in optimizer.variables} & {"iteration", "learning_rate"}
    assert len(others) + sum(map(len, arrays.values())) <= len(optimizer.variables)
    return {"v": [array(v) for v in variables]} | arrays


class Trained:
    """Variables that this package's optimizer steps in place, as the oracle does."""

    def __init__(
        self, dtype: str = "float32", name: str = "Adam", starts: Any = None, **options: Any
    ) -> None:
        self.rng = np.random.default_rng(7)
        drawn = "float64" if dtype == "float64" else "float32"
        starts = starts or [values(self.rng, shape, drawn) for shape in SHAPES]
        self.variables = [variable(p, dtype, name=f"v{i}") for i, p in enumerate(starts)]
        self.options = {"learning_rate": LR, "name": "adam"} | options
        self.optimizer = getattr(adapter, name)(**self.options)
        stored = {k: options[k] for k in ("low_bits", "rounding", "seed") if k in options}
        automatic = "bfloat16" if dtype in ("bfloat16", "float16") else "float32"
        self.reference = OracleAdam(
            [array(v) for v in self.variables],
            amsgrad=self.optimizer.amsgrad,
            use_ema=self.optimizer.use_ema,
            moments=options.get("moments", automatic),
            gradient_accumulation_steps=self.optimizer.gradient_accumulation_steps,
            **stored,
        )
        self.reference.transposed = {i for i, p in enumerate(starts) if p.ndim == 2}
        # Not where Keras averages in calls that do not step, or steps without a gradient.
        self.is_exact = not (self.optimizer.use_ema and options.get("gradient_accumulation_steps"))
        self.places: list[tuple[Any, int]] = []

    def gradients(self) -> list[Any]:
        drawn = "float64" if self.reference.params[0].dtype == np.float64 else "float32"
        return [values(self.rng, p.shape, drawn) for p in self.reference.params]

    def train(self, calls: int, gradients: Callable[[], list[Any]] | None = None) -> None:
        for _ in range(calls):
            self.call((gradients or self.gradients)())
            self.check()

    def call(self, grads: Sequence[Any], count: int | None = None) -> None:
        """Apply these gradients to the first `count` variables. A gradient may be None."""
        optimizer, reference = self.optimizer, self.reference
        if not optimizer.built:
            optimizer.build(self.variables)
        count = len(self.variables) if count is None else count
        lacking = count < len(self.variables) or any(g is None for g in grads)
        accumulates = bool(optimizer.gradient_accumulation_steps)
        self.is_exact &= not (lacking and (optimizer.use_ema or accumulates))
        for name in ("beta_1", "beta_2", "epsilon", "weight_decay", "ema_momentum"):
            setattr(reference, name, getattr(optimizer, name))
        reference.lr = float(optimizer.learning_rate)
        reference.ema_overwrite_frequency = optimizer.ema_overwrite_frequency
        reference.flush_denormals = optimizer.epsilon >= 1e-12
        reference.clipnorm_per_tensor = optimizer.clipnorm
        reference.clipnorm = optimizer.global_clipnorm
        reference.clipvalue = max(optimizer.clipvalue or 0, 0)
        reference.steps = [reference.iterations] * len(self.variables)

        tensors = self.tensors(grads)
        given = [None if t is None else array(t) for t in tensors]
        optimizer.apply(tensors[:count], self.variables[:count])
        only_read = [(t, g) for t, g in zip(tensors, given, strict=True) if g is not None]
        assert_all_same_bits([array(t) for t, _ in only_read], [g for _, g in only_read], "grads")
        scale = optimizer.loss_scale_factor
        if scale and accumulates:  # unscaled by Keras
            scale, given = None, [g if g is None else np.asarray(g / scale, g.dtype) for g in given]
        reference.loss_scale = scale
        reference.step([g if i < count else None for i, g in enumerate(given)])

    def tensors(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients as tensors, every other time in the layouts of their variables."""
        dtype = self.variables[0]._value.dtype
        tensors = [None if g is None else torch.from_numpy(np.array(g)).to(dtype) for g in grads]
        if self.reference.iterations % 2:
            tensors = [t if t is None or t.ndim < 2 else t.t().contiguous().t() for t in tensors]
        return tensors

    def check(self) -> None:
        arrays, reference = by_kind(self.optimizer, self.variables), self.reference
        if self.is_exact:
            moments = {"momentum": reference.packed or reference.m, "velocity": reference.v}
            others = {"velocity_hat": reference.vhat, "average": reference.ema}
            expected = {"v": reference.params} | moments | others
            for kind, of in expected.items():
                if of:
                    assert_all_same_bits(arrays[kind], of, kind)
            assert not (reference.packed and any(map(np.size, arrays["velocity"])))
        # All is in place.
        every = [v._value for v in [*self.variables, *self.optimizer.variables]]
        places = [(tensor, tensor.data_ptr()) for tensor in every]
        self.places = self.places or places
        same = zip(places, self.places, strict=True)
        assert all(a is b and where == place for (a, where), (b, place) in same)
