# SPDX-License-Identifier: MIT
"""Properties for all inputs: a step does not depend on the arrangement of its elements."""

from __future__ import annotations

from typing import Any, TypeAlias

import fusedadam
import hypothesis.extra.numpy as hnp
import numpy as np
import oracle
from fusedadam import Adam, adam_step, global_norm
from helpers import (
    FLOATS,
    Array,
    Placed,
    assert_all_same_bits,
    assert_same_bits,
    halving,
    running,
    state,
    values,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import Training

State: TypeAlias = tuple[Array, Array, Array, Array]

dtypes = st.sampled_from(FLOATS)
isas = st.sampled_from(fusedadam.supported_isas())
thread_counts = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)
steps = st.one_of(st.integers(1, 100), st.integers(1, 2**53 + 1))


def any_array(n: int, dtype: str) -> st.SearchStrategy[Array]:
    """Draw arbitrary floats, including subnormals, infinities and NaNs."""
    return hnp.arrays(dtype, n, elements=st.floats(width=32 if dtype == "float32" else 64))


@st.composite
def states(draw: st.DrawFn, max_size: int = 80) -> State:
    """Draw arbitrary ``(p, g, m, v)`` of one length and dtype."""
    n, dtype = draw(st.integers(0, max_size)), draw(dtypes)
    p, g, m, v = (draw(any_array(n, dtype)) for _ in range(4))
    return p, g, m, v


unit_open = st.floats(0, 1, exclude_min=True, exclude_max=True)
positive = st.floats(0, allow_infinity=False)


@st.composite
def options(draw: st.DrawFn, *, of_keras: bool = False) -> dict[str, Any]:
    """Draw hyper-parameters that `adam_step` accepts, each of them sometimes left at its default.

    With `of_keras`, only those that `Adam` accepts too, whose betas are not 0.
    """
    betas = unit_open if of_keras else st.one_of(st.just(0.0), unit_open)
    return draw(
        st.fixed_dictionaries(
            {},
            optional={
                "lr": st.one_of(st.floats(0, 1), positive),
                "beta_1": betas,
                "beta_2": betas,
                "epsilon": st.one_of(st.floats(0, 1), positive),
                "bias_corrected_epsilon": st.booleans(),
                "flush_denormals": st.booleans(),
            },
        )
    )


def stepped(arrays: State, **options: Any) -> list[Array]:
    """Return the new ``[p, m, v]``. The arguments do not change."""
    p, g, m, v = (x.copy() for x in arrays)
    adam_step(p, g, m, v, **options)
    return [p, m, v]


# -- one tensor -------------------------------------------------------------------------------


@given(arrays=states(), step=steps, options=options(), isa=isas)
@example(
    arrays=tuple(np.array([x]) for x in (1.0, 1.0, 0.0, 0.0)),
    step=2**53 + 1,
    options={"beta_1": 1 - 2**-53, "beta_2": 1 - 2**-53},
    isa="baseline" if "baseline" in fusedadam.supported_isas() else fusedadam.active_isa(),
)
def test_any_numbers_equal_oracle(
    arrays: State, step: int, options: dict[str, Any], isa: str
) -> None:
    with running(isa=isa):
        actual = stepped(arrays, step=step, **options)
    assert_all_same_bits(actual, oracle.adam_step(*arrays, step=step, **options), "[p, m, v]")


@given(arrays=states(), options=options(), data=st.data(), isa=isas)
def test_step_of_parts_is_part_of_step(
    arrays: State, options: dict[str, Any], data: st.DataObject, isa: str
) -> None:
    cut = data.draw(st.integers(0, arrays[0].size), label="cut")
    heads, tails = [x[:cut].copy() for x in arrays], [x[cut:].copy() for x in arrays]
    with running(isa=isa):
        whole = stepped(arrays, step=3, **options)
        for part in (heads, tails):
            adam_step(*part, step=3, **options)
    joined = [np.concatenate(pair) for pair in zip(heads, tails, strict=True)]
    del joined[1]
    assert_all_same_bits(joined, whole, "[p, m, v]")


@given(
    seed=seeds,
    dtype=dtypes,
    n=st.integers(0, 100_000),
    cuts=st.lists(st.integers(0, 100_000), max_size=6),
    isa=isas,
    threads=thread_counts,
)
def test_step_of_a_list_of_slices_is_step_of_the_whole(
    seed: int, dtype: str, n: int, cuts: list[int], isa: str, threads: int
) -> None:
    # In place on adjacent slices of one array: none may affect its neighbour.
    arrays = state(np.random.default_rng(seed), n, dtype)
    with running(isa=isa, threads=1):
        whole = stepped(arrays, step=2)
    bounds = sorted(min(c, n) for c in cuts)
    p, g, m, v = arrays
    with running(isa=isa, threads=threads):
        adam_step(*(np.split(x, bounds) for x in (p, g, m, v)), step=2)
    assert_all_same_bits([p, m, v], whole, "[p, m, v]")


@given(arrays=states(), options=options(), seed=seeds, isa=isas)
def test_step_commutes_with_permutation(
    arrays: State, options: dict[str, Any], seed: int, isa: str
) -> None:
    order = np.random.default_rng(seed).permutation(arrays[0].size)
    p, g, m, v = arrays
    with running(isa=isa):
        permuted_last = [x[order] for x in stepped(arrays, step=5, **options)]
        permuted_first = stepped((p[order], g[order], m[order], v[order]), step=5, **options)
    assert_all_same_bits(permuted_first, permuted_last, "[p, m, v]")


@given(arrays=states(), options=options(), isa=isas)
def test_step_is_odd_in_the_gradient(arrays: State, options: dict[str, Any], isa: str) -> None:
    p, g, m, v = arrays
    with running(isa=isa):
        p_plus, m_plus, v_plus = stepped((p, g, m, v), step=1, **options)
        p_minus, m_minus, v_minus = stepped((-p, -g, -m, v), step=1, **options)
    # Values and not bits, because x - x is +0 in both cases.
    np.testing.assert_array_equal(p_minus, -p_plus)
    np.testing.assert_array_equal(m_minus, -m_plus)
    assert_same_bits(v_minus, v_plus, "v")


@given(
    arrays=states(),
    offsets=st.tuples(*[st.integers(0, 17)] * 4),
    options=options(),
    isa=isas,
)
def test_nothing_around_the_buffers_is_touched(
    arrays: State, offsets: tuple[int, int, int, int], options: dict[str, Any], isa: str
) -> None:
    p, g, m, v = placed = [Placed(x, k) for x, k in zip(arrays, offsets, strict=True)]
    with running(isa=isa):
        adam_step(p.array, g.array, m.array, v.array, step=1, **options)
        assert_all_same_bits(
            [p.array, m.array, v.array], stepped(arrays, step=1, **options), "[p, m, v]"
        )
    assert_same_bits(g.array, arrays[1], "g")
    for x in placed:
        x.assert_canaries_alive()


# -- zero gradients ---------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(0, 80), dtype=dtypes, step=steps, isa=isas)
def test_fresh_moments_and_zero_gradients_leave_everything(
    data: st.DataObject, n: int, dtype: str, step: int, isa: str
) -> None:
    p = data.draw(any_array(n, dtype), label="p")
    sign = data.draw(st.sampled_from([1.0, -1.0]), label="sign")
    zero = np.zeros(n, dtype)
    with running(isa=isa):
        moved, m, v = stepped((p, sign * zero, zero, zero), step=step)
    assert_same_bits(moved, p, "p")
    assert_same_bits(m, zero, "m")
    assert_same_bits(v, zero, "v")


@given(arrays=states(), isa=isas, beta_2=st.floats(0.9, 0.9999))
def test_zero_gradients_shrink_finite_moments(arrays: State, isa: str, beta_2: float) -> None:
    p, g, m, v = arrays
    g[...] = 0
    m, v = np.nan_to_num(m), np.abs(np.nan_to_num(v))
    with running(isa=isa):
        p1, m1, v1 = stepped((p, g, m, v), step=1, beta_2=beta_2)
    assert (np.abs(m1) <= np.abs(m)).all()
    assert (v1 <= v).all()
    down, up = m1 > 0, m1 < 0
    known = ~np.isnan(p) & ~np.isnan(p1)
    assert (p1[known & down] <= p[known & down]).all()
    assert (p1[known & up] >= p[known & up]).all()


# -- execution and whole optimizers -----------------------------------------------------------


@given(seed=seeds, dtype=dtypes, n=st.integers(0, 150_000), isa=isas, threads=thread_counts)
@example(seed=0, dtype="float32", n=131_072, isa=fusedadam.active_isa(), threads=5)
def test_isa_and_thread_count_change_no_bit(
    seed: int, dtype: str, n: int, isa: str, threads: int
) -> None:
    arrays = state(np.random.default_rng(seed), n, dtype)
    with running(isa=fusedadam.supported_isas()[-1], threads=1):
        plain = stepped(arrays, step=11)
        (plain_clipped,) = Adam(clipnorm=1e-3).get_gradients([arrays[1]], [arrays[0]])
    with running(isa=isa, threads=threads):
        actual = stepped(arrays, step=11)
        (clipped,) = Adam(clipnorm=1e-3).get_gradients([arrays[1]], [arrays[0]])
    assert_all_same_bits(actual, plain, "[p, m, v]")
    assert_same_bits(clipped, plain_clipped, "clipped")


clips = st.one_of(st.none(), st.floats(0, 10), positive)


@given(
    shapes=st.lists(
        st.tuples(hnp.array_shapes(min_dims=0, min_side=0, max_side=9), dtypes), max_size=6
    ),
    options=options(of_keras=True),
    decay=st.one_of(st.floats(0, 2), positive),
    clipnorm=clips,
    clipvalue=clips,
    seed=seeds,
    isa=isas,
    threads=thread_counts,
)
def test_any_optimizer_equals_oracle(
    shapes: list[tuple[tuple[int, ...], str]],
    options: dict[str, Any],
    decay: float,
    clipnorm: float | None,
    clipvalue: float | None,
    seed: int,
    isa: str,
    threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    options = {**options, "decay": decay, "clipnorm": clipnorm, "clipvalue": clipvalue}
    params = [values(rng, shape, dtype) for shape, dtype in shapes]
    adam, expected = Adam(**options), oracle.OracleAdam(params, **options)
    for _ in range(3):
        grads = [values(rng, shape, dtype) for shape, dtype in shapes]
        with running(isa=isa, threads=threads):
            adam.apply_gradients(zip(grads, params, strict=True))
        expected.step(grads)
    assert_all_same_bits(params, expected.params, "params")
    assert_all_same_bits(adam.get_weights(), expected.weights(), "weights")


@st.composite
def all_options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw options that `Adam` accepts together, each of them sometimes left at its default."""
    chosen: dict[str, Any] = draw(options(of_keras=True))
    chosen |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "lr": st.just(halving),
                "decay": st.floats(0, 2),
                "amsgrad": st.booleans(),
                "weight_decay": clips,
                "l2": st.one_of(st.floats(0, 1), positive),
                "clipvalue": clips,
                "loss_scale": st.one_of(
                    st.none(), st.floats(2.0**-127, 2.0**127), st.just("dynamic")
                ),
                "skip_nonfinite": st.booleans(),
                "gradient_accumulation_steps": st.one_of(st.none(), st.integers(1, 3)),
                "zero_grad": st.booleans(),
                "maximize": st.booleans(),
            },
        )
    )
    if draw(st.booleans()):
        chosen["use_ema"] = True
        chosen["ema_momentum"] = draw(st.one_of(st.just(0.99), st.floats(0, 1)))
        chosen["ema_overwrite_frequency"] = draw(st.one_of(st.none(), st.integers(1, 3)))
    by_norm = draw(st.sampled_from([None, "clipnorm", "clipnorm_per_tensor"]))
    if by_norm is not None:
        chosen[by_norm] = draw(clips)
    return chosen


bad_elements = st.sampled_from([np.nan, np.inf, -np.inf])


def poison(arrays: list[Array], bad: float, data: st.DataObject) -> None:
    """Set one element of these arrays to `bad`, if there is any element."""
    filled = [a for a in arrays if a.size]
    if filled:
        spoilt = data.draw(st.sampled_from(range(len(filled))), label="array")
        position = data.draw(st.integers(0, filled[spoilt].size - 1), label="position")
        filled[spoilt].flat[position] = bad


@given(
    shapes=st.lists(
        st.tuples(hnp.array_shapes(min_dims=0, min_side=0, max_side=9), dtypes), max_size=5
    ),
    options=all_options(),
    seed=seeds,
    calls=st.integers(1, 6),
    data=st.data(),
    threads=thread_counts,
)
def test_any_options_together_equal_oracle(
    shapes: list[tuple[tuple[int, ...], str]],
    options: dict[str, Any],
    seed: int,
    calls: int,
    data: st.DataObject,
    threads: int,
) -> None:
    excluded = data.draw(st.sets(st.sampled_from(range(len(shapes))))) if shapes else set()
    poisoned = data.draw(st.integers(0, calls), label="poisoned call")  # `calls` stands for no call
    training = Training(shapes, seed=seed, excluded=excluded, **options)
    for i in range(calls):
        grads = training.grads()
        if i == poisoned:
            poison(grads, data.draw(bad_elements), data)
        with running(isa=data.draw(isas), threads=threads):
            unscaled = training.optimizer.get_gradients(grads, training.params)
            assert_all_same_bits(unscaled, training.reference.gradients(grads), "get_gradients")
            training.call(grads)
        training.check()


@given(
    elements=st.lists(st.tuples(st.integers(0, 60_000), dtypes), min_size=1, max_size=3),
    options=all_options(),
    seed=seeds,
    poisoned=st.booleans(),
    data=st.data(),
    isa=isas,
    threads=thread_counts,
)
@settings(max_examples=30)
def test_any_options_of_large_tensors_equal_oracle(
    elements: list[tuple[int, str]],
    options: dict[str, Any],
    seed: int,
    poisoned: bool,
    data: st.DataObject,
    isa: str,
    threads: int,
) -> None:
    training = Training([((n,), dtype) for n, dtype in elements], seed=seed, **options)
    with running(isa=isa, threads=threads):
        for i in range(3):
            grads = training.grads()
            if poisoned and i == 1:
                poison(grads, data.draw(bad_elements), data)
            training.call(grads)
    training.check()


@given(
    table=st.tuples(st.integers(1, 40), hnp.array_shapes(min_dims=0, max_dims=2, max_side=5)),
    dtype=dtypes,
    options=all_options(),
    is_excluded=st.booleans(),
    seed=seeds,
    data=st.data(),
    threads=thread_counts,
)
def test_any_sparse_steps_equal_oracle(
    table: tuple[int, tuple[int, ...]],
    dtype: str,
    options: dict[str, Any],
    is_excluded: bool,
    seed: int,
    data: st.DataObject,
    threads: int,
) -> None:
    count, row = table
    options = {**options, "gradient_accumulation_steps": None}
    training = Training(
        [((count, *row), dtype)], seed=seed, excluded=[0] if is_excluded else [], **options
    )
    (param,) = training.params
    for i in range(4):
        named = data.draw(st.lists(st.integers(0, count - 1), max_size=2 * count), label="indices")
        indices = np.array(named, data.draw(st.sampled_from(["int32", "int64"])))
        rows = values(training.rng, (len(named), *row), dtype)
        if i == 2 and data.draw(st.booleans(), label="poisoned"):
            poison([rows], data.draw(bad_elements), data)
        lazy = data.draw(st.booleans(), label="lazy")
        left = training.reference.apply_sparse(indices, rows, lazy=lazy)
        with running(isa=data.draw(isas), threads=threads):
            training.optimizer.apply_sparse(indices, rows, param, lazy=lazy)
        assert_same_bits(rows, left, "grad_rows")
        training.check()


@given(
    shapes=st.lists(
        st.tuples(hnp.array_shapes(min_dims=0, min_side=0, max_side=40), dtypes), max_size=5
    ),
    data=st.data(),
    isa=isas,
    threads=thread_counts,
)
def test_any_global_norm_equals_oracle(
    shapes: list[tuple[tuple[int, ...], str]], data: st.DataObject, isa: str, threads: int
) -> None:
    rng = np.random.default_rng(data.draw(seeds))
    arrays = [values(rng, *of) for of in shapes]
    if data.draw(st.booleans(), label="poisoned"):
        poison(arrays, data.draw(bad_elements), data)
    with running(isa=isa, threads=threads):
        norm = global_norm(arrays)
    assert_same_bits(np.array(norm), np.array(oracle.global_norm(arrays)))


@given(
    data=st.data(),
    n=st.integers(1, 60),
    dtype=dtypes,
    clipnorm=clips,
    clipvalue=clips,
    isa=isas,
)
def test_clipping_any_gradients_equals_oracle(
    data: st.DataObject,
    n: int,
    dtype: str,
    clipnorm: float | None,
    clipvalue: float | None,
    isa: str,
) -> None:
    grads = [data.draw(any_array(n, dtype)), data.draw(any_array(3, "float64"))]
    kept = [g.copy() for g in grads]
    params = [np.zeros_like(g) for g in grads]
    limits: dict[str, Any] = {"clipnorm": clipnorm, "clipvalue": clipvalue}
    expected = oracle.OracleAdam(params, **limits)
    expected.step(grads)
    with running(isa=isa):
        clipped = Adam(**limits).get_gradients(grads, params)
        Adam(**limits).apply_gradients(zip(grads, params, strict=True))
    assert_all_same_bits(clipped, oracle.clip(kept, **limits), "clipped")
    assert_all_same_bits(params, expected.params, "params")
    assert_all_same_bits(grads, kept, "grads")
