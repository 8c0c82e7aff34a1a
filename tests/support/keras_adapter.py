# SPDX-License-Identifier: MIT
"""`fusedadam.keras` for tests, with the oracle. Modules that import this are skipped without it.

Keras keeps settings such as learning rates in float32, and counts its calls for all variables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import pytest
from helpers import Array, assert_all_same_bits, values
from keras_backend import BACKEND, keras
from oracle import OracleAdam

if BACKEND not in ("torch", "jax"):
    pytest.skip(f"Keras runs on {BACKEND}, not on torch or JAX", allow_module_level=True)

import fusedadam.keras as adapter

ON_JAX: Final = BACKEND == "jax"
if ON_JAX:
    import jax
else:
    import torch

__all__ = ["LR", "ON_JAX", "SHAPES", "Calls", "Trained", "adapter", "array", "by_kind", "floatx"]
__all__ += ["keras", "stored_variables", "tensor", "variable"]

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
    tensor = getattr(variable, "_value", variable)
    if ON_JAX:
        # A view of the array itself, which jax 0.5 keeps of bfloat16, would keep it from donation.
        return np.array(jax.numpy.copy(tensor))
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.array(tensor.numpy())


def tensor(values: Any, dtype: str = "") -> Any:
    """A tensor of the backend."""
    if ON_JAX:
        return jax.numpy.array(values, dtype or None)
    made = torch.from_numpy(np.array(values))
    return made.to(getattr(torch, dtype)) if dtype else made


def address(variable: Any) -> int:
    value = variable._value
    place: int = value.unsafe_buffer_pointer() if ON_JAX else value.data_ptr()
    return place


@contextlib.contextmanager
def floatx(dtype: str) -> Iterator[None]:
    """Set the dtype of Keras' own computations, and give JAX float64 for it."""

    def use(name: str) -> None:
        keras.config.set_floatx(name)
        if ON_JAX:
            jax.config.update("jax_enable_x64", name == "float64")

    before = keras.config.floatx()
    use(dtype)
    try:
        yield
    finally:
        use(before)


def variable(start: Array, dtype: str = "", **settings: Any) -> Any:
    """A variable with these values, of two dimensions in another memory layout.

    keras.initializers.Orthogonal makes such variables. JAX has no other layouts.
    """
    if ON_JAX:
        return keras.Variable(start, dtype=dtype or str(start.dtype), **settings)
    tensor = torch.empty(start.shape, dtype=getattr(torch, dtype or str(start.dtype)))
    if start.ndim == 2:
        tensor = tensor.t().contiguous().t()
    return keras.Variable(tensor.copy_(torch.from_numpy(start)), **settings)


def stored_variables(optimizer: Any) -> list[Any]:
    """The variables that are in files: all but the memory for gradients on JAX."""
    return [v for v in optimizer.variables if not v.name.endswith("gradient_memory")]


def by_kind(optimizer: Any, variables: Sequence[Any]) -> dict[str, list[Array]]:
    """All variables. "v" holds those of the model."""
    found = {kind: getattr(optimizer, name, None) or [] for kind, name in KINDS.items()}
    arrays = {k: [array(v) for v in own if v is not None] for k, own in found.items()}
    others = {v.name for v in optimizer.variables} & {"iteration", "learning_rate"}
    assert len(others) + sum(map(len, arrays.values())) <= len(optimizer.variables)
    return {"v": [array(v) for v in variables]} | arrays


def unscaled(grad: Array, scale: Any) -> Array:
    """The gradient as Keras unscales it. XLA multiplies by the inverse of a constant."""
    return np.asarray(grad * grad.dtype.type(1 / scale) if ON_JAX else grad / scale, grad.dtype)


class Calls:
    """Calls of an optimizer with gradients for the first of some variables.

    If compiled, those for all variables are as in `fit`: of a program that donates the variables.
    """

    def __init__(self, optimizer: Any, variables: Sequence[Any], *, compiled: bool) -> None:
        self.optimizer, self.variables, self.compiled = optimizer, variables, compiled
        self.traced: dict[str, Any] = {}  # settings of the program
        self.program: Any = None

    def __call__(self, tensors: Sequence[Any]) -> None:
        optimizer = self.optimizer
        if not self.compiled or len(tensors) < len(self.variables):
            optimizer.apply(tensors, self.variables[: len(tensors)])
            return
        excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
        settings = optimizer.get_config() | {"learning_rate": 0.0, "excluded": excluded}
        if settings != self.traced:
            self.traced = settings
            self.program = jax.jit(
                lambda params, state, grads: optimizer.stateless_apply(state, grads, params),
                donate_argnums=(0, 1),
            )
        lists = self.variables, optimizer.variables
        results = self.program(*([v.value for v in each] for each in lists), tensors)
        for each, new in zip(lists, results, strict=True):
            for v, value in zip(each, new, strict=True):
                v.assign(value)


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
        self.apply = Calls(self.optimizer, self.variables, compiled=ON_JAX)
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
        self.reference.transposed = {i for i, p in enumerate(starts) if p.ndim == 2 and not ON_JAX}
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
        if ON_JAX and count < len(self.variables):
            self.places.clear()
        self.apply(tensors[:count])
        only_read = [(t, g) for t, g in zip(tensors, given, strict=True) if g is not None]
        assert_all_same_bits([array(t) for t, _ in only_read], [g for _, g in only_read], "grads")
        scale = optimizer.loss_scale_factor
        if scale and (accumulates or ON_JAX):  # unscaled by Keras
            scale, given = None, [None if g is None else unscaled(g, scale) for g in given]
        reference.loss_scale = scale
        reference.step([g if i < count else None for i, g in enumerate(given)])

    def tensors(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients as tensors, every other time in the layouts of their variables."""
        tensors = [None if g is None else tensor(g, self.variables[0].dtype) for g in grads]
        if self.reference.iterations % 2 and not ON_JAX:
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
        # All is in place. On JAX that means the address, which may change if there is no element or
        # if a scalar is only read.
        every = [v for v in self.variables if not v.overwrite_with_gradient]
        every += self.optimizer.variables
        places = [
            (None if ON_JAX else v._value, address(v))
            for v in every
            if not ON_JAX or np.prod(v.shape) > 1
        ]
        self.places = self.places or places
        same = zip(places, self.places, strict=True)
        assert all(a is b and where == place for (a, where), (b, place) in same)
