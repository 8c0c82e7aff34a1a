# SPDX-License-Identifier: MIT
"""Properties for all inputs: a step does not depend on the arrangement of its elements."""

from __future__ import annotations

from typing import Any, TypeAlias

import fusedadam
import hypothesis.extra.numpy as hnp
import numpy as np
import oracle
from fusedadam import adam_step, global_norm
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, running, state
from hypothesis import example, given, settings
from hypothesis import strategies as st

State: TypeAlias = tuple[Array, Array, Array, Array]

dtypes = st.sampled_from(FLOATS)
isas = st.sampled_from(fusedadam.supported_isas())
thread_counts = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.one_of(st.floats(0, 1), st.floats(0, allow_infinity=False))
betas = st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True))


def any_array(n: int, dtype: str) -> st.SearchStrategy[Array]:
    """Draw arbitrary floats, including subnormals, infinities and NaNs."""
    return hnp.arrays(dtype, n, elements=st.floats(width=32 if dtype == "float32" else 64))


@st.composite
def states(draw: st.DrawFn) -> State:
    """Draw arbitrary ``(p, g, m, v)`` of one length and dtype."""
    n, dtype = draw(st.integers(0, 80)), draw(dtypes)
    p, g, m, v = (draw(any_array(n, dtype)) for _ in range(4))
    return p, g, m, v


# Hyper-parameters that `adam_step` accepts, each of them sometimes left at its default.
options = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("lr", "epsilon"), magnitudes),
        **dict.fromkeys(("beta_1", "beta_2"), betas),
        **{name: st.booleans() for name in ("bias_corrected_epsilon", "flush_denormals")},
    },
)


def stepped(arrays: State, **options: Any) -> list[Array]:
    """Return the new ``[p, m, v]``. The arguments do not change."""
    p, g, m, v = (x.copy() for x in arrays)
    adam_step(p, g, m, v, **options)
    assert_same_bits(g, arrays[1], "g")
    return [p, m, v]


@given(
    arrays=states(),
    step=st.one_of(st.integers(1, 100), st.integers(1, 2**53 + 1)),
    options=options,
    isa=isas,
)
@example(
    arrays=tuple(np.array([x]) for x in (1.0, 1.0, 0.0, 0.0)),
    step=2**53 + 1,
    options={"beta_1": 1 - 2**-53, "beta_2": 1 - 2**-53},
    isa=fusedadam.supported_isas()[-1],
)
def test_any_numbers_equal_oracle(
    arrays: State, step: int, options: dict[str, Any], isa: str
) -> None:
    with running(isa=isa):
        actual = stepped(arrays, step=step, **options)
    assert_all_same_bits(actual, oracle.adam_step(*arrays, step=step, **options), "[p, m, v]")


@given(arrays=states(), options=options, cut=st.floats(0, 1), seed=seeds, isa=isas)
def test_arrangement_of_the_elements_does_not_matter(
    arrays: State, options: dict[str, Any], cut: float, seed: int, isa: str
) -> None:
    p, g, m, v = arrays
    order = np.random.default_rng(seed).permutation(p.size)
    at = int(cut * p.size)
    heads, tails = [x[:at].copy() for x in arrays], [x[at:].copy() for x in arrays]
    with running(isa=isa):
        whole = stepped(arrays, step=3, **options)
        permuted = stepped((p[order], g[order], m[order], v[order]), step=3, **options)
        opposite = stepped((-p, -g, -m, v), step=3, **options)
        for part in (heads, tails):
            adam_step(*part, step=3, **options)
    assert_all_same_bits(permuted, [x[order] for x in whole], "permuted [p, m, v]")
    joined = [np.concatenate(pair) for pair in zip(heads, tails, strict=True)]
    assert_all_same_bits([joined[0], *joined[2:]], whole, "[p, m, v] of parts")
    # Values and not bits, because x - x is +0 in both cases.
    np.testing.assert_array_equal(opposite, [-whole[0], -whole[1], whole[2]])


@given(
    seed=seeds,
    dtype=dtypes,
    n=st.integers(0, 100_000),
    cuts=st.lists(st.integers(0, 100_000), max_size=6),
    isa=isas,
    threads=thread_counts,
)
@settings(max_examples=50)
@example(seed=0, dtype="float32", n=131_072, cuts=[], isa=fusedadam.active_isa(), threads=5)
def test_step_of_a_list_of_slices_is_step_of_the_whole(
    seed: int, dtype: str, n: int, cuts: list[int], isa: str, threads: int
) -> None:
    # In place on adjacent slices of one array: none may affect its neighbour.
    arrays = state(np.random.default_rng(seed), n, dtype)
    with running(isa=fusedadam.supported_isas()[-1], threads=1):
        whole = stepped(arrays, step=2)
        norm = global_norm([arrays[1]])
    p, g, m, v = arrays
    with running(isa=isa, threads=threads):
        assert global_norm([g]) == norm
        adam_step(*(np.split(x, sorted(min(c, n) for c in cuts)) for x in (p, g, m, v)), step=2)
    assert_all_same_bits([p, m, v], whole, "[p, m, v]")
