# SPDX-License-Identifier: MIT
"""Values for the programs: sizes at edges, all kinds of numbers, valid and invalid settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import fusedadam
import ml_dtypes
import numpy as np
from guarded import PLACES, Guarded, Place
from helpers import FLOATS, Array, halving, values
from hypothesis import strategies as st

Shape: TypeAlias = tuple[int, ...]

# Vector widths, chunks of 256 elements, tiles of 1,024, and occasionally the size at which threads
# begin to be used.
_EDGES: Final = [0, 1, 2, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025, 2047, 2049, 4099]
_THREADED: Final = [32_767, 32_768, 32_769, 40_000]


_sizes = st.integers(0, 70) | st.sampled_from(_EDGES)


@st.composite
def shapes(draw: st.DrawFn, *, min_dims: int = 0) -> Shape:
    size = draw(_sizes | st.sampled_from([*_EDGES, *_EDGES, *_THREADED]))
    form = draw(st.sampled_from(["flat", "rows", "columns", "0-d"]))
    if form == "0-d" and min_dims == 0:
        return ()
    if form == "rows":
        width = draw(st.sampled_from([1, 3, 16, 17]))
        return (size // width, width)
    if form == "columns":
        return (2, size // 2, 1)
    return (size,)


dtypes = st.sampled_from([*FLOATS, "bfloat16", "float16"])
places = st.sampled_from(PLACES)
processes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "isa": st.sampled_from(fusedadam.supported_isas()),
        "threads": st.integers(1, 4),
        "is_wild": st.booleans(),
    }
)
tensors = st.tuples(shapes(), dtypes, places)
tables = st.tuples(shapes(min_dims=1), dtypes, places)
TensorSpec: TypeAlias = tuple[Shape, str, Place]

_finfo: Final[Any] = ml_dtypes.finfo  # NumPy's own does not know bfloat16

# Most numbers are plain, because a NaN in a moment never goes away.
TAME: Final = ["plain", "plain", "small", "zeros", "tiny"]
WILD: Final = [*TAME, "spiked", "odd"]


def numbers(rng: np.random.Generator, shape: Shape, dtype: str, kind: str) -> Array:
    """Draw an array. "spiked" has a few extraordinary numbers, "odd" nothing else.

    Integers are words of packed moments or low bits, and of any kind.
    """
    if dtype in ("int8", "int16"):
        info = np.iinfo(dtype)
        return np.asarray(rng.integers(info.min, info.max, shape, dtype, endpoint=True))
    if kind == "zeros":
        return np.zeros(shape, dtype)
    if kind == "small":
        return np.asarray(rng.integers(-3, 4, shape), dtype)
    if kind == "odd":
        return np.asarray(rng.choice(_odd(dtype), shape))
    drawn = values(rng, shape, dtype)
    if kind == "tiny":
        with np.errstate(all="ignore"):
            return np.asarray(drawn * (256 * _finfo(dtype).smallest_normal), dtype)
    if kind == "spiked" and drawn.size:
        flat = drawn.reshape(-1)
        flat[rng.integers(0, drawn.size, 2)] = rng.choice(_odd(dtype), 2)
    return drawn


def _odd(dtype: str) -> Array:
    info = _finfo(dtype)
    last, tiny, largest = info.smallest_subnormal, info.smallest_normal, info.max
    finite = [0.0, last, tiny / 2, tiny, 1.0, largest / 2, largest]
    return np.array([*finite, *(-x for x in finite), np.inf, -np.inf, np.nan], dtype)


def strided(array: Array, place: Place) -> tuple[Guarded, Array]:
    """The same numbers with a stride of two elements, and their memory."""
    held = Guarded(np.repeat(array, 2).reshape(*array.shape, 2), place)
    return held, held.array[..., 0]


def nested(arrays: Sequence[Any], form: str) -> Any:
    """The same arrays in a nested structure. Each form gives another structure."""
    if form == "dict":
        return {f"p{i}": array for i, array in enumerate(arrays)}
    if form == "nested":
        return {"body": tuple(arrays[:-1]), "head": [{"w": array} for array in arrays[-1:]]}
    return arrays[0] if form == "alone" and len(arrays) == 1 else list(arrays)


def structure(count: int, form: str) -> str:
    """A name for the structure in which `nested` puts this many arrays."""
    return "list" if form == "alone" and count != 1 else form


FORMS: Final = ["list", "list", "dict", "nested", "alone"]


def cast_gradient(rng: np.random.Generator, grad: Array) -> Any:
    """Draw an object of any dtype and layout that NumPy casts to such a gradient."""
    kinds = ["float16", "bfloat16", "float32", "float64", "longdouble", "int32", "uint8", "bool"]
    kind = str(rng.choice([*kinds, "swapped", "list", "Fortran"]))
    with np.errstate(all="ignore"):
        if kind == "swapped" and grad.dtype.kind == "f":
            return grad.astype(grad.dtype.newbyteorder())
        if kind == "Fortran":
            return np.array(grad, order="F")
        if kind == "list":
            given = grad.tolist()
            return given if np.shape(given) == grad.shape else grad
        if kind == "bfloat16":
            return grad.astype(ml_dtypes.bfloat16)
        if kind in ("int32", "uint8", "bool"):
            return rng.integers(0, 4, grad.shape).astype(kind)
        return grad if kind == "swapped" else grad.astype(kind)


# -- settings ---------------------------------------------------------------------------------


def unnamed(iterations: int) -> float:
    return 0.01 / (1 + iterations)


# Cannot be imported by name, so its configuration cannot be saved.
lambda_schedule: Callable[[int], float] = lambda iterations: unnamed(iterations)

_unit = st.floats(0, 1, exclude_max=True) | st.just(0.9)
_any = st.floats(0, 1) | st.floats(0, allow_infinity=False) | st.just(0.01)
_every = st.none() | st.integers(1, 4)

# The settings that single parameters may have.
OWN: Final[dict[str, st.SearchStrategy[Any]]] = {
    **dict.fromkeys(("beta_1", "beta_2"), _unit),
    "epsilon": _any | st.just(1e-8),
    **dict.fromkeys(("decay", "l2"), st.just(0.0) | _any),
    "weight_decay": st.none() | _any,
    **dict.fromkeys(
        ("clipnorm", "clipnorm_per_tensor", "clipvalue"),
        st.none() | st.floats(0, 10) | st.just(0.0),
    ),
    "ema_momentum": st.floats(0, 1),
    "ema_overwrite_frequency": _every,
    **dict.fromkeys(("bias_corrected_epsilon", "maximize", "flush_denormals"), st.booleans()),
    "rounding": st.sampled_from(["stochastic", "nearest"]),
    "seed": st.integers(0, 3) | st.integers(0, 2**63 - 1),
}
SETTINGS: Final[dict[str, st.SearchStrategy[Any]]] = {
    **OWN,
    "lr": _any | st.sampled_from([0.001, 0.1, halving, lambda_schedule]),
    "loss_scale": st.none() | st.sampled_from([1.0, 8.0, 3.0, "dynamic"]),
    **dict.fromkeys(("amsgrad", "use_ema", "skip_nonfinite", "zero_grad"), st.booleans()),
    "gradient_accumulation_steps": _every,
    "moments": st.sampled_from(["float32", "bfloat16", "packed", "auto"]),
    "low_bits": st.sampled_from([None, "int8", "int16"]),
}
OWN_SETTINGS: Final = st.lists(st.sampled_from(["lr", *OWN]), max_size=3, unique=True).flatmap(
    # Only a few, because more of them tend to exclude each other.
    lambda names: st.fixed_dictionaries({name: OWN.get(name, _any) for name in names})
)
STRUCTURAL: Final = ("amsgrad", "use_ema", "gradient_accumulation_steps", "moments", "low_bits")


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw settings that are valid together. Most are left at their defaults."""
    names = draw(st.sets(st.sampled_from(list(SETTINGS)), max_size=8))
    chosen = {name: draw(SETTINGS[name]) for name in sorted(names)}
    # Settings that affect state or counts are on in every second program.
    for name in ("use_ema", "amsgrad", "skip_nonfinite"):
        if draw(st.booleans()):
            chosen[name] = True
    if draw(st.booleans()):
        chosen["loss_scale"] = "dynamic"
    if draw(st.sampled_from([False, False, False, True])):
        chosen["zero_grad"] = True  # which excludes most forms of gradients
    for name in ("moments", "low_bits"):
        if draw(st.booleans()):
            chosen[name] = draw(SETTINGS[name])
    for name in ("clipnorm_per_tensor", "ema_overwrite_frequency", "ema_momentum", "rounding"):
        if conflict(chosen):
            chosen.pop(name, None)
    if conflict(chosen):
        del chosen["amsgrad"]
    return chosen


def conflict(chosen: dict[str, Any]) -> bool:
    """Whether some of the settings exclude each other."""
    by_norm = [chosen.get(name) for name in ("clipnorm", "clipnorm_per_tensor")]
    needs_ema = (
        chosen.get("ema_overwrite_frequency") is not None
        or chosen.get("ema_momentum", 0.99) != 0.99
    )
    is_packed = chosen.get("moments") == "packed"
    needs_dithers = is_packed or chosen.get("low_bits") == "int8"
    return (
        None not in by_norm
        or (needs_ema and not chosen.get("use_ema", False))
        or (is_packed and chosen.get("amsgrad", False))
        or (needs_dithers and chosen.get("rounding") == "nearest")
    )


def fitting(dtype: str, chosen: Mapping[str, Any]) -> str:
    """Return a dtype of parameters that these settings allow: this one if possible."""
    is_refused = (dtype == "float64" and chosen.get("moments") in ("bfloat16", "packed")) or (
        dtype == "float16" and chosen.get("low_bits") is not None
    )
    return "bfloat16" if is_refused else dtype


def gradient_dtype(rng: np.random.Generator, dtype: str) -> str:
    """Draw that of the parameter or, more seldom, another one that needs no conversion."""
    others = [] if dtype == "float64" else ["float32", "float16", "bfloat16"]
    return str(rng.choice([dtype, dtype, dtype, *others]))
