# SPDX-License-Identifier: MIT
"""The step of `fusedadam.jax` in programs of JAX: bits, memory, transformations, devices."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import fusedadam
import numpy as np
import pytest
from fresh_python import output_of
from helpers import Array, assert_all_same_bits, running

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from fusedadam.jax import CUSTOM_CALLS, AdamState, Optimizer, adamw
from jax import export

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

Shapes = list[tuple[int, ...]]

FEW: Shapes = [(0,), (), (1,), (33,), (7, 150), (40_000,)]
MANY: Shapes = [(i % 5 + 1,) for i in range(70)]  # more than fit in one call


def tree(shapes: Shapes, dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"{i:02}": jnp.asarray(rng.standard_normal(s), dtype) for i, s in enumerate(shapes)}


def arrays(of: Any) -> list[Array]:
    """Copies of the leaves."""
    return [np.array(leaf) for leaf in jax.tree.leaves(of)]


def assert_same(actual: Any, expected: Any) -> None:
    """All but the memory for gradients."""
    assert_all_same_bits(arrays(without_memory(actual)), arrays(without_memory(expected)))


def without_memory(result: tuple[Any, AdamState]) -> tuple[Any, AdamState]:
    return result[0], result[1].without_memory()


# The settings of `adam_step` for arguments of `adamw`.
_NAMES = {"b1": "beta_1", "b2": "beta_2", "eps": "epsilon", "max_grad_norm": "clipnorm"}


class Reference:
    """`adam_step` over the same parameters."""

    def __init__(
        self, params: Any, state: AdamState, learning_rate: float, **settings: Any
    ) -> None:
        self.settings = {_NAMES.get(name, name): of for name, of in settings.items()}
        self.settings |= {"lr": learning_rate, "bias_corrected_epsilon": True}
        for of_the_state in ("moments", "low_bits", "skip_nonfinite"):
            self.settings.pop(of_the_state, None)
        self.params = arrays(params)
        kinds = {"m": state.mu, "v": state.nu, "packed": state.packed, "low_bits": state.low_bits}
        self.state: dict[str, Any] = {kind: arrays(of) for kind, of in kinds.items() if of != ()}
        self.steps = 0

    def step(self, grads: Any) -> None:
        self.steps += 1
        grads = arrays(grads)
        fusedadam.adam_step(self.params, grads, **self.state, step=self.steps, **self.settings)

    def check(self, params: Any, state: AdamState) -> None:
        assert state.count == self.steps
        kept = jax.tree.leaves((state.mu, state.nu, state.packed, state.low_bits))
        expected = [*self.params, *(array for kind in self.state.values() for array in kind)]
        assert_all_same_bits([np.asarray(a) for a in [*jax.tree.leaves(params), *kept]], expected)


@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("isa", fusedadam.supported_isas())
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", {"b1": 0.8, "b2": 0.99, "eps": 1e-3}),
        ("float32", {"weight_decay": 0.1}),
        ("float32", {"max_grad_norm": 0.5}),
        ("float32", {"moments": "packed", "seed": 3, "skip_nonfinite": True}),
        ("float64", {"max_grad_norm": 0.5, "weight_decay": 0.1}),
        ("float16", {"moments": "auto"}),
        ("bfloat16", {"moments": "packed", "low_bits": "int8"}),
        ("bfloat16", {"moments": "bfloat16", "low_bits": "int16", "rounding": "nearest"}),
    ],
    ids=str,
)
def test_bits_are_those_of_adam_step(
    dtype: str, settings: dict[str, Any], shapes: Shapes, isa: str
) -> None:
    with enable_x64(dtype == "float64"):
        params = tree(shapes, jnp.dtype(dtype))
        optimizer = adamw(0.01, **{"weight_decay": 0.0} | settings)
        state = optimizer.init(params)
        reference = Reference(params, state, 0.01, **settings)
        step = jax.jit(optimizer.step)
        for seed in (1, 2, 3):
            grads = tree(shapes, jnp.dtype(dtype), seed)
            with running(isa=isa, threads=seed):
                params, state = jax.block_until_ready(step(grads, state, params))
            reference.step(grads)
        reference.check(params, state)


def test_a_schedule_gives_the_rate_of_each_step() -> None:
    params = tree(FEW)
    optimizer = adamw(lambda count: 0.5 ** (count + 1), weight_decay=0.0)
    state = optimizer.init(params)
    reference = Reference(params, state, 0.0)
    for step in range(3):
        reference.settings["lr"] = 0.5 ** (step + 1)
        params, state = jax.jit(optimizer.step)(tree(FEW, seed=step), state, params)
        reference.step(tree(FEW, seed=step))
    reference.check(params, state)


def test_parameters_of_several_dtypes() -> None:
    parts = [{dtype: tree(FEW, jnp.dtype(dtype))} for dtype in ("bfloat16", "float32")]
    params: dict[str, Any] = parts[0] | parts[1]
    optimizer = adamw(0.01, moments="packed", low_bits="int8")
    state = optimizer.init(params)
    assert {*jax.tree.leaves(state.low_bits["float32"], is_leaf=lambda x: x is None)} == {None}
    stepped, after = jax.jit(optimizer.step)(params, state, params)
    for part in parts:
        (dtype,) = part
        alone, expected = optimizer.step(part, optimizer.init(part), part)
        assert_all_same_bits(arrays(stepped[dtype]), arrays(alone))
        assert_all_same_bits(arrays(after.packed[dtype]), arrays(expected.packed))


@pytest.mark.parametrize("grads_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_gradients_may_have_another_dtype(grads_dtype: str) -> None:
    with enable_x64(True):
        params, grads = tree(FEW), tree(FEW, jnp.dtype(grads_dtype), seed=1)
        optimizer = adamw(0.01, weight_decay=0.0)
        state = optimizer.init(params)
        reference = Reference(params, state, 0.01)
        reference.step(jax.tree.map(lambda g: g.astype("float32"), grads))
        params, state = jax.jit(optimizer.step)(grads, state, params)
        reference.check(params, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.memory)} == {np.dtype("float32")}


@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["few", "many"])
def test_a_step_with_nan_is_skipped(shapes: Shapes) -> None:
    params, grads = tree(shapes), tree(shapes, seed=1)
    optimizer = adamw(0.01, skip_nonfinite=True)
    state = optimizer.init(params)
    grads["03"] = grads["03"].at[0].set(jnp.nan)
    assert_same(jax.jit(optimizer.step)(grads, state, params), (params, state))


def test_parameters_that_the_mask_leaves_out_do_not_decay() -> None:
    params, grads = tree(MANY), tree(MANY, seed=1)
    decayed = {name: int(name) % 3 == 0 for name in params}
    step = {}
    for mask in (decayed, lambda _: decayed, True, False):
        optimizer = adamw(0.01, weight_decay=0.5, mask=mask)
        step[str(mask)[:5]] = optimizer.step(grads, optimizer.init(params), params)[0]
    of_dict, of_function, all_of_them, none_of_them = step.values()
    assert_all_same_bits(arrays(of_dict), arrays(of_function))
    for name, param in of_dict.items():
        expected = all_of_them if decayed[name] else none_of_them
        assert_all_same_bits([np.asarray(param)], [np.asarray(expected[name])])


# -- memory -----------------------------------------------------------------------------------


def train(optimizer: Optimizer, how: str) -> Callable[..., Any]:
    def loss(params: Any, x: Any) -> Any:
        return sum(jnp.sum((x[:, : len(w)] @ w) ** 2) for w in jax.tree.leaves(params))

    def step(params: Any, state: AdamState, x: Any) -> tuple[Any, AdamState]:
        grads = jax.grad(loss)(params, x)
        if how == "step":
            return optimizer.step(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    return step


@pytest.mark.parametrize("how", ["step", "update"])
@pytest.mark.parametrize("shapes", [[(300, 100), (1, 9)], [(20, 50)] * 70], ids=["2", "70"])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1.0}, {"moments": "packed"}], ids=str)
def test_a_donated_step_is_in_place(how: str, shapes: Shapes, settings: dict[str, Any]) -> None:
    optimizer = adamw(0.01, **settings)
    params = tree(shapes)
    given, x = (params, optimizer.init(params)), jnp.ones((4, 300))
    step = jax.jit(train(optimizer, how), donate_argnums=(0, 1)).lower(*given, x).compile()
    # Copies within a fusion are none.
    program = step.as_text()
    assert not re.findall(r" copy\(.*", program[program.index("ENTRY") :])
    assert step.memory_analysis().temp_size_in_bytes < 40_000
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(given)]
    result = step(*given, x)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(result)] == addresses


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("same", ["nothing", "gradients and parameters"])
def test_arguments_that_are_not_donated_stay(jit: bool, same: str) -> None:
    params = tree(MANY)
    grads = params if same != "nothing" else tree(MANY, seed=1)
    optimizer = adamw(0.01, weight_decay=0.0)
    state = optimizer.init(params)
    before = arrays((params, grads, state))
    reference = Reference(params, state, 0.01)
    reference.step(grads)
    step = jax.jit(optimizer.step) if jit else optimizer.step
    reference.check(*step(grads, state, params))
    assert_all_same_bits(arrays((params, grads, state)), before)


def test_a_parameter_may_be_used_after_its_step() -> None:
    params, grads = tree(FEW), tree(FEW, seed=1)
    optimizer = adamw(0.01)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def change(params: Any, state: AdamState) -> Any:
        new, state = optimizer.step(grads, state, params)
        return new, state, jax.tree.map(jnp.subtract, new, params)

    expected = optimizer.step(grads, state, params)
    changes = arrays(jax.tree.map(jnp.subtract, expected[0], params))
    *result, change_of_each = change(params, state)
    assert_same(result, expected)
    assert_all_same_bits(arrays(change_of_each), changes)


def test_a_state_keeps_memory_for_gradients_unless_it_should_not() -> None:
    params, grads = tree(FEW), tree(FEW, seed=1)
    optimizer, without = adamw(0.01), adamw(0.01, keep_gradients=False)
    assert without.init(params).memory == ()
    stepped = jax.jit(without.step)(grads, without.init(params), params)
    assert stepped[1].memory == ()
    assert_same(jax.jit(optimizer.step)(grads, optimizer.init(params), params), stepped)
    restored = stepped[1].with_memory(params)
    assert jax.tree.structure(restored) == jax.tree.structure(optimizer.init(params))
    assert restored.without_memory().memory == ()


# -- transformations --------------------------------------------------------------------------


def test_loops_and_branches_are_steps_one_after_the_other() -> None:
    params, grads = tree(MANY), tree(MANY, seed=1)
    optimizer = adamw(0.01, max_grad_norm=1.0)
    given = params, optimizer.init(params)

    def step(carry: Any) -> Any:
        return optimizer.step(grads, carry[1], carry[0])

    expected = step(step(step(given)))
    scan = jax.jit(lambda of: jax.lax.scan(lambda c, _: (step(c), None), of, None, 3)[0])
    fori = jax.jit(lambda of: jax.lax.fori_loop(0, 3, lambda _, c: step(c), of))
    cond = jax.jit(lambda of, steps: jax.lax.cond(steps, step, lambda c: c, of))
    assert_same(scan(given), expected)
    assert_same(fori(given), expected)
    assert_same(cond(cond(cond(cond(given, True), False), True), True), expected)
    assert_same(jax.jit(jax.checkpoint(step))(given), step(given))


@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1.0}, {"moments": "packed"}], ids=str)
def test_vmap_steps_each_member(shapes: Shapes, settings: dict[str, Any]) -> None:
    rates = jnp.asarray([0.1, 0.01, 0.001], jnp.float32)
    members = [(tree(shapes, seed=i), tree(shapes, seed=10 + i)) for i in range(3)]

    def step(rate: Any, params: Any, grads: Any) -> Any:
        optimizer = adamw(rate, **settings)
        params, state = optimizer.step(grads, optimizer.init(params), params)
        return optimizer.step(grads, state, params)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.jit(jax.vmap(step))(rates, *stacked)
    for i, member in enumerate(members):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_same(own, jax.jit(step)(rates[i], *member))


def test_devices_step_replicas_in_place_and_parts_correctly() -> None:
    assert output_of("import jax_devices; jax_devices.check(); print('right')") == "right"


def test_a_program_can_be_exported() -> None:
    pytest.importorskip("flatbuffers")
    optimizer = adamw(0.01)
    params, grads = tree(FEW), tree(FEW, seed=1)
    given = grads, optimizer.init(params), params
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    exported = export.export(jax.jit(optimizer.step), disabled_checks=checks)(*given)
    loaded = export.deserialize(exported.serialize())
    assert_same(loaded.call(*given), optimizer.step(*given))


@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_updates_are_steps_of_zeros(dtype: str, shapes: Shapes) -> None:
    with enable_x64(dtype == "float64"):
        grads = tree(shapes, jnp.dtype(dtype))
        zeros = jax.tree.map(jnp.zeros_like, grads)
        optimizer = adamw(0.01, weight_decay=0.0, max_grad_norm=0.5)
        state = optimizer.init(zeros)
        updates = jax.jit(optimizer.update)(grads, state)
        assert_same(updates, jax.jit(optimizer.step)(grads, state, zeros))
